"""Residual stacks on the GPU: the error bound in every dtype, drift over 100 layers, repetition, graphs, compiler."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stack_errors import assert_within_bound, errors, make, step
from torch import nn

import rvae_fast
from rvae_fast import ResidualStack
from rvae_fast._activations import ACTIVATIONS

ORDERS = ("pre", "post")
#: What TF32 products may be off by, whatever PyTorch's are: Triton's cut the last 13 bits off, which in a stack of two
#: units makes 1.4e-3 (emulated), three times what rounding makes; and which of cuBLAS's kernels round, or use fp32
#: for a small or oddly aligned matrix, is its own affair.
TF32 = 4 * 2.0**-10


def sizes(device: torch.device, *small: tuple[int, int]) -> list[tuple[int, int]]:
    """(width, batch): on the GPU those that have several tiles of every kind as well."""
    return [*small] if device.type == "cpu" else [*small, (31, 1001), (100, 4097), (257, 999), (512, 2048), (1000, 301)]


@pytest.mark.parametrize("order", ORDERS)
def test_fp32(order: str, triton: torch.device) -> None:
    for width, batch in sizes(triton, (1, 37), (65, 51)):
        module = make(width, 2, order=order, activation="silu").to(triton)
        # Of one column the gradient all but cancels in the norms: which of two roundings is nearer there is chance.
        least = 0.02 if width == 1 else 0.0
        assert_within_bound(module, (1 + 2 * torch.randn(batch, width, device=triton)).requires_grad_(), least=least)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(half: torch.dtype, order: str, triton: torch.device) -> None:
    if triton.type == "cpu" and half == torch.bfloat16:
        pytest.skip("the interpreter does not round bf16")
    for width, batch in sizes(triton, (33, 40)):
        module = make(width, 2, order=order).to(triton)
        assert_within_bound(module, torch.randn(batch, width, device=triton).requires_grad_(), autocast=half)


def test_a_hundred_layers_do_not_drift(triton: torch.device) -> None:
    """Ours against fp64 as PyTorch's fp32 against fp64, output and state, after 100 layers."""
    layers, width, batch = (100, 128, 1024) if triton.type == "cuda" else (10, 16, 48)
    module = make(width, layers // 2, zero_init=False).to(triton)
    assert_within_bound(module, torch.randn(batch, width, device=triton).requires_grad_())


def test_running_statistics_over_many_steps(triton: torch.device) -> None:
    width, steps = (256, 100) if triton.type == "cuda" else (12, 5)
    one = make(width, 2).to(triton)
    two = copy.deepcopy(one)
    with torch.no_grad():
        for i in range(steps):
            x = torch.randn(301 if triton.type == "cuda" else 31, width, device=triton) * (1 + 0.1 * i) + i
            one(x)
            with rvae_fast.backend("reference"):
                two(x)
    for (name, a), b in zip(one.named_buffers(), two.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_repeats_bit_for_bit(triton: torch.device) -> None:
    width, batch = (512, 3001) if triton.type == "cuda" else (20, 41)
    module = make(width, 2).to(triton)
    x = torch.randn(batch, width, device=triton).requires_grad_()
    up = torch.randn(batch, width, device=triton)
    one, two = (step(module, x, up, "triton") for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("order", ORDERS)
def test_models_in_a_half_dtype(order: str, dtype: torch.dtype, triton: torch.device) -> None:
    """Parameters, rows and state in bf16 or fp16, without autocast."""
    for width, batch in sizes(triton, (33, 40)):
        module = make(width, 2, order=order, activation="silu")
        x = torch.randn(batch, width, device=triton).requires_grad_()
        assert_within_bound(module.to(triton), x, dtype=dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_in_evaluation_and_training(activation: str, order: str, triton: torch.device) -> None:
    if triton.type == "cpu" and activation not in ("gelu", "tanh"):
        pytest.skip("tests/kernels/interpreted has the others")
    width, batch = (100, 1001) if triton.type == "cuda" else (9, 17)
    module = make(width, 2, order=order, activation=activation).to(triton)
    for training in (True, False):
        x = torch.randn(batch, width, device=triton).requires_grad_()
        assert_within_bound(module.train(training), x)


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None}, {"layers": 3}]
)
def test_options(options: dict[str, Any], triton: torch.device) -> None:
    width, batch = (65, 301) if triton.type == "cuda" else (9, 17)
    for order in ORDERS:
        module = make(width, 2, order=order, activation="elu", **options).to(triton)
        assert_within_bound(module, torch.randn(batch, width, device=triton).requires_grad_())


@pytest.mark.parametrize("frozen", ["norms", "linears", "1.linears.0", ".bias", ""])
def test_frozen_parameters(frozen: str, triton: torch.device) -> None:
    width, batch = (100, 301) if triton.type == "cuda" else (9, 17)
    for needs in (True, False):
        module = make(width, 2, activation="silu").to(triton)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(frozen not in name)
        assert_within_bound(module, torch.randn(batch, width, device=triton).requires_grad_(needs))


def test_layouts(triton: torch.device) -> None:
    width, batch = (64, 301) if triton.type == "cuda" else (8, 17)
    module = make(width, 2, activation="silu").to(triton)
    assert_within_bound(module, torch.randn(width, batch, device=triton).t().requires_grad_())
    odd = torch.randn(1 + batch * width, device=triton)[1:].view(batch, width)  # between multiples of 16 bytes
    assert_within_bound(module, odd.requires_grad_())
    assert module.eval()(odd[:0]).shape == (0, width)
    assert module(odd[:1]).shape == (1, width)


# --- CUDA itself ---


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("order", ORDERS)
def test_tf32(order: str, cuda: torch.device, triton: torch.device) -> None:
    """Both sides with TF32 products; and they are used: IEEE's error would be far smaller."""
    for width, batch in ((65, 51), (512, 2048)):
        module = make(width, 2, order=order, activation="silu").to(cuda)
        assert_within_bound(module, torch.randn(batch, width, device=cuda).requires_grad_(), least=TF32)
    x = torch.randn(2048, 512, device=cuda)
    with torch.no_grad():
        coarse = module.eval()(x)
        torch.backends.cuda.matmul.allow_tf32 = False
        assert (module(x) - coarse).abs().max() > 1e-5 * coarse.abs().max()


@pytest.mark.parametrize("strategy", ["fused", "two-pass", "plain"])
def test_every_strategy(
    strategy: str, cuda: torch.device, triton: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rvae_fast.kernels import configurations

    assert strategy in configurations.STRATEGIES
    assert set(configurations.STRATEGIES) == {"fused", "two-pass", "plain", "hopper"}
    monkeypatch.setattr(configurations, "strategy", lambda *_: strategy)
    for order in ORDERS:
        module = make(257, 2, order=order, activation="silu").to(cuda)
        assert_within_bound(module, torch.randn(999, 257, device=cuda).requires_grad_())
        assert_within_bound(module.eval(), torch.randn(999, 257, device=cuda).requires_grad_())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
@pytest.mark.parametrize(("batch", "width"), [(37, 128), (999, 256), (5000, 512), (4096, 384)])
def test_layers_in_cuda(
    batch: int, width: int, activation: str, training: bool, cuda: torch.device, triton: torch.device, monkeypatch: Any
) -> None:
    """The CUDA C++ kernels for Hopper, no further from fp64 than cuBLAS with this package's passes."""
    from rvae_fast.kernels import configurations, residual_stack

    module = make(width, 2, activation=activation).to(cuda).train(training)
    x, up = (torch.randn(batch, width, device=cuda, dtype=torch.bfloat16) for _ in range(2))
    options = residual_stack.StackOptions(2, "pre", activation, 0.01, training, torch.bfloat16)
    reason = residual_stack.hopper_why_not(options, x)
    if torch.cuda.get_device_capability(cuda)[0] != 9:
        pytest.skip("needs a Hopper GPU")
    assert reason is None, reason

    def run(strategy: str) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(configurations, "strategy", lambda *_: strategy)
        net, rows = copy.deepcopy(module), x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            out = net(rows)
        out.backward(up)
        return results(net, rows, out)

    def results(net: nn.Module, rows: torch.Tensor, out: torch.Tensor) -> dict[str, torch.Tensor]:
        grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        state = {name: b for name, b in net.named_buffers() if b.is_floating_point()}
        return {"out": out.detach(), "x": rows.grad, **grads, **state}  # type: ignore[dict-item]

    wide, rows = copy.deepcopy(module).double(), x.double().requires_grad_()
    with rvae_fast.backend("reference"):
        out = wide(rows)
    out.backward(up.double())
    exact = errors(results(wide, rows, out), results(wide, rows, out))
    ours, theirs = (errors(run(s), results(wide, rows, out)) for s in ("hopper", "plain"))
    assert ours.keys() == exact.keys()
    for name, error in ours.items():
        assert error <= 1.5 * theirs[name] + 1e-3, (name, error, theirs[name])


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("arithmetic", ["ieee", "tf32", "half"])
def test_every_tile(
    arithmetic: str, number: int, triton: torch.device, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each configuration that can be chosen on this chip, by value and not only by compilation."""
    from rvae_fast.kernels import configurations

    assert max(len(c) for c in configurations._CANDIDATES.values()) == 3, "another number of parameters, please"
    cuda = request.getfixturevalue("cuda")
    if arithmetic == "tf32":
        request.getfixturevalue("tf32")
    capability, shared, _ = configurations.device_facts(cuda)

    def choose(kernel: str, arithmetic: str, *_: Any) -> Any:
        among = configurations.candidates(kernel, arithmetic, capability, shared)
        return among[min(number, len(among) - 1)]._replace(splits=1 + 2 * (kernel == "weight"))

    counts = [len(configurations.candidates(k, arithmetic, capability, shared)) for k in configurations.KERNELS]
    if number >= max(counts):
        pytest.skip(f"{arithmetic} products have {max(counts)} configurations")
    monkeypatch.setattr(configurations, "choose", choose)
    monkeypatch.setattr(configurations, "policy", lambda *_: ("test", arithmetic, number))
    # Of this width they would otherwise be cuBLAS's.
    monkeypatch.setattr(configurations, "strategy", lambda *_: "fused")
    module = make(257, 1, activation="silu").to(cuda)
    assert_within_bound(
        module, torch.randn(999, 257, device=cuda).requires_grad_(),
        autocast=torch.bfloat16 if arithmetic == "half" else None, least=TF32 if arithmetic == "tf32" else 0.0,
    )  # fmt: skip


def test_tuning_changes_no_state(cuda: torch.device, triton: torch.device, tmp_path, monkeypatch) -> None:
    from rvae_fast.kernels import tile_table

    monkeypatch.setenv(tile_table.FOLDER_VARIABLE, str(tmp_path))
    tile_table.forget()
    module, x = make(96, 2, activation="silu").to(cuda), torch.randn(513, 96, device=cuda).requires_grad_()
    with tile_table.tiles("tune"):
        assert_within_bound(module, x)
    assert tile_table.read(tile_table.measured_path(tile_table.chip_of(cuda)))
    tile_table.forget()


def test_on_another_stream(cuda: torch.device, triton: torch.device) -> None:
    """The kernels run on the current stream: behind a long kernel there, they see what it wrote."""
    module = make(128, 2).to(cuda)
    x, up = torch.randn(512, 128, device=cuda), torch.randn(512, 128, device=cuda)
    expected = step(module, x, up, "triton")
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        result = step(module, late, up, "triton")
    torch.cuda.synchronize()
    assert all(torch.equal(value, result[name]) for name, value in expected.items())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_current(triton: torch.device) -> None:
    module, x = make(64, 2).to("cuda:1"), torch.randn(65, 64, device="cuda:1").requires_grad_()
    with torch.cuda.device(0):
        assert_within_bound(module, x)


def test_op_and_second_derivatives(cuda: torch.device, triton: torch.device) -> None:
    stack = make(33, 2, activation="gelu").to(cuda)
    norms, linears = [n for b in stack for n in b.norms], [m for b in stack for m in b.linears]
    lists = [[getattr(m, name) for m in ms] for ms in (linears, norms) for name in ("weight", "bias")]
    state = [[n.running_mean for n in norms], [n.running_var for n in norms]]
    x = torch.randn(20, 33, device=cuda, requires_grad=True)
    tail = (2, "pre", "gelu", 0.01, 1e-5, True, torch.float32, True)
    torch.library.opcheck(torch.ops.rvae_fast.residual_stack.default, (x, *lists, *state, *tail))
    seconds = []
    for backend, net in (("triton", stack), ("reference", stack), ("reference", copy.deepcopy(stack).double())):
        rows = x.detach().to(next(net.parameters()).dtype).requires_grad_()
        with rvae_fast.backend(backend):
            (first,) = torch.autograd.grad(net(rows).square().sum(), rows, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), [rows, *net.parameters()], allow_unused=True))
    # Second derivatives are some thousand times the first, whose rounding they carry along: judged against the largest.
    scale = max(float(exact.abs().max()) for exact in seconds[2] if exact is not None)
    for ours, theirs, exact in zip(*seconds, strict=True):
        if exact is not None:
            bound = 4 * float((theirs.double() - exact).abs().max()) + 1e-5 * scale
            assert float((ours.double() - exact).abs().max()) <= bound


def test_gradients_of_many_outputs_at_once(triton: torch.device) -> None:
    module, x = make(33, 2, layers=1).to(triton), torch.randn(9, 33, device=triton, requires_grad=True)
    out, sources = module(x).sum(0)[:4], [x, *module.parameters()]
    unit = torch.eye(len(out), device=triton)
    together = torch.autograd.grad(out, sources, unit, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(out, sources, row, retain_graph=True) for row in unit]
    for found, *expected in zip(together, *alone, strict=True):
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-4)


def test_what_is_not_covered_runs_or_raises(cuda: torch.device) -> None:
    stack, x = ResidualStack(16, 2).to(cuda).double(), torch.randn(20, 16, device=cuda, dtype=torch.float64)
    assert stack(x).dtype == torch.float64  # "auto": the reference
    with rvae_fast.backend("triton"), pytest.raises(RuntimeError, match="does not cover"):
        stack(x)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_by_value(training: bool, cuda: torch.device) -> None:
    torch.compiler.reset()
    module = make(65, 2).to(cuda).train(training)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True)
    for batch in (33, 64):
        x = torch.randn(batch, 65, device=cuda)
        a, b = module(x), compiled(x)
        torch.testing.assert_close(b, a)
        for g, h in zip(
            torch.autograd.grad(a.square().sum(), list(module.parameters())),
            torch.autograd.grad(b.square().sum(), list(twin.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(h, g)
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, a)


def test_what_is_kept_for_the_backward(cuda: torch.device, triton: torch.device) -> None:
    """One [batch, width] tensor a layer in the products' dtype, half of it in fp32 streams; eager keeps three."""
    module, batch = ResidualStack(512, 10).to(cuda), 8192
    x = torch.randn(batch, 512, device=cuda)

    def kept(backend: str) -> int:
        with rvae_fast.backend(backend), torch.autocast("cuda", torch.bfloat16):
            module(x)  # caches and workspaces
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            out = module(x)
            return torch.cuda.memory_allocated() - before - out.numel() * out.element_size()

    ours, theirs = kept("triton"), kept("reference")
    assert ours <= 0.55 * theirs, (ours, theirs)
    assert ours <= 1.1 * 20 * batch * 512 * 4
