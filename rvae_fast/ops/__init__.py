"""The project's ops: one file an op, each with its schema, fake, checks, dispatch by device and autograd.

Schemas are declared here, in Python, so that an op exists with or without the native module; the native module, when it
can be loaded, adds kernels to them.
"""

from __future__ import annotations

from rvae_fast import _native

# Loading the module is what registers its kernels with PyTorch's dispatcher.
_native.is_available()
