"""Sums of a hundred thousand rows and products of thousands of terms, all of one sign: where a chain of fp32 additions
as long as the sum would be wrong in the sixth digit. At most twice PyTorch's error, plus 1e-6 of the largest value."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from rvae_fast import ResidualStack, _backend
from rvae_fast._activations import Activation
from rvae_fast.nn import PlainStack, Transition
from rvae_fast.ops import residual_stack as residual
from rvae_fast.ops.reconstruction_kld import reconstruction_kld

pytestmark = pytest.mark.usefixtures("native")
needs_bf16 = pytest.mark.skipif(not residual.HAS_BF16_PRODUCTS, reason="this CPU has no bf16 products")


def make(kind: str, widths: tuple[int, ...]) -> nn.Module:
    """A stack in eval, where the gradient of a bias before a BatchNorm is not zero."""
    if kind != "plain":
        return ResidualStack(widths[0], len(widths) - 1, layers=1, order=kind, activation="relu").eval()
    modules: list[nn.Module] = []
    for before, after in pairwise(widths):
        modules += [nn.Linear(before, after), nn.BatchNorm1d(after), Activation("relu", 0.01)]
    return PlainStack(*modules[:-2]).eval()


def step(stack: nn.Module, x: Tensor, gradient: Tensor, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of a copy of the stack."""
    stack, x = copy.deepcopy(stack).to(dtype), x.to(dtype, copy=True).requires_grad_()
    with _backend.backend(backend):
        out = stack(x)
    out.backward(gradient.to(dtype))
    assert x.grad is not None
    found = {"out": out.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in stack.named_parameters() if p.grad is not None}


def assert_within_bound(ours: Tensor, theirs: Tensor, exact: Tensor, what: str) -> None:
    size = exact.abs().max()
    error, allowed = (float((t.double() - exact).abs().max() / size) for t in (ours, theirs))
    assert error <= 2 * allowed + 1e-6, f"{what}: {error:.3g}, PyTorch {allowed:.3g}"


def check(stack: nn.Module, x: Tensor, gradient: Tensor, names: tuple[str, ...]) -> None:
    ours = step(stack, x, gradient, "native", torch.float32)
    theirs = step(stack, x, gradient, "reference", torch.float32)
    exact = step(stack, x, gradient, "reference", torch.float64)
    for name in (n for n in exact if n.endswith(names)):
        assert_within_bound(ours[name], theirs[name], exact[name], name)


@pytest.mark.parametrize("kind", ["pre", "post", "plain"])
def test_gradients_of_the_parameters_over_many_rows(kind: str) -> None:
    torch.manual_seed(0)
    check(make(kind, (8, 8, 8)), torch.rand(100_000, 8), torch.rand(100_000, 8), ("weight", "bias"))


@pytest.mark.parametrize(
    ("kind", "widths", "rows"),
    [("pre", (2048, 2048), 64), ("post", (2048, 2048), 64),
     ("plain", (2048, 48, 2048), 3500)],
    ids=str,
)  # fmt: skip
def test_products_of_wide_layers(kind: str, widths: tuple[int, ...], rows: int) -> None:
    """Forward and backward; and the gradient of the weights, whose product is of as many terms as there are rows."""
    torch.manual_seed(0)
    stack = make(kind, widths)
    with torch.no_grad():
        for module in stack.modules():
            if isinstance(module, nn.Linear):
                module.weight.abs_()
            elif isinstance(module, nn.BatchNorm1d):
                module.bias.fill_(1.0)
    check(stack, torch.randn(rows, widths[0]), torch.rand(rows, widths[-1]), ("out", "x", "weight"))


@needs_bf16
def test_gradient_of_a_bias_over_many_rows_in_bf16() -> None:
    """A transition, which is the kernels' under autocast: the gradient that comes in is bf16, its sum is not."""
    torch.manual_seed(0)
    layer, gradient = Transition(8, 8), torch.rand(100_000, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.rand(100_000, 8)).backward(gradient)
    assert layer.bias.grad is not None
    exact = gradient.double().sum(0)
    assert_within_bound(layer.bias.grad, exact.float(), exact, "bias")


def test_gradient_of_the_feature_weights_over_many_rows() -> None:
    """Of equal terms, whose roundings all go one way."""
    x, x_hat, weight = torch.zeros(200_000, 3), torch.full((200_000, 3), 0.3), torch.ones(3)
    found = []
    for backend, dtype in (("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        leaf = weight.to(dtype, copy=True).requires_grad_()
        with _backend.backend(backend):
            error, _ = reconstruction_kld(x.to(dtype), x_hat.to(dtype), feature_weight=leaf)
        found.append(torch.autograd.grad(error.sum(), leaf)[0])
    assert_within_bound(*found, "feature weight")
