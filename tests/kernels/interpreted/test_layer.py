"""The layer kernels, one launch at a time, against the same layer in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rvae_fast._activations import ACTIVATIONS, activate
from rvae_fast.kernels import batch_norm, layer_backward, layer_forward, norm_activation, plain_layer, weight_gradient
from rvae_fast.kernels.configurations import TileConfig

# (rows, in, out): one column, odd widths, one tile, several tiles with ragged ends
SHAPES = [(2, 1, 1), (5, 31, 65), (33, 65, 31), (97, 100, 100), (70, 257, 40)]
SMALL = TileConfig(32, 32, 16, num_warps=4, num_stages=2)
SLOPE = 0.2

FORWARD = {"fused": layer_forward.layer_forward, "plain": plain_layer.plain_layer_forward}
BACKWARD = {"fused": layer_backward.layer_backward, "plain": plain_layer.plain_layer_backward}
WEIGHT = {"fused": weight_gradient.weight_gradient, "plain": plain_layer.plain_weight_gradient}


def fixed(mode: str, **config: Any) -> dict[str, Any]:
    """Small tiles for the fused kernels, so that small shapes have several."""
    return {"config": SMALL._replace(**config)} if mode == "fused" else {}


def make(rows: int, inner: int, out: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows * 10007 + inner * 101 + out)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": normal(rows, inner) * 2 + 3,
        "weight": normal(out, inner) / inner**0.5,
        "bias": normal(out),
        "gamma": normal(inner),
        "beta": normal(inner),
        "skip": normal(rows, inner),
        "residual": normal(rows, out),
        "grad": normal(rows, out),
    }


def prologue(t: dict[str, Tensor], activation: str, skip: bool) -> Tensor:
    a = F.batch_norm(t["x"], None, None, t["gamma"], t["beta"], True)
    return activate(a + t["skip"] if skip else a, activation, SLOPE)


def norm_of(t: dict[str, Tensor], rows: int) -> Tensor:
    moments = batch_norm.column_moments(t["x"])
    return batch_norm.merge_moments(*moments, rows, t["gamma"], t["beta"], 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", FORWARD)
@pytest.mark.parametrize("skip", [False, True], ids=["pre", "post"])
def test_forward_matches_pytorch(mode: str, shape: tuple[int, int, int], skip: bool, compare: Any) -> None:
    t = make(*shape)
    h = torch.empty_like(t["x"]) if skip else None
    y, moments = FORWARD[mode](
        t["x"], t["weight"], t["bias"], norm=norm_of(t, shape[0]), activation="leaky_relu", negative_slope=SLOPE,
        skip=t["skip"] if skip else None, residual=None if skip else t["residual"], h=h, **fixed(mode),
    )  # fmt: skip

    def reference(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        h = prologue(t, "leaky_relu", skip)
        y = F.linear(h, t["weight"], t["bias"])
        return y if skip else y + t["residual"], h

    (y32, h32), (y64, h64) = reference(t), reference({k: v.double() for k, v in t.items()})
    compare("y", y, y32, y64)
    if h is not None:
        compare("h", h, h32, h64)
    assert moments is not None
    norm = batch_norm.merge_moments(*moments, shape[0], None, None, 1e-5)
    torch.testing.assert_close(norm[0].double(), y.double().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm[1].double(), (y.double().var(0, correction=0) + 1e-5).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_forward_and_backward(activation: str, compare: Any) -> None:
    rows = 40
    t = make(rows, 33, 20)
    results = []
    for dtype in (torch.float32, torch.float64):
        s = {k: v.to(dtype, copy=True).requires_grad_() for k, v in t.items()}
        y = F.linear(prologue(s, activation, True), s["weight"], s["bias"])
        names = ("x", "weight", "gamma", "beta", "skip")
        results.append((y, *torch.autograd.grad(y, [s[name] for name in names], s["grad"])))
    norm = norm_of(t, rows)
    act = {"activation": activation, "negative_slope": SLOPE}
    y, _ = layer_forward.layer_forward(
        t["x"], t["weight"], t["bias"], norm=norm, skip=t["skip"], **act, **fixed("fused")
    )
    d, _, tile_sums = layer_backward.layer_backward(
        t["grad"], t["weight"], x=t["x"], norm=norm, skip=t["skip"], **act, **fixed("fused")
    )
    gamma, beta, _, norm_grad = batch_norm.merge_gradients(tile_sums, norm, rows, True)
    grad_x = norm_activation.norm_backward(d, t["x"], norm_grad)
    h = norm_activation.norm_activation(t["x"], norm, skip=t["skip"], **act)
    grad_weight = weight_gradient.weight_gradient(t["grad"], h, **fixed("fused"))
    ours = (y, grad_x, grad_weight, gamma, beta, d)
    for name, *triple in zip(("y", "x", "weight", "gamma", "beta", "skip"), ours, *results, strict=True):
        compare(name, *triple)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", BACKWARD)
def test_backward_prologue_and_epilogue(mode: str, shape: tuple[int, int, int], compare: Any) -> None:
    """One layer between two BatchNorms, a skip into its input's activation and one out of its output."""
    rows, _, out = shape
    t = make(*shape)
    generator = torch.Generator().manual_seed(5)
    extra = {
        "gamma2": torch.randn(out, generator=generator),
        "beta2": torch.randn(out, generator=generator),
        "down": torch.randn(rows, out, generator=generator),  # gradient of the output over the skip
        "up": torch.randn(rows, shape[1], generator=generator),  # gradient of the input from elsewhere
    }
    results = []
    for dtype in (torch.float32, torch.float64):
        s = {k: v.to(dtype, copy=True).requires_grad_() for k, v in (t | extra).items()}
        h = prologue(s, "silu", True)
        y = F.linear(h, s["weight"], s["bias"])
        z = F.batch_norm(y, None, None, s["gamma2"], s["beta2"], True)
        total = (z * s["grad"]).sum() + (y * s["down"]).sum() + (h * s["up"]).sum()
        results.append(
            torch.autograd.grad(total, [s[k] for k in ("skip", "weight", "bias", "gamma", "beta", "gamma2")])
        )
    norm = norm_of(t, rows)
    act = {"activation": "silu"}
    h = torch.empty_like(t["x"])
    y, moments = FORWARD[mode](t["x"], t["weight"], t["bias"], norm=norm, skip=t["skip"], h=h, **act, **fixed(mode))
    norm2 = batch_norm.merge_moments(*moments, rows, extra["gamma2"], extra["beta2"], 1e-5)
    d2, tile_sums = norm_activation.norm_activation_backward(t["grad"], y, norm2)
    gamma2, _, bias, norm_grad = batch_norm.merge_gradients(tile_sums, norm2, rows, True, skip_sum=extra["down"].sum(0))
    d, grad_y, tile_sums = BACKWARD[mode](
        d2, t["weight"], y=y, norm_grad=norm_grad, skip_grad=extra["down"], residual=extra["up"], x=t["x"], norm=norm,
        skip=t["skip"], **act, **fixed(mode),
    )  # fmt: skip
    gamma, beta, _, _ = batch_norm.merge_gradients(tile_sums, norm, rows, True)
    ours = (d, WEIGHT[mode](grad_y, h, **fixed(mode, splits=3)), bias, gamma, beta, gamma2)
    names = ("d", "weight", "bias", "gamma", "beta", "gamma2")
    for name, *triple in zip(names, ours, *results, strict=True):
        compare(name, *triple)


@pytest.mark.parametrize("splits", [1, 2, 7, 64])
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_weight_gradient_whatever_the_splits(rows: int, splits: int, compare: Any) -> None:
    t = make(rows, 45, 34)
    norm = batch_norm.running_norm(t["x"].mean(0), t["x"].square().mean(0), t["gamma"], t["beta"], 1e-5)
    ours = weight_gradient.weight_gradient(
        t["grad"], t["x"], norm=norm, activation="elu", config=SMALL._replace(splits=splits)
    )
    results = []
    for dtype in (torch.float32, torch.float64):
        s = {k: v.to(dtype) for k, v in t.items()}
        h = F.elu(F.batch_norm(s["x"], s["x"].mean(0), s["x"].square().mean(0), s["gamma"], s["beta"], False))
        results.append(s["grad"].t() @ h)
    compare("weight", ours, *results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_past_the_end_do_not_overflow(dtype: torch.dtype) -> None:
    """A constant column: (0 - mean) / sqrt(eps) is beyond fp16, and zero times infinity no zero."""
    rows, width = 5, 8
    x, grad = (torch.randn(rows, width, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    x[:, 3] = -255.0
    norm = batch_norm.merge_moments(*batch_norm.column_moments(x), rows, None, None, 1e-5)
    assert (255.0 * norm[3, 3] > torch.finfo(torch.float16).max).item()
    ours = weight_gradient.weight_gradient(grad, x, norm=norm, activation="relu", config=SMALL)
    h = F.relu(F.batch_norm(x.double(), None, None, training=True))
    torch.testing.assert_close(ours.double(), grad.double().t() @ h, rtol=1e-2, atol=1e-2)


def test_repeats_bit_for_bit() -> None:
    t = make(97, 100, 100)
    norm = norm_of(t, 97)
    runs = [
        layer_backward.layer_backward(t["grad"], t["weight"], x=t["x"], norm=norm, activation="tanh", **fixed("fused"))
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("rows", [2, 128, 129, 1000])
@pytest.mark.parametrize("ratio", [0.0, 1e3])
def test_statistics_survive_a_large_mean(rows: int, ratio: float) -> None:
    """With a mean of 1e3 standard deviations, sums of squares lose the variance in fp32 (20 % of it at 8192 rows);
    moments lose what rounding the mean costs."""
    x = torch.randn(rows, 37, generator=torch.Generator().manual_seed(rows)) + ratio
    norm = batch_norm.merge_moments(*batch_norm.column_moments(x), rows, None, None, 1e-5).double()
    exact = x.double()
    step = torch.finfo(torch.float32).eps * max(ratio, 4.0)
    torch.testing.assert_close(norm[0], exact.mean(0), rtol=0, atol=4 * step)
    torch.testing.assert_close(norm[1], (exact.var(0, correction=0) + 1e-5).rsqrt(), rtol=step, atol=0)
    torch.testing.assert_close(norm[2], exact.var(0), rtol=2 * step, atol=0)


def test_not_a_number_reaches_the_output() -> None:
    x = torch.tensor([[0.5, float("nan")], [1.0, 2.0]])
    norm = batch_norm.running_norm(torch.zeros(2), torch.ones(2), None, None, 1e-5)
    for activation in ACTIVATIONS:
        h = norm_activation.norm_activation(x, norm, activation=activation)
        assert h.isnan().tolist() == [[False, True], [False, False]], activation
