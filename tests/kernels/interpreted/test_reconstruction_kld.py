"""Reconstruction error and KL by the Triton kernels, through the public function, against fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rvae_fast
from rvae_fast import reference
from rvae_fast.kernels import reconstruction_kld as kernels
from rvae_fast.ops.reconstruction_kld import reconstruction_kld

# (rows, features, latent): one element, odd widths, one tile, several tiles with ragged ends, columns in two steps
SHAPES = [(1, 1, 1), (3, 31, 7), (130, 20, 65), (7, 100, 2), (5, 257, 20), (2, 1500, 1100)]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with rvae_fast.backend("triton"):
        yield


def make(rows: int, features: int, latent: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(rows + features)
    x, x_hat = torch.rand(rows, features, generator=g), 3 * torch.randn(rows, features, generator=g)
    mu, logvar = torch.randn(2, rows, latent, generator=g)
    return [t.to(dtype) for t in (x, x_hat, mu, logvar, torch.rand(features, generator=g))]


def run(function: Any, inputs: list[Tensor | None], likelihood: str, reduction: str) -> dict[str, Tensor]:
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    error, kld = function(*leaves[:4], feature_weight=leaves[4], likelihood=likelihood, reduction=reduction)
    g = torch.Generator().manual_seed(9)
    total = (error * torch.randn(error.shape, generator=g)).sum()
    if leaves[2] is not None:
        total = total + (kld * torch.randn(kld.shape, generator=g)).sum()
    given = {n: t for n, t in zip(("x", "x_hat", "mu", "logvar", "weight"), leaves, strict=True) if t is not None}
    grads = torch.autograd.grad(total, list(given.values()))
    return {"error": error.detach(), "kld": kld.detach(), **dict(zip(given, grads, strict=True))}


def check(inputs: list[Tensor | None], likelihood: str, reduction: str, compare: Any) -> None:
    wide = [None if t is None else t.double() for t in inputs]
    ours = run(reconstruction_kld, inputs, likelihood, reduction)
    theirs = run(reference.reconstruction_kld, inputs, likelihood, reduction)
    exact = run(reference.reconstruction_kld, wide, likelihood, reduction)
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        if ours[name].dtype == torch.bfloat16:  # the interpreter cuts bf16 off where GPUs round
            torch.testing.assert_close(ours[name].double(), value, rtol=2**-7, atol=1e-6)
            continue
        scale = max(1.0, float(value.abs().max()))
        compare(name, ours[name].double() / scale, theirs[name].double() / scale, value / scale)


@pytest.mark.parametrize("variational", [True, False])
def test_results_lie_by_themselves(variational: bool) -> None:
    """Inductor asserts that each begins at a multiple of 16 bytes, whatever the number of rows."""
    x, x_hat, *posterior, _ = make(33, 5, 3)
    for result in kernels.forward(x, x_hat, *(posterior if variational else (None, None)), None, "squared", "sum"):
        assert result.storage_offset() == 0


@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int, int], likelihood: str, compare: Any) -> None:
    x, x_hat, mu, logvar, weight = make(*shape)
    check([x, x_hat, mu, logvar, weight], likelihood, "mean" if shape[1] % 2 else "sum", compare)
    check([x, x_hat, None, None, None], likelihood, "sum", compare)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_mixtures(dtype: torch.dtype, compare: Any) -> None:
    x, x_hat, mu, logvar, weight = make(9, 70, 5)
    check([x, x_hat.to(dtype), mu, logvar, weight], "squared", "sum", compare)
    check([x.to(dtype), x_hat.to(dtype), mu.to(dtype), logvar.to(dtype), weight.to(dtype)], "bernoulli", "sum", compare)


@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
def test_large_magnitudes(likelihood: str, compare: Any) -> None:
    logvar = torch.tensor([[-80.0, 80.0, 0.0, 1e-3], [88.6, 20.0, -80.0, 5.0]])
    mu = torch.tensor([[1e4, -1e4, 0.0, 1.0], [0.0, 1e-8, 3.0, 4.0]])
    x = torch.tensor([[0.0, 1.0, 0.5, 0.999, 1e-3], [1.0, 0.0, 1.0, 0.0, 0.25]])
    logits = torch.tensor([[1e4, 1e4, -1e4, 1e4, 1e4], [-1e4, 1e4, 90.0, -90.0, 0.0]])
    check([x, logits, mu, logvar, None], likelihood, "sum", compare)


def test_a_good_bernoulli_fit_keeps_its_digits() -> None:
    """Logits far on the right side: an error of a few 1e-6, which log(1 + e) in fp32 would lose."""
    x = torch.tensor([[0.0, 1.0] * 300])
    logits = torch.where(x > 0, 18.0, -18.0)
    error, _ = reconstruction_kld(x, logits, likelihood="bernoulli")
    exact, _ = reference.reconstruction_kld(x.double(), logits.double(), likelihood="bernoulli")
    torch.testing.assert_close(error.double(), exact, rtol=1e-5, atol=0)


def test_rows_with_strides_and_expanded_gradients(compare: Any) -> None:
    base = torch.randn(12, 2, 40, generator=torch.Generator().manual_seed(3))
    x, x_hat = base[:, 0], base[:, 1]  # rows further apart than their length
    columns = torch.randn(11, 12).t()  # columns apart: copied
    check([x, x_hat, columns, columns * 0.5, None], "absolute", "sum", compare)
    leaf = x_hat.clone().requires_grad_()
    (one,) = torch.autograd.grad(reconstruction_kld(x, leaf)[0].sum(), leaf)  # a gradient of stride 0
    torch.testing.assert_close(one, 2 * (leaf - x).detach())


def test_only_the_gradients_that_are_wanted() -> None:
    x, x_hat, mu, logvar, weight = make(6, 33, 4)
    g = torch.rand(2, 6)
    options = (x, x_hat, mu, logvar, weight, "squared", "sum")
    every = kernels.backward(*g, *options, [True] * 5)
    for i in range(5):
        needs = [k == i for k in range(5)]
        (one,) = kernels.backward(g[0] if i in (0, 1, 4) else None, g[1] if i in (2, 3) else None, *options, needs)
        assert torch.equal(one, every[i])


def test_no_rows() -> None:
    x, x_hat, mu, logvar, weight = (t.requires_grad_() for t in make(0, 5, 3))
    error, kld = reconstruction_kld(x, x_hat, mu, logvar, feature_weight=weight)
    assert error.shape == kld.shape == (0,)
    grads = torch.autograd.grad((error + kld).sum(), (x, mu, weight))
    assert [g.shape for g in grads] == [x.shape, mu.shape, weight.shape]
    assert not grads[2].any()


@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_stays_in_its_row(likelihood: str, bad: float) -> None:
    x, x_hat, mu, logvar, _ = make(4, 37, 20)
    expected, expected_kld = reconstruction_kld(x, x_hat, mu, logvar, likelihood=likelihood)
    x_hat[1, 36], mu[2, 1], logvar[3, 17] = bad, bad, bad
    error, kld = reconstruction_kld(x, x_hat, mu, logvar, likelihood=likelihood)
    assert not error[1].isfinite()
    assert not kld[2:].isfinite().any()
    assert torch.equal(error[[0, 2, 3]], expected[[0, 2, 3]])
    assert torch.equal(kld[:2], expected_kld[:2])


def test_fp64_and_second_derivatives_take_the_reference() -> None:
    inputs = [t.double().requires_grad_() for t in make(2, 3, 2)]

    def function(*t: Tensor) -> tuple[Tensor, Tensor]:
        return reconstruction_kld(*t[:4], feature_weight=t[4])

    assert torch.autograd.gradcheck(function, inputs)
    leaf = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(reconstruction_kld(torch.zeros(3, 4), leaf)[0].sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), leaf)
    torch.testing.assert_close(second, torch.full((3, 4), 2.0))


def test_the_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("forward", "backward"):
        own = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, own=own, name=name: (calls.append(name), own(*a))[1])
    leaf = torch.randn(3, 4, requires_grad=True)
    reconstruction_kld(torch.zeros(3, 4), leaf)[0].sum().backward()
    assert calls == ["forward", "backward"]
