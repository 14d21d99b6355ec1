"""Values and gradients of the residual stack against an fp64 reference, in the bound the project sets for every kernel:
at most twice PyTorch's own error in the same dtype, plus 1e-6 of the quantity's size."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from rvae_fast import _backend
from rvae_fast._activations import ACTIVATIONS
from rvae_fast.ops import residual_stack as module
from rvae_fast.ops.residual_stack import residual_stack

needs_bf16 = pytest.mark.skipif(not module.HAS_BF16_PRODUCTS, reason="this CPU has no bf16 products")


class Stack:
    """Parameters, state and options of a stack, in fp64, to be taken in any dtype."""

    def __init__(
        self,
        width: int,
        count: int,
        layers: int = 2,
        *,
        affine: bool = True,
        bias: bool = True,
        track: bool = True,
        batch_stats: bool = True,
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        nothing = [None] * count
        # Branches that shrink with depth keep a deep stack at one size, as zero-initialised units do.
        weights = [scale * draw(width, width) / (width * count) ** 0.5 for _ in range(count)]
        self.parameters = [
            weights,
            [0.1 * draw(width) for _ in range(count)] if bias else nothing,
            [1 + 0.2 * draw(width) for _ in range(count)] if affine else nothing,
            [0.2 * draw(width) for _ in range(count)] if affine else nothing,
        ]
        self.state = [
            [0.1 * draw(width) for _ in range(count)] if track else nothing,
            [0.5 + draw(width).abs() for _ in range(count)] if track else nothing,
        ]
        self.options: dict[str, Any] = {
            "layers": layers, "order": "pre", "activation": "leaky_relu", "negative_slope": 0.1, "eps": 1e-5,
            "momentum": [0.1] * count, "batch_stats": [batch_stats] * count, **options,
        }  # fmt: skip

    def run(
        self, backend: str, x: Tensor, gradient: Tensor, dtype: torch.dtype, autocast: bool = False
    ) -> dict[str, list[Tensor]]:
        """Output, gradients and running statistics, by name."""
        taken = [[None if p is None else p.to(dtype).requires_grad_() for p in ps] for ps in self.parameters]
        state = [[None if s is None else s.to(dtype) for s in ss] for ss in self.state]
        x = x.to(dtype).requires_grad_()
        with _backend.backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = residual_stack(x, *taken, *state, **self.options)
        leaves = [x] + [p for ps in taken for p in ps if p is not None]
        grads = iter(torch.autograd.grad(out, leaves, gradient.to(out.dtype)))
        result = {"out": [out.detach()], "x": [next(grads)]}
        for name, ps in zip(("weights", "biases", "norm weights", "norm biases"), taken, strict=True):
            result[name] = [next(grads) for p in ps if p is not None]
        result["running means"] = [s for s in state[0] if s is not None]
        result["running variances"] = [s for s in state[1] if s is not None]
        return result


def sample(rows: int, width: int) -> tuple[Tensor, Tensor]:
    x = 1.0 + 2.0 * torch.randn(rows, width, dtype=torch.float64)
    return x, torch.randn(rows, width, dtype=torch.float64)


def errors(result: dict[str, list[Tensor]], exact: dict[str, list[Tensor]]) -> dict[str, float]:
    """Root mean square error of each quantity, relative to its root mean square; robust to a flipped sign at a kink."""
    found = {}
    for name, tensors in exact.items():
        if not tensors:
            continue
        right = torch.cat([t.flatten() for t in tensors])
        got = torch.cat([t.flatten().double() for t in result[name]])
        # A bias that a BatchNorm follows has gradient zero: measure it against the weights' gradient.
        size = right.square().mean().sqrt()
        if name == "biases":
            size = size + torch.cat([t.flatten() for t in exact["weights"]]).square().mean().sqrt()
        found[name] = float((got - right).square().mean().sqrt() / size)
    return found


def check(
    stack: Stack, rows: int, width: int, autocast: bool = False, offset: float = 0.0, draws: int | None = None
) -> None:
    """The bound, on the median error over several draws of the rows: at an activation's kink a rounding can turn one
    slope into another, which decides the error of a handful of numbers."""
    found: dict[str, dict[str, list[float]]] = {"reference": {}, "native": {}}
    for _ in range(draws or max(1, min(32, 4000 // (rows * width)))):
        x, gradient = sample(rows, width)
        x = x + offset
        exact = stack.run("reference", x, gradient, torch.float64)
        for backend, lists in found.items():
            for name, error in errors(stack.run(backend, x, gradient, torch.float32, autocast), exact).items():
                lists.setdefault(name, []).append(error)
    for name, values in found["native"].items():
        native, eager = median(values), median(found["reference"][name])
        assert native <= 2 * eager + 1e-6, f"{name}: {native:.3g}, PyTorch {eager:.3g}"


@pytest.mark.usefixtures("native")
class TestAgainstFp64:
    @pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=needs_bf16)], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("order", ["pre", "post"])
    @pytest.mark.parametrize(("width", "rows"), [(1, 37), (31, 129), (65, 50), (100, 201), (257, 333), (1000, 97)])
    def test_widths_and_odd_batches(self, width: int, rows: int, order: str, autocast: bool) -> None:
        check(Stack(width, 4, order=order), rows, width, autocast)

    @pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=needs_bf16)], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("order", ["pre", "post"])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations(self, activation: str, order: str, autocast: bool) -> None:
        check(Stack(48, 4, order=order, activation=activation, scale=2.0), 150, 48, autocast)

    @pytest.mark.parametrize("order", ["pre", "post"])
    @pytest.mark.parametrize(("count", "layers"), [(1, 1), (3, 3), (20, 2), (60, 3), (200, 2)])
    def test_depths(self, count: int, layers: int, order: str) -> None:
        check(Stack(40, count, layers, order=order), 120, 40, draws=3)  # of 120 layers many a value is at a kink

    @pytest.mark.parametrize("order", ["pre", "post"])
    @pytest.mark.parametrize("batch_stats", [True, False])
    @pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}, {"affine": False, "bias": False}])
    def test_missing_parameters(self, options: dict[str, bool], batch_stats: bool, order: str) -> None:
        check(Stack(33, 4, order=order, batch_stats=batch_stats, **options), 70, 33)

    @pytest.mark.parametrize("order", ["pre", "post"])
    def test_without_running_statistics(self, order: str) -> None:
        check(Stack(33, 4, order=order, track=False), 70, 33)

    @pytest.mark.parametrize("rows", [3, 5, 9])
    def test_few_rows(self, rows: int) -> None:
        check(Stack(64, 4), rows, 64)

    def test_two_rows(self) -> None:
        """Where a BatchNorm divides by the difference of two numbers, both implementations lose digits."""
        stack, (x, gradient) = Stack(64, 4), sample(2, 64)
        found = errors(
            stack.run("native", x, gradient, torch.float32), stack.run("reference", x, gradient, torch.float64)
        )
        assert max(found.values()) <= 1e-3

    @pytest.mark.parametrize("order", ["pre", "post"])
    def test_mean_far_from_zero(self, order: str) -> None:
        """Columns with mean / std = 1000, where a variance by sum of squares is wrong in the first digit."""
        check(Stack(40, 2, order=order), 700, 40, offset=2000.0)

    @needs_bf16
    def test_bf16_input(self) -> None:
        """A stack behind another layer under autocast gets bf16 rows, and passes bf16 on."""
        x, gradient = sample(130, 64)
        x = x.bfloat16()
        stack = Stack(64, 4)
        parameters = [[p.float() for p in ps if p is not None] for ps in stack.parameters]
        with torch.autocast("cpu", torch.bfloat16):
            out = residual_stack(x, *parameters, *[[s.float() for s in ss] for ss in stack.state], **stack.options)
        assert out.dtype == torch.bfloat16
        exact = stack.run("reference", x.double(), gradient, torch.float64)["out"][0]
        assert (out.double() - exact).abs().max() <= 0.02 * exact.abs().max()


@pytest.mark.usefixtures("native")
def test_repeats_bit_for_bit() -> None:
    stack, (x, gradient) = Stack(100, 6), sample(1001, 100)
    first, second = (stack.run("native", x, gradient, torch.float32) for _ in range(2))
    for name, tensors in first.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, second[name], strict=True)), name


@pytest.mark.usefixtures("native")
def test_without_gradients_the_values_are_the_same() -> None:
    for order in ("pre", "post"):
        for batch_stats in (True, False):
            stack, (x, gradient) = Stack(65, 6, 3, order=order, batch_stats=batch_stats), sample(210, 65)
            kept = stack.run("native", x, gradient, torch.float32)["out"][0]
            parameters = [[p.float() for p in ps if p is not None] for ps in stack.parameters]
            state = [[s.float() for s in ss if s is not None] for ss in stack.state]
            rows = x.float()
            before = rows.clone()
            assert torch.equal(residual_stack(rows, *parameters, *state, **stack.options), kept)
            assert torch.equal(rows, before)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("order", ["pre", "post"])
def test_activations_kept_for_backward(order: str) -> None:
    """At most 55 % of what eager PyTorch keeps, without the parameters."""

    def kept(backend: str) -> int:
        stack, (x, _) = Stack(64, 20, order=order), sample(256, 64)
        parameters = [[p.float().requires_grad_() for p in ps if p is not None] for ps in stack.parameters]
        state = [[s.float() for s in ss if s is not None] for ss in stack.state]
        known = {p.untyped_storage().data_ptr() for ps in parameters for p in ps}
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in known:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), _backend.backend(backend):
            out = residual_stack(x.float().requires_grad_(), *parameters, *state, **stack.options)
            assert out.requires_grad
        return sum(sizes.values())

    assert kept("native") <= 0.55 * kept("reference")
