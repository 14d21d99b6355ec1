"""Gradients of many outputs at once: is_grads_batched and vectorised Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

import rvae_fast
from rvae_fast import AE, RVAE, ResidualStack, reconstruction_kld


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("net", "width"), [(ResidualStack(6, 2), 6), (AE(6, 2, n_layers=3).encoder, 6)], ids=["residual", "plain"]
)
def test_a_stack(net: nn.Module, width: int, training: bool) -> None:
    net.train(training)
    x = torch.randn(9, width, requires_grad=True)
    out = net(x).sum(0)
    sources = [x, *net.parameters()]
    unit = torch.eye(len(out))
    together = torch.autograd.grad(out, sources, unit, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(out, sources, row, retain_graph=True) for row in unit]
    for found, *expected in zip(together, *alone, strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


def the_code(model: Any, x: Tensor) -> Tensor:
    return model.encode(x)[0].sum(0)


def a_sample(model: Any, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return model(x).z.sum(0)


def the_loss(model: Any, x: Tensor) -> Tensor:
    return model.loss(x).reshape(1)


@pytest.mark.parametrize(("function", "training"), [(the_code, False), (a_sample, True), (the_loss, False)])
def test_jacobians_of_a_model(function: Callable[[Any, Tensor], Tensor], training: bool) -> None:
    model, x = RVAE(6, 2, n_layers=4, init="default").train(training), torch.rand(5, 6)
    found, expected = (jacobian(lambda x: function(model, x), x, vectorize=v) for v in (True, False))
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)


def test_hessians() -> None:
    model, x = RVAE(6, 2, n_layers=4, init="default").double().eval(), torch.rand(2, 6, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        net, rows = model.to(dtype), x.to(dtype)
        found, expected = (hessian(net.loss, rows, vectorize=v) for v in (True, False))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_loss_by_itself() -> None:
    x, mu = torch.rand(4, 6), torch.randn(4, 2, requires_grad=True)
    x_hat, logvar = torch.rand(4, 6, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    error, kld = reconstruction_kld(x, x_hat, mu, logvar)
    found = torch.autograd.grad(error + kld, [x_hat, mu, logvar], torch.eye(4), is_grads_batched=True)
    exact = (2 * (x_hat - x), mu, 0.5 * (logvar.exp() - 1))
    for grads, rows in zip(found, exact, strict=True):
        torch.testing.assert_close(grads, torch.diag_embed(rows.detach().T).permute(1, 2, 0))


def test_the_other_vmap_over_a_graph_says_what_to_do() -> None:
    stack, x = ResidualStack(6, 1), torch.randn(4, 6, requires_grad=True)

    unit = torch.eye(24).reshape(24, 4, 6)

    def rows(out: Tensor) -> Tensor:
        return torch.vmap(lambda g: torch.autograd.grad(out, x, g, retain_graph=True)[0])(unit)

    if rvae_fast._native.is_available():
        with pytest.raises(RuntimeError, match="put the forward pass inside it, too"):
            rows(stack(x))
    with rvae_fast.backend("reference"):
        assert rows(stack(x)).shape == (24, 4, 6)
