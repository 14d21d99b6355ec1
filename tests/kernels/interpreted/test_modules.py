"""Residual stacks as modules on the Triton kernels: values, gradients, state, graphs, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stack_errors import assert_within_bound, make, step
from torch import Tensor, nn
from torch.nn import functional as F

from rvae_fast import ResidualStack, _backend
from rvae_fast._activations import ACTIVATIONS
from rvae_fast.ops import residual_stack as module

ORDERS = ("pre", "post")
forward_op = module._TRITON_OPS["cpu"].forward
backward_op = module._TRITON_OPS["cpu"].backward


def op_arguments(stack: ResidualStack) -> list[Any]:
    """x and the lists of the op's schema."""
    norms = [norm for block in stack for norm in block.norms]
    linears = [linear for block in stack for linear in block.linears]
    lists = [[getattr(m, n) for m in ms] for ms in (linears, norms) for n in ("weight", "bias")]
    return [rows(20, stack.features), *lists, [n.running_mean for n in norms], [n.running_var for n in norms]]


def rows(batch: int, width: int, needs: bool = True) -> Tensor:
    return (1 + 2 * torch.randn(batch, width)).requires_grad_(needs)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_many_outputs_at_once(training: bool) -> None:
    """Of a stack, and of a sample of a code."""
    from rvae_fast.ops.reparameterise import reparameterise

    stack, x = make(6, 2, layers=1).train(training), rows(9, 6)
    with _backend.backend("triton"):
        outs = [stack(x).sum(0), *(t.sum(0, keepdim=t.dim() == 1) for t in reparameterise(x, 0.1 * x))]
    for out, sources in zip(outs, ([x, *stack.parameters()], [x], [x]), strict=True):
        unit = torch.eye(len(out))
        together = torch.autograd.grad(out, sources, unit, is_grads_batched=True, retain_graph=True)
        alone = [torch.autograd.grad(out, sources, row, retain_graph=True) for row in unit]
        for found, *expected in zip(together, *alone, strict=True):
            assert not found.requires_grad
            torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


class TestAgainstFp64:
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize(("width", "batch"), [(1, 37), (31, 69), (65, 51), (100, 33), (257, 9)])
    def test_widths_and_odd_batches(self, width: int, batch: int, order: str) -> None:
        assert_within_bound(make(width, 2, layers=1, order=order, activation="silu"), rows(batch, width))

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations(self, activation: str, order: str) -> None:
        assert_within_bound(make(20, 2, layers=1, order=order, activation=activation), rows(50, 20))

    @pytest.mark.parametrize(
        ("options", "order"),
        [
            ({"affine": False}, "pre"),
            ({"affine": False}, "post"),
            ({"bias": False}, "pre"),
            ({"track_running_stats": False}, "post"),
            ({"momentum": None}, "pre"),
            ({"layers": 3}, "post"),
        ],
    )
    @pytest.mark.parametrize("training", [True, False])
    def test_options(self, options: dict[str, Any], order: str, training: bool) -> None:
        stack = make(12, 2, **{"layers": 1, "order": order, "activation": "tanh", **options}).train(training)
        assert_within_bound(stack, rows(30, 12))

    @pytest.mark.parametrize(
        ("frozen", "order"),
        [("norms", "pre"), ("linears", "post"), ("0.", "pre"), ("1.linears.0", "post"), (".bias", "pre"), ("", "post")],
    )
    def test_frozen_parameters(self, frozen: str, order: str) -> None:
        """Nothing, something, or all but x asks for gradients; also with an x that asks for none."""
        stack = make(12, 2, layers=1, order=order, activation="elu")
        for name, parameter in stack.named_parameters():
            parameter.requires_grad_(frozen not in name)
        for needs in (True, False):
            assert_within_bound(stack, rows(30, 12, needs))

    def test_frozen_norms(self) -> None:
        stack = make(12, 2, activation="gelu")
        for block in stack:
            block.norms.eval()
        assert_within_bound(stack, rows(30, 12))

    @pytest.mark.parametrize("order", ORDERS)
    def test_two_rows(self, order: str) -> None:
        """Where a BatchNorm divides by the difference of two numbers, both implementations lose digits."""
        stack, x = make(12, 1, order=order, activation="tanh"), rows(2, 12)
        ours = step(stack, x, torch.ones(2, 12), "triton")
        exact = step(stack, x, torch.ones(2, 12), "reference", torch.float64)
        for name, value in exact.items():
            torch.testing.assert_close(ours[name].double(), value, atol=1e-3, rtol=1e-3)

    def test_mean_far_from_zero(self) -> None:
        """Columns with mean / std = 1000, where a variance by sum of squares is wrong in the first digit."""
        assert_within_bound(make(12, 1, activation="silu"), (2000 + rows(700, 12)).detach().requires_grad_())

    @pytest.mark.parametrize("order", ORDERS)
    def test_half_precision(self, order: str) -> None:
        """fp16, for the interpreter's bf16 products are wrong: a model in it, and autocast to it."""
        stack, x = make(24, 2, order=order, activation="silu"), rows(60, 24)
        assert_within_bound(stack, x, dtype=torch.float16)
        assert_within_bound(stack, x, autocast=torch.float16)


class TestState:
    @pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
    def test_running_statistics(self, momentum: float | None) -> None:
        stack = make(12, 2, momentum=momentum)
        stack[1] = stack[0]  # a shared block's move twice
        twin = copy.deepcopy(stack)
        for i in range(5):
            x = 3 + (1 + i / 5) * torch.randn(33, 12)
            for net, backend in ((stack, "triton"), (twin, "reference")):
                with torch.no_grad(), _backend.backend(backend):
                    net(x)
        for (name, a), b in zip(stack.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")

    def test_updates_are_seen_by_autograd(self) -> None:
        """A graph that has saved running statistics does not silently use newer ones."""
        stack = make(6, 1)
        norm = stack[0].norms[0]
        kept = (norm.running_mean * torch.ones(6, requires_grad=True)).sum()
        with _backend.backend("triton"):
            stack(rows(9, 6))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.backward()

    def test_repeats_bit_for_bit(self) -> None:
        stack, x = make(20, 3), rows(70, 20)
        first, second = (step(stack, x, torch.ones(70, 20), "triton") for _ in range(2))
        assert all(torch.equal(value, second[name]) for name, value in first.items())

    def test_an_input_is_never_overwritten(self) -> None:
        for order in ORDERS:
            for needs in (True, False):
                stack, x = make(8, 2, order=order, track_running_stats=False), rows(20, 8, needs)
                before = [t.detach().clone() for t in (x, *stack.parameters())]
                with _backend.backend("triton"), torch.set_grad_enabled(needs):
                    stack(x)
                assert all(torch.equal(a, b) for a, b in zip(before, (x, *stack.parameters()), strict=True))

    @pytest.mark.parametrize("order", ORDERS)
    def test_activations_kept_for_backward(self, order: str) -> None:
        stack, x = make(16, 10, order=order), rows(64, 16)
        known = {p.untyped_storage().data_ptr() for p in stack.parameters()}
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in known:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        kept = []
        for backend in ("triton", "reference"):
            sizes.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), _backend.backend(backend):
                assert stack(x).requires_grad
            kept.append(sum(sizes.values()))
        assert kept[0] <= 0.55 * kept[1]


class TestGraphs:
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("batch_stats", [True, False])
    def test_opcheck(self, order: str, batch_stats: bool) -> None:
        stack = make(9, 2, order=order)
        x, *lists = op_arguments(stack)
        tail = (2, order, "gelu", 0.01, 1e-5, batch_stats, torch.float32, True)
        torch.library.opcheck(forward_op, (x, *lists, *tail))
        with torch.no_grad():
            _, *kept = forward_op(x, *lists, *tail)
            needs = [[True, False, True, True], [False] * 4, [True] * 4]
            arguments = (
                torch.randn_like(x),
                x,
                lists[0],
                *lists[2:4],
                *kept,
                *tail[:4],
                batch_stats,
                torch.float32,
                True,
            )
            torch.library.opcheck(backward_op, (*arguments, *needs))

    def test_bad_arguments(self) -> None:
        x, weights, *rest = (a for a in op_arguments(make(9, 2)))
        tail = (2, "pre", "gelu", 0.01, 1e-5, True, torch.float32, True)
        with pytest.raises(ValueError, match="more than one row"):
            forward_op(x[:1], weights, *rest, *tail)
        with pytest.raises(ValueError, match=r"weights must have shape \[9, 9\]"):
            forward_op(x, [w[:, :5] for w in weights], *rest, *tail)
        with pytest.raises(TypeError, match="float32"):
            forward_op(x.double(), weights, *rest, *tail)
        with pytest.raises(ValueError, match="biases has 3 tensors, expected 4"):
            forward_op(x, weights, rest[0][:3], *rest[1:], *tail)
        with pytest.raises(ValueError, match="activation"):
            forward_op(x, weights, *rest, *tail[:2], "swish", *tail[3:])

    def test_compile_by_value(self) -> None:
        stack = make(9, 2)
        twin = copy.deepcopy(stack)
        with _backend.backend("triton"):
            compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
            for _ in range(2):
                x = rows(20, 9)
                results = []
                for net, owner in ((stack, stack), (compiled, twin)):
                    owner.zero_grad()
                    x.grad = None
                    out = net(x)
                    out.square().sum().backward()
                    results.append([out.detach(), x.grad, *(p.grad for p in owner.parameters()), *owner.buffers()])
                for a, b in zip(*results, strict=True):
                    torch.testing.assert_close(a, b)

    def test_export(self) -> None:
        stack = make(9, 2).eval()
        with _backend.backend("triton"):
            exported = torch.export.export(
                stack, (torch.randn(20, 9),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},)
            )
            assert any("residual_stack" in str(node.target) for node in exported.graph.nodes)
            more = torch.randn(7, 9)
            torch.testing.assert_close(exported.module()(more), stack(more))

    def test_gradients_of_gradients(self) -> None:
        stack, x = make(8, 2, activation="tanh"), rows(10, 8)
        seconds = []
        for backend in ("triton", "reference"):
            with _backend.backend(backend):
                (first,) = torch.autograd.grad(stack(x).square().sum(), x, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), [x, *stack[0].parameters()], allow_unused=True))
        for a, b in zip(*seconds, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)

    def test_layouts(self) -> None:
        stack = make(12, 2, activation="silu")
        assert_within_bound(stack, torch.randn(12, 30).t().requires_grad_())
        assert_within_bound(stack.eval(), torch.randn(1, 12).expand(30, 12).requires_grad_())
        odd = torch.randn(1 + 30 * 12)[1:].view(30, 12)  # starts between multiples of 16 bytes
        assert_within_bound(stack, odd.requires_grad_())
        x = rows(30, 12)
        with _backend.backend("triton"):
            stack(x).sum().backward()  # a gradient of stride zero
        assert torch.isfinite(x.grad).all()

    def test_checkpointing_and_copies(self) -> None:
        stack, x = make(8, 2), rows(30, 8)
        with _backend.backend("triton"):
            plain = torch.autograd.grad(stack(x).sum(), x)
            again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(stack, x, use_reentrant=False).sum(), x)
            copied = torch.autograd.grad(copy.deepcopy(stack)(x).sum(), x)
        assert torch.equal(plain[0], again[0])
        assert torch.equal(plain[0], copied[0])


class TestDispatch:
    def test_no_rows(self) -> None:
        with _backend.backend("triton"):
            assert ResidualStack(8, 2).eval()(torch.randn(0, 8)).shape == (0, 8)

    def test_one_row_is_an_error_in_training_alone(self) -> None:
        stack = ResidualStack(8, 2)
        with _backend.backend("triton"):
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                stack(torch.randn(1, 8))
            assert stack.eval()(torch.randn(1, 8)).shape == (1, 8)

    @pytest.mark.parametrize(
        ("options", "dtype", "reason"),
        [
            ({}, torch.float64, r"rows of torch\.float64"),
            ({}, torch.bfloat16, "bfloat16 in the interpreter"),
            ({"dropout": 0.5}, torch.float32, "dropout"),
        ],
    )
    def test_asked_for_by_name_it_covers_or_raises(self, options: Any, dtype: torch.dtype, reason: str) -> None:
        stack, x = ResidualStack(8, 2, dtype=dtype, **options), torch.randn(20, 8, dtype=dtype)
        with _backend.backend("triton"), pytest.raises(RuntimeError, match=f"does not cover.*{reason}"):
            stack(x)

    def test_mixtures_are_refused(self) -> None:
        stack, x = ResidualStack(8, 2), torch.randn(20, 8)
        with _backend.backend("triton"):
            stack[1].norms[0].eval()
            with pytest.raises(RuntimeError, match="norms of which some take the statistics"):
                stack(x)
            stack[1].norms[0].train()
            stack[0].linears[1].bias = None
            with pytest.raises(RuntimeError, match="layers of which some have a bias"):
                stack(x)
            with pytest.raises(RuntimeError, match=r"weights of torch\.float32 on rows of torch\.float16"):
                ResidualStack(8, 2)(x.half())

    def test_wrong_shapes_do_not_reach_the_kernels(self) -> None:
        stack = ResidualStack(8, 1)
        messages = ("does not cover layers of more than one width", "differ in dtype, shape or device")
        for linear, message in zip(stack[0].linears, messages, strict=True):
            linear.weight = nn.Parameter(torch.randn(4, 4))
            with _backend.backend("triton"), pytest.raises(RuntimeError, match=message):
                stack(torch.randn(20, 8))

    def test_a_model_trains_as_on_the_reference(self) -> None:
        losses = []
        x = torch.randn(48, 3) @ torch.randn(3, 10)
        for backend in ("triton", "reference"):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(10, 8), ResidualStack(8, 2), nn.Linear(8, 10))
            optimizer = torch.optim.Adam(net.parameters(), 1e-2)
            with _backend.backend(backend):
                for _ in range(4):
                    loss = F.mse_loss(net(x), x)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
