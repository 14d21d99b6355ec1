"""Triton kernels, one fused op a file: kernels and raw launchers, no autograd.

Installed as ``rvae_fast.kernels``. Importing this package does not import Triton; importing one of its modules does.
With ``TRITON_INTERPRET=1`` in the environment before Triton is first imported, the same kernels run on CPU tensors.
"""

from __future__ import annotations
