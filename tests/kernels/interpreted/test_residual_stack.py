"""Whole stacks of residual units by the kernels, forward and backward, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rvae_fast import reference
from rvae_fast.kernels import configurations, residual_stack_backward
from rvae_fast.kernels.residual_stack import StackOptions, stack_forward
from rvae_fast.kernels.residual_stack_backward import stack_backward

PARAMETERS = ("weights", "biases", "norm_weights", "norm_biases")
EPS = 1e-3


@pytest.fixture(autouse=True, params=["small", "large"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As stacks of this size run, and as larger ones do, whose launches are one by one."""
    if request.param == "large":
        monkeypatch.setattr(configurations, "DEFERRED_TILES", 0)
        monkeypatch.setattr(configurations, "GROUPED_ROWS", 0)


def make(width: int, depth: int, *, affine: bool = True, bias: bool = True) -> dict[str, list[Tensor]]:
    def vectors(wanted: bool = True) -> list[Tensor]:
        return [torch.randn(width) for _ in range(depth)] if wanted else []

    return {
        "weights": [torch.randn(width, width) / width**0.5 for _ in range(depth)],
        "biases": vectors(bias),
        "norm_weights": vectors(affine),
        "norm_biases": vectors(affine),
        "running_means": vectors(),
        "running_vars": [torch.rand(width) + 0.5 for _ in range(depth)],
    }


def run_reference(
    x: Tensor, state: dict[str, list[Tensor]], options: StackOptions, grad: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    state = {k: [v.to(dtype, copy=True) for v in vs] for k, vs in state.items()}
    leaves = {f"{k}.{i}": v for k in PARAMETERS for i, v in enumerate(state[k])}
    leaves["x"] = x.to(dtype, copy=True)
    for leaf in leaves.values():
        leaf.requires_grad_()
    y, layers = leaves["x"], options.layers
    for start in range(0, len(state["weights"]), layers):
        parts = (vs[start : start + layers] or [None] * layers for vs in state.values())
        y = reference.residual_unit(
            y, *parts, order=options.order, activation=options.activation, negative_slope=options.negative_slope,
            eps=EPS, momentum=[1.0] * layers, batch_stats=[options.batch_stats] * layers,
        )  # fmt: skip
    grads = torch.autograd.grad(y, list(leaves.values()), grad.to(dtype))
    out = {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}
    for name in ("running_means", "running_vars"):
        out |= {f"{name}.{i}": v for i, v in enumerate(state[name])}
    return out


def run_kernels(x: Tensor, state: dict[str, list[Tensor]], options: StackOptions, grad: Tensor) -> dict[str, Tensor]:
    before = [t.clone() for t in (x, *(v for vs in state.values() for v in vs))]
    y, kept = stack_forward(x, *state.values(), EPS, options)
    grads = stack_backward(grad, x, state["weights"], kept, options)
    after = (x, *(v for vs in state.values() for v in vs))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), "an input was overwritten"
    out = {"y": y, "x": grads.x}
    for k in PARAMETERS:
        out |= {f"{k}.{i}": getattr(grads, k)[i] for i in range(len(state[k]))}
    for i in range(len(state["weights"])):
        out |= {f"running_means.{i}": kept.norms[i, 0], f"running_vars.{i}": kept.norms[i, 2]}
    return out


def check(x: Tensor, state: dict[str, list[Tensor]], options: StackOptions) -> None:
    """Every result within twice PyTorch's own relative error in this run (of its worst tensor: one rounding error early
    in a stack reaches all gradients before it, in proportions that are chance), plus 1e-6."""
    grad = torch.randn_like(x)
    ours, theirs = run_kernels(x, state, options, grad), run_reference(x, state, options, grad, torch.float32)
    exact = run_reference(x, state, options, grad, torch.float64)
    assert ours.keys() == exact.keys()

    def errors(values: dict[str, Tensor]) -> dict[str, float]:
        # A bias before a BatchNorm has no gradient; what is rounding error there is measured on a scale of 1.
        return {
            name: ((values[name].double() - value).abs().max() / value.abs().max().clamp(min=1)).item()
            for name, value in exact.items()
        }

    bound = 2 * max(errors(theirs).values()) + 1e-6
    assert bound < 1e-3, "the test itself is badly conditioned"
    assert max(errors(ours).values()) <= bound, {name: e for name, e in errors(ours).items() if e > bound}


def options_for(
    order: str, layers: int, activation: str, slope: float = 0.01, batch_stats: bool = True
) -> StackOptions:
    return StackOptions(layers, order, activation, slope, batch_stats, torch.float32)


@pytest.mark.parametrize("mode", ["fused", "plain"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_training_matches_the_reference(order: str, layers: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "strategy", lambda *_: mode)
    check(torch.randn(37, 65) * 2 + 1, make(65, 2 * layers), options_for(order, layers, "leaky_relu", 0.2))


@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("mode", ["fused", "plain"])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_either_statistics_with_and_without_parameters(
    order: str, mode: str, affine: bool, batch_stats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configurations, "strategy", lambda *_: mode)
    state = make(12, 4, affine=affine, bias=affine)
    check(torch.randn(19, 12), state, options_for(order, 2, "tanh", batch_stats=batch_stats))


@pytest.mark.parametrize("which", [None, *range(3)])
def test_kept_tensors_that_begin_anywhere(which: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As hooks on saved tensors may bring them back, cut from one buffer: no kernel takes them for aligned ones."""
    options, state = options_for("pre", 2, "relu"), make(8, 4)
    x, grad = torch.randn(2, 21, 8)
    _, kept = stack_forward(x, *state.values(), EPS, options)
    if which is not None:
        flat = torch.empty(kept[which].numel() + 1)[1:]
        moved = flat.view(kept[which].shape).copy_(kept[which])
        kept = kept._replace(**{kept._fields[which]: moved})
    seen: list[bool] = []
    own = residual_stack_backward._backward_tape
    monkeypatch.setattr(residual_stack_backward, "_backward_tape", lambda key: seen.append(key.aligned) or own(key))
    stack_backward(grad, x, state["weights"], kept, options)
    assert seen == [which is None]


@pytest.mark.parametrize("order", ["pre", "post"])
def test_gradients_only_where_wanted(order: str) -> None:
    options = options_for(order, 2, "relu")
    state = make(9, 4)
    x, grad = torch.randn(2, 21, 9)
    _, kept = stack_forward(x, *state.values(), EPS, options)
    every = stack_backward(grad, x, state["weights"], kept, options)
    need = [False, True, False, True]
    some = stack_backward(grad, x, state["weights"], kept, options, need_x=False, need_weights=need)
    assert some.x is None
    assert torch.equal(some.weights[need], every.weights[need])
    for name in ("biases", "norm_weights", "norm_biases"):
        assert torch.equal(getattr(some, name), getattr(every, name)), name


@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("mode", ["fused", "plain"])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_the_result_does_not_depend_on_keeping(
    order: str, mode: str, batch_stats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configurations, "strategy", lambda *_: mode)
    options = options_for(order, 2, "elu", batch_stats=batch_stats)
    state = make(9, 6)
    x = torch.randn(21, 9)
    kept_y, kept = stack_forward(x, *state.values(), EPS, options)
    y, nothing = stack_forward(x, *state.values(), EPS, options, keep=False)
    # The library's product may depend on where its operands begin.
    tolerance = 0.0 if mode == "fused" else 1e-5
    torch.testing.assert_close(y, kept_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(nothing.norms, kept.norms, rtol=tolerance, atol=tolerance)
    assert nothing.inner.numel() == nothing.stream.numel() == 0


@pytest.mark.parametrize("mode", ["fused", "plain"])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_a_wide_stream_beside_narrow_products(order: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 rows and fp16 products, as under autocast: a few of fp16's roundings away from fp64."""
    monkeypatch.setattr(configurations, "strategy", lambda *_: mode)
    x, grad, state = torch.randn(40, 24), torch.randn(40, 24), make(24, 4)
    options = options_for(order, 2, "silu")._replace(dtype=torch.float16)
    ours = run_kernels(x, state, options, grad)
    exact = run_reference(x, state, options, grad, torch.float64)
    for name, value in exact.items():
        error = (ours[name].double() - value).abs().max() / value.abs().max().clamp(min=1)
        assert error < 16 * torch.finfo(torch.float16).eps, name
    assert ours["y"].dtype == torch.float32
