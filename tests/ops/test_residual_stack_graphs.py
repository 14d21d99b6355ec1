"""Differentiation and graphs of the residual stack: gradcheck, opcheck, compile, export; frozen and shared parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rvae_fast import ResidualStack, _backend
from rvae_fast.ops.residual_stack import residual_stack

forward_op = torch.ops.rvae_fast.residual_stack.default
backward_op = torch.ops.rvae_fast.residual_stack_backward.default


def make(width: int = 6, blocks: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> ResidualStack:
    """A stack whose norms have weights and state worth the name."""
    stack = ResidualStack(width, blocks, dtype=dtype, **options)
    for tensor in (*stack.parameters(), *(b for b in stack.buffers() if b.is_floating_point())):
        with torch.no_grad():
            tensor.add_(0.1 * torch.rand_like(tensor))
    return stack


def step(stack: nn.Module, x: Tensor, backend: str) -> list[Tensor]:
    """Output, gradients (None as zeros) and state of a copy after one training step under a backend."""
    stack = copy.deepcopy(stack)
    x = x.detach().clone().requires_grad_(x.requires_grad)
    with _backend.backend(backend):
        out = stack(x)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (x, *stack.parameters())]
    return [out.detach(), *grads, *stack.buffers()]


def assert_same(stack: nn.Module, x: Tensor) -> None:
    for a, b in zip(step(stack, x, "native"), step(stack, x, "reference"), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(order: str, training: bool) -> None:
    """The path that fp64 takes, twice differentiated."""
    stack = make(3, 2, torch.float64, order=order, activation="silu").train(training)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in stack.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(stack, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (x, *(p.detach().requires_grad_() for p in stack.parameters()))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def op_arguments(order: str, batch_stats: bool, grad: bool = True) -> tuple[Any, ...]:
    stack = make(33, 2, order=order)
    norms = [norm for block in stack for norm in block.norms]
    linears = [linear for block in stack for linear in block.linears]
    lists = [
        [linear.weight for linear in linears], [linear.bias for linear in linears],
        [norm.weight for norm in norms], [norm.bias for norm in norms],
    ]  # fmt: skip
    if not grad:
        lists = [[p.detach() for p in ps] for ps in lists]
    x = torch.randn(20, 33, requires_grad=grad)
    state = [[norm.running_mean for norm in norms], [norm.running_var for norm in norms]]
    return (x, *lists, *state, 2, order, "gelu", 0.01, 1e-5, batch_stats, torch.float32, True)


@pytest.mark.usefixtures("native")
class TestOp:
    @pytest.mark.parametrize("order", ["pre", "post"])
    @pytest.mark.parametrize("batch_stats", [True, False])
    def test_opcheck(self, order: str, batch_stats: bool) -> None:
        torch.library.opcheck(forward_op, op_arguments(order, batch_stats))
        x, weights, _, gammas, betas, *rest = op_arguments(order, batch_stats, grad=False)
        _, inner, stream, statistics = forward_op(x, weights, [], gammas, betas, *rest)
        needs = [[True, False, True, True], [False] * 4, [True] * 4]
        torch.library.opcheck(
            backward_op,
            (
                torch.randn_like(x),
                x,
                weights,
                gammas,
                betas,
                inner,
                stream,
                statistics,
                2,
                order,
                "gelu",
                0.01,
                batch_stats,
                torch.float32,
                True,
                *needs,
            ),
        )

    def test_op_by_itself_differentiates(self) -> None:
        arguments = op_arguments("pre", True)
        x, weights = arguments[0], arguments[1]
        by_op = torch.autograd.grad(forward_op(*arguments)[0].square().sum(), [x, *weights])
        momentum, stats = [0.0] * 4, [True] * 4
        with _backend.backend("reference"):
            out = residual_stack(
                *arguments[:5], [None] * 4, [None] * 4, layers=2, order="pre", activation="gelu", negative_slope=0.01,
                eps=1e-5, momentum=momentum, batch_stats=stats,
            )  # fmt: skip
        for a, b in zip(by_op, torch.autograd.grad(out.square().sum(), [x, *weights]), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

    def test_bad_arguments(self) -> None:
        x, weights, *rest = op_arguments("pre", True, grad=False)
        with pytest.raises(ValueError, match="more than one row"):
            forward_op(x[:1], weights, *rest)
        with pytest.raises(ValueError, match=r"weights must have shape \[33, 33\]"):
            forward_op(x, [w[:, :5] for w in weights], *rest)
        with pytest.raises(TypeError, match="float32"):
            forward_op(x.double(), weights, *rest)
        with pytest.raises(ValueError, match="biases has 3 tensors, expected 4"):
            forward_op(x, weights, rest[0][:3], *rest[1:])
        with pytest.raises(ValueError, match="activation"):
            forward_op(x, weights, *rest[:7], "swish", *rest[8:])

    @pytest.mark.parametrize("training", [True, False])
    def test_compile_by_value(self, training: bool) -> None:
        stack = make(33, 2).train(training)
        twin = copy.deepcopy(stack)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            x = torch.randn(20, 33, requires_grad=True)
            results = []
            for model, module in ((stack, stack), (compiled, twin)):
                module.zero_grad()
                x.grad = None
                out = model(x)
                out.square().sum().backward()
                results.append([out.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)

    def test_export(self) -> None:
        stack = make(33, 2).eval()
        x = torch.randn(20, 33)
        exported = torch.export.export(stack, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
        more = torch.randn(7, 33)
        torch.testing.assert_close(exported.module()(more), stack(more))
        assert any("residual_stack" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.usefixtures("native")
class TestAutograd:
    def test_frozen_parameters(self) -> None:
        """Nothing, something, and nothing before a point asks for gradients; also with an input that asks for none."""
        for order in ("pre", "post"):
            for frozen in ("norms", "linears", "weight", "0.", "1.", "1.linears.1", ".bias"):
                for x_needs in (True, False):
                    stack = make(20, 3, order=order)
                    for name, parameter in stack.named_parameters():
                        if frozen in name:
                            parameter.requires_grad_(False)
                    assert_same(stack, torch.randn(40, 20, requires_grad=x_needs))

    def test_shared_block(self) -> None:
        """One block used twice: gradients add up, running statistics move twice."""
        stack = make(20, 2)
        stack[1] = stack[0]
        assert_same(stack, torch.randn(40, 20, requires_grad=True))

    def test_shared_block_with_cumulative_statistics(self) -> None:
        stack = make(20, 2, momentum=None)
        stack[1] = stack[0]
        assert_same(stack, torch.randn(40, 20, requires_grad=True))

    def test_frozen_norms(self) -> None:
        """Norms in eval mode inside a training model: all of them (one op), or one (the reference)."""
        for which in (slice(None), slice(1, 2)):
            stack = make(20, 2)
            for norm in [norm for block in stack for norm in block.norms][which]:
                norm.eval()
            assert_same(stack, torch.randn(40, 20, requires_grad=True))

    def test_layouts(self) -> None:
        stack = make(20, 2)
        assert_same(stack, torch.randn(20, 40).t().requires_grad_())
        assert_same(stack.eval(), torch.randn(1, 20).expand(40, 20).requires_grad_())
        x = torch.randn(40, 20, requires_grad=True)
        stack(x).sum().backward()  # a gradient of stride zero
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()

    def test_gradients_of_gradients(self) -> None:
        stack = make(8, 2, activation="tanh")
        stack[1] = stack[0]
        x = torch.randn(10, 8, requires_grad=True)
        seconds = []
        for backend in ("native", "reference"):
            with _backend.backend(backend):
                (first,) = torch.autograd.grad(stack(x).square().sum(), x, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), [x, *stack[0].parameters()], allow_unused=True))
        for a, b in zip(*seconds, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)

    def test_checkpointing(self) -> None:
        stack = make(20, 2)
        x = torch.randn(30, 20, requires_grad=True)
        plain = torch.autograd.grad(stack(x).sum(), x)
        again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(stack, x, use_reentrant=False).sum(), x)
        assert torch.equal(plain[0], again[0])

    def test_functional_transforms(self) -> None:
        stack = make(8, 2).eval()
        x = torch.randn(5, 8)
        jacobian = torch.func.vmap(torch.func.jacrev(lambda row: stack(row[None])[0]))(x)
        assert jacobian.shape == (5, 8, 8)
        torch.testing.assert_close(
            torch.func.jvp(stack, (x,), (torch.ones_like(x),))[1], jacobian.sum(2), atol=1e-4, rtol=1e-4
        )
