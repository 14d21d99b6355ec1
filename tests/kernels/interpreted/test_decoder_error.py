"""The last layer with its error in the interpreter, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rvae_fast
from rvae_fast import reference
from rvae_fast.kernels import decoder_error as kernels
from rvae_fast.kernels.configurations import TileConfig
from rvae_fast.ops.decoder_error import decoder_error, is_fused

# (rows, in, features): one element, odd widths, ragged ends, several tiles of rows and of columns
SHAPES = [(1, 1, 1), (5, 31, 65), (33, 65, 31), (70, 40, 130)]
SMALL = TileConfig(32, 32, 16, num_warps=4, num_stages=2)


def make(rows: int, inner: int, features: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(rows + inner)
    weight = torch.randn(features, inner, generator=g) / inner**0.5
    h, x = torch.randn(rows, inner, generator=g), torch.rand(rows, features, generator=g)
    return [h, weight, torch.randn(features, generator=g), x, torch.rand(features, generator=g)]


@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape: tuple[int, int, int], likelihood: str, compare: Any) -> None:
    h, weight, bias, x, feature_weight = make(*shape)
    for inputs, reduction in (((h, weight, bias, x, feature_weight), "mean"), ((h, weight, None, x, None), "sum")):
        ours = kernels.decoder_error(*inputs, likelihood, reduction, config=SMALL)
        theirs = reference.decoder_error(*inputs, likelihood, reduction)
        exact = reference.decoder_error(*(None if t is None else t.double() for t in inputs), likelihood, reduction)
        scale = max(1.0, float(exact.abs().max()))
        assert ours.dtype == torch.float32
        compare("error", ours / scale, theirs / scale, exact / scale)


@pytest.mark.parametrize("arithmetic", ["ieee", "half"])
def test_the_chosen_tiles(arithmetic: str, compare: Any) -> None:
    h, weight, bias, x, _ = make(40, 33, 130)
    config = kernels.config_for(arithmetic, 90)
    ours = kernels.decoder_error(h, weight, bias, x, None, "squared", "sum", config=config)
    exact = reference.decoder_error(*(t.double() for t in (h, weight, bias, x)))
    compare("error", ours / 100, reference.decoder_error(h, weight, bias, x) / 100, exact / 100)


def test_strides_and_no_rows() -> None:
    h, weight, bias, x, _ = make(12, 8, 9)
    expected = kernels.decoder_error(h, weight, bias, x, None, "squared", "sum")
    wide = torch.cat([h, h], 1)[:, :8], torch.cat([x, x], 1)[:, :9]
    torch.testing.assert_close(kernels.decoder_error(wide[0], weight, bias, wide[1], None, "squared", "sum"), expected)
    turned = h.t().contiguous().t(), x.t().contiguous().t()
    assert torch.equal(kernels.decoder_error(turned[0], weight, bias, turned[1], None, "squared", "sum"), expected)
    assert kernels.decoder_error(h[:0], weight, bias, x[:0], None, "squared", "sum").shape == (0,)


def test_a_row_does_not_depend_on_the_others() -> None:
    h, weight, bias, x, _ = make(70, 40, 257)
    whole = kernels.decoder_error(h, weight, bias, x, None, "squared", "sum", config=SMALL)
    part = kernels.decoder_error(h[:3], weight, bias, x[:3], None, "squared", "sum", config=SMALL)
    assert torch.equal(whole[:3], part)


def test_non_finite_stays_in_its_row() -> None:
    h, weight, bias, x, _ = make(40, 8, 9)
    clean = kernels.decoder_error(h, weight, bias, x, None, "squared", "sum")
    x[3, 8] = h[7, 2] = float("nan")
    error = kernels.decoder_error(h, weight, bias, x, None, "squared", "sum")
    assert error.isnan().nonzero().view(-1).tolist() == [3, 7]
    keep = [i for i in range(40) if i not in (3, 7)]
    assert torch.equal(error[keep], clean[keep])


def test_the_function_runs_the_kernel_and_differentiates(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight, bias, x, _ = make(12, 8, 9)
    calls = []
    own = kernels.decoder_error
    monkeypatch.setattr(kernels, "decoder_error", lambda *a: (calls.append(1), own(*a))[1])
    with rvae_fast.backend("triton"):
        assert is_fused(x)
        error = decoder_error(h, weight, bias, x)
        assert calls == [1]
        torch.testing.assert_close(error, reference.decoder_error(h, weight, bias, x))
        leaf = h.clone().requires_grad_()
        (grad,) = torch.autograd.grad(decoder_error(leaf, weight, bias, x).sum(), leaf)
    expected = 2 * (h @ weight.t() + bias - x) @ weight
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
