"""One training step of a module under a backend, and its errors against fp64, for the suites of the stack's kernels."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rvae_fast import ResidualStack, _backend


def make(width: int, blocks: int = 2, **options: Any) -> ResidualStack:
    """A stack whose norms have weights and state worth the name."""
    stack = ResidualStack(width, blocks, **options)
    with torch.no_grad():
        for tensor in (*stack.parameters(), *(b for b in stack.buffers() if b.is_floating_point())):
            tensor.add_(0.2 * torch.rand_like(tensor))
    return stack


def step(
    module: nn.Module,
    x: Tensor,
    gradient: Tensor,
    backend: str,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Output, gradients (those that there are) and buffers of a copy of the module in a dtype, after one step."""
    module = copy.deepcopy(module).to(dtype)
    x = x.detach().to(dtype).requires_grad_(x.requires_grad)
    device = x.device.type
    with _backend.backend(backend), torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        out = module(x)
    result = {"out": out.detach()}
    if out.requires_grad:
        out.backward(gradient.to(out.dtype))
    if x.grad is not None:
        result["x"] = x.grad
    result |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return result | {name: b for name, b in module.named_buffers() if b.is_floating_point()}


def errors(result: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square error of each quantity (all layers' weights are one), relative to its root mean square."""
    assert result.keys() == exact.keys()
    groups: dict[str, list[str]] = {}
    for name in exact:
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        groups.setdefault(kind, []).append(name)

    def flat(values: dict[str, Tensor], names: list[str]) -> Tensor:
        return torch.cat([values[name].flatten().double() for name in names])

    weights = flat(exact, groups["linears.weight"]) if "linears.weight" in groups else torch.zeros(1)
    found = {}
    for kind, names in groups.items():
        right = flat(exact, names)
        size = right.square().mean().sqrt()
        if kind == "linears.bias":  # zero where a BatchNorm follows: measured against the weights' gradient
            size = size + weights.square().mean().sqrt().to(size.device)
        found[kind] = float((flat(result, names) - right).square().mean().sqrt() / size.clamp(min=1e-30))
    return found


def assert_within_bound(
    module: nn.Module,
    x: Tensor,
    backend: str = "triton",
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    least: float = 0.0,
) -> None:
    """Every quantity within twice PyTorch's own error in the same dtype, plus 1e-6, against fp64.

    PyTorch's error is that of its worst quantity: one rounding early in a stack reaches all gradients before it, in
    proportions that are chance. An error up to ``least`` is right whatever PyTorch's.
    """
    gradient = torch.randn_like(x)
    if dtype != torch.float64:  # all begin with the same numbers
        module = copy.deepcopy(module).to(dtype)
        x = x.detach().to(dtype).requires_grad_(x.requires_grad)
        gradient = gradient.to(dtype)
    exact = step(module, x, gradient, "reference", torch.float64)
    theirs = errors(step(module, x, gradient, "reference", dtype, autocast), exact)
    ours = errors(step(module, x, gradient, backend, dtype, autocast), exact)
    bound = max(2 * max(theirs.values()) + 1e-6, least)
    assert bound < 0.5, f"the test itself is badly conditioned: {theirs}"
    wrong = {name: (error, theirs[name]) for name, error in ours.items() if not error <= bound}
    assert not wrong, f"errors (ours, PyTorch's) above {bound:.3g}: {wrong}"
