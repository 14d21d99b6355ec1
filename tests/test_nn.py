"""ResidualBlock against the same block written by hand with nn.BatchNorm1d and nn.Linear."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rvae_fast import _backend
from rvae_fast._activations import ACTIVATIONS
from rvae_fast.nn import ResidualBlock, ResidualStack, Transition
from rvae_fast.ops.residual_stack import HAS_BF16_PRODUCTS

MODULES = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "elu": nn.ELU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "tanh": nn.Tanh(),
}


class HandWritten(nn.Module):
    """What a user would write: the drop-in's oracle."""

    def __init__(self, features, layers=2, order="pre", activation="leaky_relu", bias=True, **norm):
        super().__init__()
        self.order = order
        self.act = MODULES[activation]
        self.norms = nn.ModuleList([nn.BatchNorm1d(features, **norm) for _ in range(layers)])
        self.linears = nn.ModuleList([nn.Linear(features, features, bias=bias) for _ in range(layers)])

    def forward(self, x):
        h = x
        for i, (norm, linear) in enumerate(zip(self.norms, self.linears, strict=True)):
            if self.order == "pre":
                h = linear(self.act(norm(h)))
            else:
                h = norm(linear(self.act(h) if i else h))
        return x + h if self.order == "pre" else self.act(x + h)


def pair(features, *, dtype=torch.float64, **options):
    """A block and the hand-written one with the same, non-trivial, state (loaded through the state dict)."""
    block = ResidualBlock(features, negative_slope=0.2, **options).to(dtype)
    hand = HandWritten(features, **options).to(dtype)
    with torch.no_grad():
        for parameter in hand.parameters():
            parameter.uniform_(-0.7, 0.9)
        for norm in hand.norms:
            if norm.track_running_stats:
                norm.running_mean.uniform_(-1, 1)
                norm.running_var.uniform_(0.5, 2)
    missing = block.load_state_dict(hand.state_dict())
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    return block, hand


def assert_same(block, hand, x):
    """Outputs, input and parameter gradients, and buffers agree after one forward and backward."""
    xs = [x.clone().requires_grad_() for _ in range(2)]
    weight = torch.randn_like(x)
    for module, inp in zip((block, hand), xs, strict=True):
        module.zero_grad()
        (module(inp) * weight).sum().backward()
    torch.testing.assert_close(block(x), hand(x))
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    for (name, a), (_, b) in zip(block.named_parameters(), hand.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, name=name: f"{name}: {m}")
    for (name, a), (_, b) in zip(block.named_buffers(), hand.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_order(order, activation):
    block, hand = pair(31, order=order, activation=activation)
    assert_same(block, hand, torch.randn(17, 31, dtype=torch.float64))
    block.eval(), hand.eval()
    assert_same(block, hand, torch.randn(17, 31, dtype=torch.float64))


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize(
    "options",
    [
        {"layers": 1},
        {"layers": 3},
        {"momentum": None},
        {"momentum": 0.0},
        {"affine": False},
        {"track_running_stats": False},
        {"bias": False},
        {"eps": 1e-2},
    ],
    ids=str,
)
def test_every_option(order, options):
    block, hand = pair(13, order=order, **options)
    for _ in range(3):
        assert_same(block, hand, torch.randn(8, 13, dtype=torch.float64))
    block.eval(), hand.eval()
    # without running statistics, eval normalises by the batch, as nn.BatchNorm1d does: one row would not do
    assert_same(block, hand, torch.randn(2, 13, dtype=torch.float64))


@pytest.mark.parametrize("features", [1, 65, 100, 257])
@pytest.mark.parametrize("batch", [2, 3, 33])
def test_odd_shapes(features, batch):
    block, hand = pair(features)
    assert_same(block, hand, torch.randn(batch, features, dtype=torch.float64))


@pytest.mark.parametrize("order", ["pre", "post"])
def test_running_statistics_over_100_steps(order):
    block, hand = pair(9, order=order)
    for _ in range(100):
        x = torch.randn(16, 9, dtype=torch.float64) * 3 + 1
        block(x), hand(x)
    for a, b in zip(block.buffers(), hand.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert block.norms[0].num_batches_tracked.item() == 100


def test_state_dict_goes_back():
    block, hand = pair(7)
    with torch.no_grad():
        block.linears[0].weight.add_(1.0)
    hand.load_state_dict(block.state_dict())
    assert_same(block, hand, torch.randn(5, 7, dtype=torch.float64))


def test_frozen_norms_inside_a_training_block():
    block, hand = pair(7)
    for module in (block, hand):
        module.norms[0].eval()
    before = block.norms[0].running_mean.clone()
    assert_same(block, hand, torch.randn(5, 7, dtype=torch.float64))
    assert torch.equal(before, block.norms[0].running_mean)


def test_frozen_parameters_and_non_contiguous_input():
    block, hand = pair(6)
    for module in (block, hand):
        module.linears[0].weight.requires_grad_(False)
    x = torch.randn(6, 10, dtype=torch.float64).t()
    assert not x.is_contiguous()
    torch.testing.assert_close(block(x), hand(x))
    block(x).sum().backward()
    assert block.linears[0].weight.grad is None
    assert block.linears[1].weight.grad is not None


def test_one_training_row_is_a_value_error_and_one_row_scores():
    block = ResidualBlock(4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 4))
    assert block.eval()(torch.randn(1, 4)).shape == (1, 4)
    assert block(torch.randn(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_autocast_keeps_fp32_statistics(order):
    block, hand = pair(33, dtype=torch.float32, order=order)
    x = torch.randn(64, 33) * 2 + 5
    exact = copy.deepcopy(hand).double()
    right = exact(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = block(x), hand(x)

    def error(got, expected):
        return ((got.double() - expected).square().mean() / expected.square().mean()).sqrt().item()

    # The bound of every kernel: at most twice PyTorch's own error in the same dtype, plus 1e-6.
    assert error(ours, right) <= 2 * error(eager, right) + 1e-6
    for norm, other, true in zip(block.norms, hand.norms, exact.norms, strict=True):
        assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
        for name in ("running_mean", "running_var"):
            expected = getattr(true, name)
            assert error(getattr(norm, name), expected) <= 2 * error(getattr(other, name), expected) + 1e-6, name


@pytest.mark.parametrize("order", ["pre", "post"])
def test_zero_init_starts_as_the_identity(order):
    x = torch.randn(12, 10)
    stack = ResidualStack(10, 20, order=order, activation="relu", zero_init=True)
    expected = x if order == "pre" else x.relu()
    assert torch.equal(stack(x), expected)
    stack(x).square().sum().backward()
    last = stack[0].linears[-1].weight if order == "pre" else stack[0].norms[-1].weight
    assert last.grad.abs().max() > 0, "the zeroed parameters must be able to leave zero"


def test_dropout_is_on_the_branch_and_only_while_training():
    torch.manual_seed(0)
    block = ResidualBlock(50, dropout=0.5)
    x = torch.randn(200, 50)
    branch = block(x) - x
    assert 0.4 < (branch == 0).float().mean() < 0.6
    block.eval()
    assert torch.equal(block(x), block(x))
    assert ((block(x) - x) == 0).float().mean() < 0.01


@pytest.mark.parametrize("order", ["pre", "post"])
def test_gradcheck(order):
    stack = ResidualStack(3, 2, order=order, activation="tanh").double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stack, x)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_compile_agrees_by_value(order):
    block, hand = pair(16, dtype=torch.float32, order=order)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(32, 16)
    y, z = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = compiled(y)
    out.square().sum().backward()
    ref = hand(z)
    ref.square().sum().backward()
    torch.testing.assert_close(out, ref)
    torch.testing.assert_close(y.grad, z.grad)
    for a, b in zip(block.buffers(), hand.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_export_with_a_dynamic_batch():
    stack = ResidualStack(8, 2).eval()
    program = torch.export.export(stack, (torch.randn(4, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(11, 8)
    torch.testing.assert_close(program.module()(x), stack(x))


def test_copies_and_pickles():
    stack = ResidualStack(5, 2, order="post", momentum=None)
    stack(torch.randn(6, 5))
    x = torch.randn(3, 5)
    expected = stack.eval()(x)
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert torch.equal(other(x), expected)


def test_device_and_dtype():
    block = ResidualBlock(4, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in block.parameters()} == {"meta"}
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in ResidualBlock(4, dtype=torch.float64).buffers()} == {torch.float64, torch.int64}


def test_transition_is_a_linear_layer_that_names_a_bad_input():
    layer = Transition(6, 4)
    x = torch.randn(3, 6)
    assert isinstance(layer, nn.Linear)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    with pytest.raises(ValueError, match=r"input must have shape \[batch, 6\], got \[3, 5\]"):
        layer(torch.randn(3, 5))


@pytest.mark.skipif(not HAS_BF16_PRODUCTS, reason="this CPU has no bf16 products")
@pytest.mark.parametrize(
    ("widths", "rows"), [((31, 65), 37), ((257, 100), 1000), ((100, 257), 2), ((1, 3), 5), ((5, 1), 33)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_transition_in_bf16_is_as_exact_as_pytorch(widths: tuple[int, int], rows: int, bias: bool):
    torch.manual_seed(0)
    layer = Transition(*widths, bias=bias)
    x = torch.randn(rows, widths[0]).bfloat16().float().requires_grad_()
    gradient = torch.randn(rows, widths[1]).bfloat16()

    def run(backend: str):
        with _backend.backend(backend), torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        return out, *torch.autograd.grad(out, (x, *layer.parameters()), gradient)

    weight, rows64, grad64 = layer.weight.detach().double(), x.detach().double(), gradient.double()
    exact = [rows64 @ weight.T, grad64 @ weight, grad64.T @ rows64]
    if bias:
        exact[0] = exact[0] + layer.bias.detach().double()
        exact.append(grad64.sum(0))
    ours, theirs = run("native"), run("reference")
    assert "Stack" in ours[0].grad_fn.name()  # one node of our own, not PyTorch's addmm
    for right, a, b in zip(exact, ours, theirs, strict=True):
        error = [(t.double() - right).square().mean().sqrt() for t in (a, b)]
        assert error[0] <= 2 * error[1] + 1e-6 * right.square().mean().sqrt()


def test_stack_of_none_is_the_identity():
    x = torch.randn(3, 4)
    assert torch.equal(ResidualStack(4, 0)(x), x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": 0}, ValueError, "features must be at least 1, got 0"),
        ({"features": 2.5}, TypeError, "features must be an integer"),
        ({"layers": 0}, ValueError, "layers must be at least 1"),
        ({"layers": True}, TypeError, "layers must be an integer"),
        ({"order": "mid"}, ValueError, "order must be 'pre' or 'post', got 'mid'"),
        ({"activation": "swish"}, ValueError, "activation must be one of .*got 'swish'"),
        ({"negative_slope": float("nan")}, ValueError, "negative_slope must be a finite number"),
        ({"eps": 0.0}, ValueError, "eps must be above 0"),
        ({"momentum": 1.5}, ValueError, "momentum must be None or in"),
        ({"dropout": 1.0}, ValueError, "dropout must be in"),
        ({"order": "post", "zero_init": True, "affine": False}, ValueError, "zero_init .* needs affine=True"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ResidualBlock(**{"features": 4, **arguments})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0] * 4], TypeError, "input must be a torch.Tensor"),
        (torch.randn(3, 5), ValueError, r"input must have shape \[batch, 4\], got \[3, 5\]"),
        (torch.randn(4), ValueError, r"input must have shape \[batch, 4\], got \[4\]"),
        (torch.randn(2, 4, 3), ValueError, r"input must have shape \[batch, 4\]"),
        (torch.ones(3, 4, dtype=torch.int64), TypeError, "input must have a floating-point dtype, got torch.int64"),
    ],
)
def test_bad_input_is_named(x, error, message):
    with pytest.raises(error, match=message):
        ResidualBlock(4)(x)
    with pytest.raises(error, match=message):
        ResidualStack(4, 1)(x)
