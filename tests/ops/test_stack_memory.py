"""Large blocks of memory that the native stacks use again: never one that somebody still holds, never without bound."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rvae_fast import ResidualStack

pytestmark = pytest.mark.usefixtures("native")

WIDTH, ROWS = 600, 96  # the gradient of the weights is 2.9 MB: large enough for the pool


def step(stack: ResidualStack, x: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of all parameters."""
    out = stack(x)
    return out.detach(), *torch.autograd.grad(out.square().sum(), list(stack.parameters()))


def test_what_is_held_is_not_used_again() -> None:
    stack = ResidualStack(WIDTH, 1)
    held = step(stack, torch.randn(ROWS, WIDTH))
    copies = [t.clone() for t in held]
    for _ in range(3):
        step(stack, torch.randn(ROWS, WIDTH))
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_what_is_held_for_a_backward_is_not_used_again() -> None:
    stack = ResidualStack(WIDTH, 4)
    x, other = torch.randn(400, WIDTH), torch.randn(400, WIDTH)
    expected = step(stack, x)
    out = stack(x)  # keeps 4 MB until its backward, while other steps come and go
    for _ in range(3):
        step(stack, other)
    for a, b in zip(torch.autograd.grad(out.square().sum(), list(stack.parameters())), expected[1:], strict=True):
        assert torch.equal(a, b)


def test_what_nobody_holds_is_used_again() -> None:
    stack, x = ResidualStack(WIDTH, 1), torch.randn(ROWS, WIDTH)

    def address() -> int:
        return next(t for t in step(stack, x) if t.shape == (WIDTH, WIDTH)).untyped_storage().data_ptr()

    seen = {address() for _ in range(10)}
    assert len(seen) < 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_idle_memory_is_bounded() -> None:
    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    stack, x = ResidualStack(512, 8), torch.randn(4096, 512)
    step(stack, x[:64])
    before = resident()
    for rows in (
        4096,
        4000,
        3500,
        3000,
        2500,
        2000,
        1500,
        1000,
    ):  # 16 tensors of 8 MB each and less, no two sizes alike
        step(stack, x[:rows])
    assert resident() - before < 400 << 20  # the pool's 256 MB, and what the allocator itself keeps
