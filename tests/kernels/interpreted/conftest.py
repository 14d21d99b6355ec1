"""These tests run the Triton kernels on the CPU, in Triton's interpreter; ``../test_interpreter.py`` starts them.

Triton decides when a kernel is defined whether it will be interpreted, so this needs a process of its own with
``TRITON_INTERPRET=1`` set before Triton is imported. In any other process the folder is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from quick_interpreter import quicken
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    quicken()

Compare = Callable[[str, Tensor, Tensor, Tensor], None]


@pytest.fixture
def compare() -> Compare:
    """The bound of every kernel: at most twice PyTorch's own error in the same dtype against fp64, plus 1e-6."""

    def check(name: str, ours: Tensor, torch_result: Tensor, exact: Tensor) -> None:
        assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
        assert exact.dtype == torch.float64
        assert torch.isfinite(exact).all(), f"{name}: the test itself is not finite"
        if not exact.numel():
            return
        # Root mean squares: which of two roundings makes the worst single number is chance in small tensors.
        error, theirs = ((t.double() - exact).square().mean().sqrt().item() for t in (ours, torch_result))
        bound = 2 * theirs + 1e-6
        assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g}"

    return check
