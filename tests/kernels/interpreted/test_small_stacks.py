"""Small stacks: statistics merged by their consumer, weights' gradients of many layers at once; against one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rvae_fast.kernels import configurations
from rvae_fast.kernels import residual_stack as driver
from rvae_fast.kernels import residual_stack_backward as way_back
from rvae_fast.kernels.residual_stack import StackOptions, stack_forward
from rvae_fast.kernels.residual_stack_backward import stack_backward
from rvae_fast.kernels.tape import Tape
from rvae_fast.kernels.weight_gradient import weight_gradient

EPS = 1e-3


def make(
    width: int, depth: int, *, affine: bool = True, bias: bool = True, norms: torch.dtype = torch.float32
) -> dict[str, list[Tensor]]:
    def vectors(wanted: bool = True, dtype: torch.dtype = norms) -> list[Tensor]:
        return [torch.randn(width).to(dtype) for _ in range(depth)] if wanted else []

    return {
        "weights": [torch.randn(width, width) / width**0.5 for _ in range(depth)],
        "biases": vectors(bias, torch.float32),
        "norm_weights": vectors(affine),
        "norm_biases": vectors(affine),
        "running_means": vectors(),
        "running_vars": [(torch.rand(width) + 0.5).to(norms) for _ in range(depth)],
    }


def run(
    x: Tensor, grad: Tensor, state: dict[str, list[Tensor]], options: StackOptions, keep: bool = True, **needs: Any
) -> tuple[dict[str, Tensor], list[Tape]]:
    """Every result, running statistics after an update among them, and the tapes that were played."""
    state = {name: [t.clone() for t in tensors] for name, tensors in state.items()}
    momentum = [0.1 + 0.01 * i for i in range(len(state["weights"]))] if options.batch_stats else []
    played: list[Tape] = []
    play = Tape.play
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tape, "play", lambda tape, values: (played.append(tape), play(tape, values)))
        y, kept = stack_forward(x, *state.values(), EPS, options, keep=keep, momentum=momentum)
        found = {"y": y, "norms": kept.norms}
        if keep:
            grads = stack_backward(grad, x, state["weights"], kept, options, **needs)
            found |= {f"grad {name}": g for name, g in grads._asdict().items() if g is not None}
    for name in ("running_means", "running_vars"):
        found[name] = torch.stack(state[name]).float()
    return found, played


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "DEFERRED_TILES", 0)
    monkeypatch.setattr(configurations, "GROUPED_ROWS", 0)


def assert_same(x: Tensor, state: dict[str, list[Tensor]], options: StackOptions, **needs: Any) -> None:
    """Either way the same, but for the order of sums; and twice the same bits."""
    grad = torch.randn_like(x)
    ours, (_, backward) = run(x, grad, state, options, **needs)
    again, _ = run(x, grad, state, options, **needs)
    with pytest.MonkeyPatch.context() as patch:
        one_by_one(patch)
        expected, (_, long_way) = run(x, grad, state, options, **needs)
    assert backward.launches < long_way.launches
    assert ours.keys() == expected.keys()
    half = options.dtype == torch.float16
    for name, value in expected.items():
        assert torch.equal(ours[name], again[name]), f"{name} differs from run to run"
        error = (ours[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1)
        assert error < (2e-2 if half else 1e-5), f"{name}: {error:.3g}"


def options_for(order: str, layers: int = 2, *, batch_stats: bool = True, dtype: Any = torch.float32) -> StackOptions:
    return StackOptions(layers, order, "silu", 0.01, batch_stats, dtype)


@pytest.mark.parametrize(("rows", "width", "layers"), [(2, 1, 2), (63, 33, 1), (129, 65, 1), (200, 31, 2)])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_shapes(order: str, rows: int, width: int, layers: int) -> None:
    assert_same(torch.randn(rows, width) * 2 + 1, make(width, 2 * layers), options_for(order, layers))


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("parameters", [True, False])
def test_either_statistics_with_and_without_parameters(order: str, batch_stats: bool, parameters: bool) -> None:
    state = make(20, 4, affine=parameters, bias=parameters)
    assert_same(torch.randn(70, 20), state, options_for(order, batch_stats=batch_stats))


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("stream", [torch.float32, torch.float16])
def test_half_precision(order: str, stream: torch.dtype) -> None:
    state = make(9, 4, norms=stream)  # the interpreter's products in fp16 take long
    assert_same(torch.randn(40, 9).to(stream), state, options_for(order, dtype=torch.float16))


@pytest.mark.parametrize("order", ["pre", "post"])
def test_norms_and_running_statistics_are_pytorchs(order: str) -> None:
    """Each is updated once, by its own momentum, from what its layer saw."""
    x, state = torch.randn(300, 24) * 3 + 5, make(24, 2)
    found, (tape, _) = run(x, x, state, options_for(order))
    assert tape.launches == 3 if order == "pre" else 4
    seen = x.double() if order == "pre" else (x @ state["weights"][0].T + state["biases"][0]).double()
    mean, variance = seen.mean(0), seen.var(0)
    torch.testing.assert_close(found["norms"][0, 0].double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["norms"][0, 2].double(), variance, rtol=1e-5, atol=1e-5)
    for name, value in (("running_means", mean), ("running_vars", variance)):
        moved = 0.9 * state[name][0].double() + 0.1 * value
        torch.testing.assert_close(found[name][0].double(), moved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_the_result_does_not_depend_on_keeping(order: str) -> None:
    x, state = torch.randn(140, 20), make(20, 6)
    kept, _ = run(x, x, state, options_for(order))
    found, _ = run(x, x, state, options_for(order), keep=False)
    assert all(torch.equal(value, kept[name]) for name, value in found.items())


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("units", [1, 2, 5])
def test_groups_of_units(order: str, units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for so many units' gradients and no more."""
    rows, width = 70, 20
    monkeypatch.setattr(configurations, "GROUPED_BYTES", units * 2 * rows * width * 4 + 8)
    x, state = torch.randn(rows, width), make(width, 10)
    assert driver.choice(options_for(order), x)[2] == units
    assert_same(x, state, options_for(order))


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("need", ["1110110111", "0101010101", "0000000000"])
def test_gradients_only_where_wanted(order: str, need: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, state, options = torch.randn(70, 9), make(9, 10), options_for(order)
    monkeypatch.setattr(configurations, "GROUPED_BYTES", 3 * 2 * 70 * 9 * 4)
    wanted = [digit == "1" for digit in need]
    every, _ = run(x, x, state, options)
    for need_x in (True, False):
        some, _ = run(x, x, state, options, need_x=need_x, need_weights=wanted)
        assert ("grad x" in some) == need_x
        if any(wanted):
            torch.testing.assert_close(some["grad weights"][wanted], every["grad weights"][wanted], rtol=0, atol=1e-5)
            assert not some["grad weights"][[not w for w in wanted]].any()
        for name in ("biases", "norm_weights", "norm_biases"):
            assert torch.equal(some[f"grad {name}"], every[f"grad {name}"]), name


def test_launches_do_not_grow_with_more_layers_than_a_layer_has() -> None:
    for depth in (4, 12):
        _, (forward, backward) = run(torch.randn(9, 8), torch.randn(9, 8), make(8, depth), options_for("pre"))
        assert forward.launches == depth + 1
        assert backward.launches == depth + 2 + 4  # the last merge and pass; inner layers, ends, the first, the last
        way_back._backward_tape.cache_clear()


@pytest.mark.parametrize("splits", [1, 3])
def test_weight_gradients_of_several_layers(splits: int) -> None:
    grad_y, x, norms = torch.randn(5, 70, 33), torch.randn(4, 70, 33), torch.randn(9, 5, 33)
    out = torch.zeros(6, 33, 33)
    config = configurations.TileConfig(64, 64, 16, 4, 2, splits)
    weight_gradient(
        grad_y[1], x[0], norm=norms[2], activation="silu", out=out[1], layers=3, steps=(1, 1, 3, 2), config=config
    )
    expected = torch.zeros_like(out)
    for j in range(3):
        mean, _, _, scale, shift = norms[2 + 3 * j]
        expected[1 + 2 * j] = grad_y[1 + j].T @ torch.nn.functional.silu((x[j] - mean) * scale + shift)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
