"""Values and gradients of the plain stack against an fp64 reference, in the bound of ``test_residual_stack_values``;
its derivatives and graphs; and the module around it against the same modules called one by one."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rvae_fast import _backend, reference
from rvae_fast._activations import ACTIVATIONS, Activation
from rvae_fast.nn import PlainStack
from rvae_fast.ops import residual_stack as residual
from rvae_fast.ops.plain_stack_op import backward_op, forward_op

needs_bf16 = pytest.mark.skipif(not residual.HAS_BF16_PRODUCTS, reason="this CPU has no bf16 products")
precisions = pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=needs_bf16)], ids=["fp32", "bf16"])


def make(
    widths: tuple[int, ...],
    activation: str = "leaky_relu",
    *,
    affine: bool = True,
    bias: bool = True,
    track: bool = True,
    momentum: float | None = 0.1,
    train: bool = True,
) -> PlainStack:
    """A stack in fp64 whose norms have weights and state worth the name."""
    modules: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(widths)):
        modules.append(nn.Linear(before, after, bias))
        if i < len(widths) - 2:
            modules += [nn.BatchNorm1d(after, 1e-5, momentum, affine, track), Activation(activation, 0.1)]
    stack = PlainStack(*modules).double()
    with torch.no_grad():
        for tensor in (*stack.parameters(), *stack.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.add_(0.2 * torch.rand_like(tensor))
    return stack.train(train)


def run(
    stack: PlainStack, backend: str, x: Tensor, gradient: Tensor, dtype: torch.dtype, autocast: bool = False
) -> dict[str, list[Tensor]]:
    """Output, gradients and running statistics of a copy, by kind."""
    stack = copy.deepcopy(stack).to(dtype)
    x = x.detach().clone().to(dtype).requires_grad_()
    with _backend.backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = stack(x)
    out.backward(gradient.to(out.dtype))
    assert x.grad is not None
    found: dict[str, list[Tensor]] = {"out": [out.detach()], "x": [x.grad]}
    for name, parameter in stack.named_parameters():
        index, kind = name.split(".")
        assert parameter.grad is not None, name
        found.setdefault(("norm " if int(index) % 3 else "") + kind, []).append(parameter.grad)
    for name, buffer in stack.named_buffers():
        if buffer.is_floating_point():
            found.setdefault(name.split(".")[1], []).append(buffer)
    return found


def errors(found: dict[str, list[Tensor]], exact: dict[str, list[Tensor]]) -> dict[str, float]:
    result = {}
    for name, tensors in exact.items():
        right = torch.cat([t.double().flatten() for t in tensors])
        got = torch.cat([t.double().flatten() for t in found[name]])
        size = right.square().mean().sqrt()
        if name == "bias":  # before a BatchNorm a bias has gradient zero: measure it against the weights'
            size = size + torch.cat([t.flatten() for t in exact["weight"]]).square().mean().sqrt()
        result[name] = float((got - right).square().mean().sqrt() / size)
    return result


def check(stack: PlainStack, rows: int, widths: tuple[int, ...], autocast: bool = False, offset: float = 0.0) -> None:
    found: dict[str, dict[str, list[float]]] = {"reference": {}, "native": {}}
    for _ in range(max(3, min(32, 4000 // (rows * max(widths))))):
        x = 1.0 + 2.0 * torch.randn(rows, widths[0], dtype=torch.float64) + offset
        gradient = torch.randn(rows, widths[-1], dtype=torch.float64)
        exact = run(stack, "reference", x, gradient, torch.float64)
        for backend, lists in found.items():
            for name, error in errors(run(stack, backend, x, gradient, torch.float32, autocast), exact).items():
                lists.setdefault(name, []).append(error)
    for name, draws in found["native"].items():
        native, eager = median(draws), median(found["reference"][name])
        assert native <= 2 * eager + 1e-6, f"{name}: {native:.3g}, PyTorch {eager:.3g}"


@pytest.mark.usefixtures("native")
class TestAgainstFp64:
    @precisions
    @pytest.mark.parametrize(
        ("widths", "rows"),
        [((1, 1, 1), 37), ((40, 128, 64, 10), 256), ((31, 65, 1, 100), 129), ((257, 33, 5), 50), ((3, 1000, 7), 97),
         ((10, 64, 128, 40), 1001), ((784, 402, 20), 201)],
    )  # fmt: skip
    def test_widths_and_odd_batches(self, widths: tuple[int, ...], rows: int, autocast: bool) -> None:
        check(make(widths), rows, widths, autocast)

    @precisions
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations(self, activation: str, autocast: bool) -> None:
        check(make((20, 48, 30), activation), 150, (20, 48, 30), autocast)

    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}, {"affine": False, "bias": False}, {}])
    def test_missing_parameters(self, options: dict[str, bool], train: bool) -> None:
        check(make((33, 50, 20), train=train, **options), 70, (33, 50, 20))

    @pytest.mark.parametrize("train", [True, False])
    def test_without_running_statistics(self, train: bool) -> None:
        check(make((33, 50, 20), track=False, train=train), 70, (33, 50, 20))

    @pytest.mark.parametrize("rows", [3, 5, 9])
    def test_few_rows(self, rows: int) -> None:
        check(make((40, 64, 10)), rows, (40, 64, 10))

    def test_many_layers(self) -> None:
        widths = tuple(60 - i for i in range(25))
        check(make(widths), 300, widths)

    def test_mean_far_from_zero(self) -> None:
        check(make((40, 30, 20)), 700, (40, 30, 20), offset=2000.0)


def equal(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]]) -> None:
    for name, tensors in a.items():
        assert all(torch.equal(x, y) for x, y in zip(tensors, b[name], strict=True)), name


@pytest.mark.usefixtures("native")
@precisions
def test_repeats_bit_for_bit_and_the_graphs_op_agrees(autocast: bool) -> None:
    """The op that graphs see, with its registered derivative, gives what the eager node in C++ gives."""
    stack, x, gradient = make((40, 100, 64, 10)), torch.randn(1001, 40), torch.randn(1001, 10)
    first = run(stack, "native", x, gradient, torch.float32, autocast)
    equal(first, run(stack, "native", x, gradient, torch.float32, autocast))
    stack = stack.float()
    call = None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        call = stack.as_one_op(x)
    assert call is not None
    leaf = x.clone().requires_grad_()
    out, _, _ = forward_op(leaf, *call.lists, *call.options, True, call.dtype, True)
    out.backward(gradient.to(out.dtype))
    assert torch.equal(out, first["out"][0])
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, first["x"][0])
    weights = [p.grad for p in call.lists[0]]
    assert all(torch.equal(a, b) for a, b in zip(weights, first["weight"], strict=True) if a is not None)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("widths", [(9, 65, 40, 65, 7), (9, 65, 7), (65, 9, 65, 9)])
def test_without_gradients_the_values_are_the_same(widths: tuple[int, ...], train: bool) -> None:
    stack, x = make(widths, train=train).float(), torch.randn(210, widths[0])
    twin = copy.deepcopy(stack)
    kept = stack(x)
    assert kept.requires_grad
    with torch.no_grad():
        assert torch.equal(twin(x), kept)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(twin).train(train)(x), kept if not train else twin(x))


@pytest.mark.usefixtures("native")
class TestModule:
    def test_is_the_sequential(self) -> None:
        """Names, state over steps, and the count of batches, momentum and cumulative average."""
        for momentum in (0.1, None):
            stack = make((20, 33, 8), momentum=momentum).float()
            plain = nn.Sequential(*copy.deepcopy(stack))
            assert list(stack.state_dict()) == list(plain.state_dict())
            for _ in range(100):
                x = torch.randn(50, 20)
                stack(x), plain(x)
            for (name, a), b in zip(stack.state_dict().items(), plain.state_dict().values(), strict=True):
                torch.testing.assert_close(a, b, msg=name)
            assert int(stack[1].num_batches_tracked) == 100

    def test_copies_and_pickles(self) -> None:
        stack, x = make((20, 33, 8)).float().eval(), torch.randn(50, 20)
        for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack)), stack[:]):
            assert type(other) is PlainStack
            assert torch.equal(other(x), stack(x))

    @pytest.mark.parametrize("name", ["hook", "frozen norm", "one row", "fp64", "mixed", "grad transform"])
    def test_what_the_op_does_not_cover_the_modules_do(self, name: str) -> None:
        stack, rows = make((20, 33, 12, 8)).float(), torch.randn(50, 20)
        seen: list[int] = []
        if name == "hook":
            stack[1].register_forward_hook(lambda *_: seen.append(1))
        elif name == "frozen norm":
            stack[1].eval()
        elif name == "one row":
            with pytest.raises(ValueError, match="more than 1 value"):
                stack(rows[:1])
            return
        elif name == "fp64":
            stack, rows = stack.double(), rows.double()
        elif name == "mixed":
            stack[0].bias = None
        else:
            parameters = dict(stack.eval().named_parameters())
            value = torch.func.grad(lambda p: torch.func.functional_call(stack, p, (rows,)).sum())(parameters)
            assert set(value) == set(parameters)
            return
        assert stack.as_one_op(rows) is None
        expected = nn.Sequential(*copy.deepcopy(stack))(rows)
        assert torch.equal(stack(rows), expected)
        assert len(seen) == 2 * (name == "hook")

    def test_frozen_and_shared_parameters(self) -> None:
        for chosen in ("0.weight", "1.bias", "3.bias", "4.weight", "6.weight"):
            stack, x = make((20, 33, 33, 33, 8)).float(), torch.randn(70, 20)
            stack[6].weight = stack[3].weight
            grads = []
            for backend in ("native", "reference"):
                twin = copy.deepcopy(stack)
                for name, p in twin.named_parameters():
                    p.requires_grad_(name == chosen or name == "9.bias")
                with _backend.backend(backend):
                    (twin(x) * torch.linspace(-1, 1, 8)).sum().backward()
                grads.append([p.grad for p in twin.parameters()])
            for a, b in zip(*grads, strict=True):
                assert (a is None) == (b is None)
                if a is not None and b is not None:
                    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)

    def test_subclasses_and_symbolic_tracing_see_pytorchs_ops(self) -> None:
        class Own(Tensor):
            pass

        stack, x = make((20, 33, 8)).float().eval(), torch.randn(50, 20)
        assert stack.as_one_op(x) is not None
        assert stack.as_one_op(x.as_subclass(Own)) is None
        torch.testing.assert_close(stack(x.as_subclass(Own)).as_subclass(Tensor), stack(x))
        torch.testing.assert_close(torch.fx.symbolic_trace(stack)(x), stack(x))

    def test_wrong_width_is_pytorchs_error(self) -> None:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            make((20, 33, 8)).float()(torch.randn(5, 21))

    def test_gradients_of_gradients(self) -> None:
        found = []
        for backend in ("native", "reference"):
            torch.manual_seed(0)
            stack, x = make((5, 9, 3), "silu").float(), torch.randn(20, 5, requires_grad=True)
            with _backend.backend(backend):
                out = stack(x)
            (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), [x, *stack.parameters()], allow_unused=True))
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-3)

    @precisions
    def test_compiles_to_the_same(self, autocast: bool) -> None:
        stack, x = make((20, 33, 8)).float(), torch.randn(50, 20)
        twin = copy.deepcopy(stack)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, compiled = stack(x), torch.compile(twin, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(out, compiled)
        out.sum().backward(), compiled.sum().backward()
        for (name, a), b in zip(stack.named_parameters(), twin.parameters(), strict=True):
            assert a.grad is not None
            assert torch.equal(a.grad, b.grad), name
        for a, b in zip(stack.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b)

    def test_writes_to_running_statistics_are_counted(self) -> None:
        """Who remembers a tensor's version (autograd, a kept scorer) must see that it changed."""
        stack = make((20, 33, 8)).float()
        before = [b._version for b in stack.buffers()]
        stack(torch.randn(50, 20))
        assert all(b._version > old for b, old in zip(stack.buffers(), before, strict=True))


@pytest.mark.usefixtures("native")
class TestOp:
    @pytest.mark.parametrize("batch_stats", [True, False])
    def test_opcheck(self, batch_stats: bool) -> None:
        call = make((20, 33, 12, 8)).float().as_one_op(torch.randn(30, 20))
        assert call is not None
        options = ("gelu", 0.01, 1e-5, batch_stats, torch.float32, True)
        x = torch.randn(30, 20, requires_grad=True)
        torch.library.opcheck(forward_op, (x, *call.lists, *options))
        lists: Any = [[p.detach() for p in ps] for ps in call.lists]
        out, inner, statistics = forward_op(x.detach(), *lists, *options)
        needs = [[True, False, True], [False] * 3, [True] * 2]
        weights, _, gammas, betas, *_ = lists
        arguments = (torch.randn_like(out), x.detach(), weights, gammas, betas, inner, statistics, "gelu", 0.01)
        torch.library.opcheck(backward_op, (*arguments, batch_stats, torch.float32, True, *needs))

    def test_refuses_what_does_not_fit(self) -> None:
        call = make((20, 33, 12, 8)).float().as_one_op(torch.randn(30, 20))
        assert call is not None
        options = ("gelu", 0.01, 1e-5, True, torch.float32, False)
        with pytest.raises(ValueError, match=r"plain_stack: a weight must have shape \[out, 21\]"):
            forward_op(torch.randn(30, 21), *call.lists, *options)
        short = [call.lists[0], call.lists[1][:2], *call.lists[2:]]
        with pytest.raises(ValueError, match="plain_stack: biases has 2 tensors, expected 3"):
            forward_op(torch.randn(30, 20), *short, *options)


def test_the_reference_is_the_sequential() -> None:
    stack, x = make((20, 33, 12, 8)), torch.randn(30, 20, dtype=torch.float64)
    linears, norms = list(stack)[0::3], list(stack)[1::3]
    twin = copy.deepcopy(stack)
    out = reference.plain_stack(
        x,
        *([getattr(m, name) for m in linears] for name in ("weight", "bias")),
        *([getattr(m, name) for m in norms] for name in ("weight", "bias", "running_mean", "running_var")),
        activation="leaky_relu", negative_slope=0.1, eps=1e-5, momentum=[0.1] * 2, batch_stats=[True] * 2,
    )  # fmt: skip
    assert torch.equal(out, nn.Sequential(*twin)(x))
    assert torch.equal(stack[1].running_var, twin[1].running_var)
