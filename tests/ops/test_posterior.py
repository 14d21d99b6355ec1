"""The posterior's kernel, forward and backward, against fp64; what it covers, and what is left to plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rvae_fast import _backend, reference
from rvae_fast.models import VAE
from rvae_fast.ops import posterior
from rvae_fast.ops.posterior import sample_posterior

pytestmark = pytest.mark.usefixtures("native")
op = torch.ops.rvae_fast.posterior_train.default
EPS = torch.finfo(torch.float32).eps
LOW, HIGH = -20.0, 10.0
DTYPES = [torch.float32, torch.bfloat16]
#: Latent widths on both sides of every vector width; one row, one column; enough rows for two threads.
SHAPES = [(1, 1), (1, 16), (3, 5), (2, 17), (7, 10), (33, 37), (4000, 10)]
EXTREMES = [1e4, -1e4, 1e30, -1e30, float("inf"), -float("inf"), 10.0, -20.0, 0.0, 4.5e-5, 88.0, -88.0]


def inputs(batch: int, latent: int, dtype: torch.dtype = torch.float32, spread: float = 12.0) -> tuple[Tensor, Tensor]:
    """A code whose raw log variances reach past both bounds, and noise."""
    g = torch.Generator().manual_seed(batch * 100 + latent)
    mu, raw, noise = torch.randn(3, batch, latent, generator=g)
    return torch.cat((mu, spread * raw - 3), 1).to(dtype), noise.clone()


def expected(code: Tensor, noise: Tensor, low: float = LOW, high: float = HIGH) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, log variance and sample by the reference, in the code's dtype."""
    mu, logvar = reference.posterior(code, low, high)
    return mu, logvar, mu + torch.exp(0.5 * logvar) * noise.to(mu.dtype)


def gradient(run: Callable[..., Any], code: Tensor, noise: Tensor, incoming: list[Tensor | None]) -> Tensor:
    """Of the code, from the gradients of mu, logvar and z, where there is one."""
    leaf = code.detach().requires_grad_()
    pairs = [(out, g) for out, g in zip(run(leaf, noise, LOW, HIGH), incoming, strict=True) if g is not None]
    (found,) = torch.autograd.grad([out for out, _ in pairs], [leaf], [g.to(out.dtype) for out, g in pairs])
    return found


@pytest.mark.parametrize("bounds", [(LOW, HIGH), (-1.0, 1.0), (-0.5, 30.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_against_fp64(shape: tuple[int, int], dtype: torch.dtype, bounds: tuple[float, float]) -> None:
    code, noise = inputs(*shape, dtype)
    got = op(code, noise, *bounds)
    exact = expected(code.double(), noise.double(), *bounds)
    assert [t.dtype for t in got] == [torch.float32] * 3
    assert torch.equal(got[0].double(), exact[0])
    # Some units in the last place of what is added up, where the sum itself comes out near zero.
    assert ((got[1] - exact[1]).abs() <= 4 * EPS * exact[1].abs().clamp(min=1)).all()
    sample = (exact[2] - exact[0]).abs()
    assert ((got[2] - exact[2]).abs() <= 4 * EPS * (exact[0].abs() + sample * (1 + exact[1].abs()))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_against_fp64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    code, noise = inputs(*shape, dtype)
    incoming = [*torch.randn(3, *shape, generator=torch.Generator().manual_seed(7))]
    got = gradient(op, code, noise, incoming)
    exact = gradient(expected, code.double(), noise.double(), incoming)
    # The terms without their signs: what the rounding of a sum is in proportion to.
    magnitude = gradient(expected, code.double(), noise.double().abs(), [g.abs() for g in incoming])
    assert got.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0.0
    # A slope is an exponential of a distance of up to about 40, whose rounding it multiplies.
    assert ((got - exact).abs() <= rounding * exact.abs() + 64 * EPS * magnitude).all()


def test_no_worse_than_pytorch() -> None:
    """Errors of at most twice PyTorch's own in fp32: the contract of every kernel; in fact they are smaller."""
    code, noise = inputs(500, 20)
    exact, own = expected(code.double(), noise.double()), expected(code, noise)
    for got, right, plain in zip(op(code, noise, LOW, HIGH), exact, own, strict=True):
        assert (got - right).abs().max() <= 2 * (plain - right).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(dtype: torch.dtype) -> None:
    raw = torch.tensor([EXTREMES, EXTREMES[::-1]])
    mu = torch.tensor([1e4, -1e4, 1e30] * 4).expand(2, -1)
    code, noise = torch.cat((mu, raw), 1).to(dtype), torch.linspace(-5, 5, raw.numel()).view(raw.shape)
    got = op(code, noise, LOW, HIGH)
    assert torch.equal(got[0], code[:, : raw.shape[1]].float())
    assert all(t.isfinite().all() for t in got)
    assert got[1].min() == LOW
    assert got[1].max() == HIGH
    finite = code.double().nan_to_num(posinf=1e30, neginf=-1e30)  # infinite raw values have the limits of large ones
    exact = expected(finite, noise.double())
    torch.testing.assert_close(got[1].double(), exact[1], rtol=4 * EPS, atol=4 * EPS)
    torch.testing.assert_close(got[2].double(), exact[2], rtol=100 * EPS, atol=0)
    ones: list[Tensor | None] = [torch.ones_like(noise)] * 3
    found, right = gradient(op, code, noise, ones), gradient(expected, finite, noise.double(), ones)
    torch.testing.assert_close(found.double(), right, rtol=max(64 * EPS, torch.finfo(dtype).eps), atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_place(dtype: torch.dtype) -> None:
    for column in (0, 17, 20, 36):  # a mean or a raw value, in a whole vector and in a partial one
        code, noise = inputs(3, 20, dtype, spread=1.0)
        ones: list[Tensor | None] = [torch.ones(3, 20)] * 3
        clean, clean_gradient = op(code, noise, LOW, HIGH), gradient(op, code, noise, ones)
        code[1, column] = float("nan")
        place = [[1, column % 20]]
        got = op(code, noise, LOW, HIGH)
        assert got[2].isnan().nonzero().tolist() == place
        assert [t.isnan().nonzero().tolist() for t in got[:2]] == ([place, []] if column < 20 else [[], place])
        for a, b in zip(got, clean, strict=True):
            assert torch.equal(a[~a.isnan()], b[~a.isnan()])
        found = gradient(op, code, noise, ones)
        assert found.isnan().nonzero().tolist() == ([] if column < 20 else [[1, column]])
        assert torch.equal(found[~found.isnan()], clean_gradient[~found.isnan()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype) -> None:
    """Rows apart, columns apart, every second column, an expanded gradient: the bits of contiguous tensors."""
    code, noise = inputs(9, 11, dtype)
    incoming: list[Tensor | None] = [torch.full((9, 11), value) for value in (0.5, -1.0, 2.0)]
    values, slopes = op(code, noise, LOW, HIGH), gradient(op, code, noise, incoming)
    wide = torch.zeros(9, 40, dtype=dtype)
    wide[:, 5:27] = code
    spaced = torch.zeros(9, 44, dtype=dtype)
    spaced[:, ::2] = code
    incoming = [torch.tensor(value).expand(9, 11) for value in (0.5, -1.0, 2.0)]
    for laid in (wide[:, 5:27], code.t().contiguous().t(), spaced[:, ::2]):
        assert not laid.is_contiguous()
        for numbers in (noise, noise.t().contiguous().t()):
            assert all(torch.equal(a, b) for a, b in zip(op(laid, numbers, LOW, HIGH), values, strict=True))
            assert torch.equal(gradient(op, laid, numbers, incoming), slopes)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_gradients_of_some_results(which: tuple[int, ...]) -> None:
    code, noise = inputs(5, 6)
    incoming = [torch.rand(5, 6) if i in which else None for i in range(3)]
    exact = gradient(expected, code.double(), noise.double(), incoming)
    torch.testing.assert_close(gradient(op, code, noise, incoming).double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_gradients(dtype: torch.dtype) -> None:
    code, noise = inputs(4, 3, dtype, spread=3.0)
    weights = torch.rand(3, 4, 3)

    def twice(run: Callable[..., Any], code: Tensor, noise: Tensor) -> list[Tensor]:
        leaf = code.detach().requires_grad_()
        total = sum((w * out.square()).sum() for w, out in zip(weights, run(leaf, noise, LOW, HIGH), strict=True))
        (first,) = torch.autograd.grad(total, leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        return [first.detach().double(), second.double()]

    bound = 1e-4 if dtype == torch.float32 else 2e-2
    for got, right in zip(twice(op, code, noise), twice(expected, code.double(), noise.double()), strict=True):
        torch.testing.assert_close(got, right, rtol=bound, atol=bound * float(right.abs().max()))


def test_without_gradients() -> None:
    code, noise = inputs(5, 6)
    values = op(code.requires_grad_(), noise, LOW, HIGH)
    assert all(t.requires_grad for t in values)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = op(code, noise, LOW, HIGH)
        assert not any(t.requires_grad for t in got)
        assert all(torch.equal(a, b) for a, b in zip(got, values, strict=True))
    assert [list(t.shape) for t in op(torch.empty(0, 6), torch.empty(0, 3), LOW, HIGH)] == [[0, 3]] * 3


def test_repeats_bit_for_bit_at_any_number_of_threads() -> None:
    code, noise = inputs(5000, 13)
    incoming = [*torch.randn(3, 5000, 13)]
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append([*op(code, noise, LOW, HIGH), gradient(op, code, noise, incoming)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_the_sample_is_drawn_as_before() -> None:
    code, _ = inputs(20, 3)
    torch.manual_seed(5)
    mu, logvar, z = sample_posterior(code, LOW, HIGH)
    after = torch.rand(())
    torch.manual_seed(5)
    torch.testing.assert_close(z, mu + torch.exp(0.5 * logvar) * torch.randn_like(code.chunk(2, 1)[0]))
    assert torch.equal(torch.rand(()), after)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "code must be float32 or bfloat16, got Double", (torch.zeros(2, 6).double(), torch.zeros(2, 3))),
        (ValueError, r"code must have shape \[batch, 2 \* latent\]", (torch.zeros(2, 5), torch.zeros(2, 2))),
        (ValueError, r"code must have shape .* got \[2, 0\]", (torch.zeros(2, 0), torch.zeros(2, 0))),
        (TypeError, "noise must be float32, got Double", (torch.zeros(2, 6), torch.zeros(2, 3).double())),
        (ValueError, r"noise must have shape \[2, 3\], got \[3, 3\]", (torch.zeros(2, 6), torch.zeros(3, 3))),
        (ValueError, "noise must not require a gradient", (torch.zeros(2, 6), torch.zeros(2, 3, requires_grad=True))),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(error, match=message):
        op(*arguments, LOW, HIGH)
    with pytest.raises(ValueError, match="low must be below high, got 1 and -1"):
        op(torch.zeros(2, 6), torch.zeros(2, 3), 1.0, -1.0)


class Recorder(TorchDispatchMode):
    """Keeps the names of the ops that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_recorders_see_the_same_kernels() -> None:
    code, noise = inputs(5, 6, torch.bfloat16)
    incoming = [*torch.rand(3, 5, 6)]
    values, slopes = op(code, noise, LOW, HIGH), gradient(op, code, noise, incoming)
    with Recorder() as recorder:
        assert posterior.covers(code)
        assert all(torch.equal(a, b) for a, b in zip(op(code, noise, LOW, HIGH), values, strict=True))
        assert torch.equal(gradient(op, code, noise, incoming), slopes)
    assert recorder.names.count("rvae_fast.posterior.default") == 2
    assert recorder.names.count("rvae_fast.posterior_backward.default") == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    code, noise = inputs(5, 6, dtype)
    forward, backward = torch.ops.rvae_fast.posterior.default, torch.ops.rvae_fast.posterior_backward.default
    for keep in (False, True):
        torch.library.opcheck(forward, (code, noise, LOW, HIGH, keep))
    *_, slope, spread = forward(code, noise, LOW, HIGH, True)
    torch.library.opcheck(backward, (noise, None, noise, slope, spread, dtype))


def test_what_is_covered() -> None:
    code = torch.zeros(2, 6)
    assert posterior.covers(code)
    assert posterior.covers(code.bfloat16())
    assert not posterior.covers(code.double())
    assert not posterior.covers(code.half())
    assert not posterior.covers(code.to("meta"))
    assert not posterior.covers(torch.nn.Parameter(code).as_subclass(type("Own", (Tensor,), {})))
    with _backend.backend("reference"):
        assert not posterior.covers(code)
    seen = []
    torch.func.grad(lambda c: (seen.append(posterior.covers(c)), c.sum())[1])(code)
    assert seen == [False]


def test_a_model_trains_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x = VAE(6, 2, n_layers=4).train(), torch.randn(30, 6)

    def gradients() -> list[Tensor]:
        net.zero_grad()
        torch.manual_seed(1)
        net.loss(x).backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    calls: list[Tensor] = []
    sample = posterior.sample_posterior

    def counted(code: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(code)
        return sample(code, low, high)

    monkeypatch.setattr(posterior, "sample_posterior", counted)
    fused = gradients()
    assert len(calls) == 1
    with torch.no_grad():
        assert torch.isfinite(net.loss(x))
    net.eval().loss(x)
    assert len(calls) == 2  # in eval the code is the mean
    net.train()
    monkeypatch.setattr(posterior, "covers", lambda code: False)
    for a, b in zip(fused, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lesser_instruction_sets(isa: str) -> None:
    """The files compiled for lesser CPUs, by the same tests in a process that may not use the better ones."""
    if "RVAE_FAST_CPU_ISA" in os.environ:
        pytest.skip("already inside such a process")
    names = "against_fp64 or no_worse or extremes or nan or layouts or threads"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, str(Path(__file__))]
    environment = {**os.environ, "RVAE_FAST_CPU_ISA": isa, _backend.ENVIRONMENT_VARIABLE: "native"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " skipped" not in done.stdout.splitlines()[-1]


def test_the_noise_does_not_follow_torchs_defaults() -> None:
    code = torch.randn(5, 6, dtype=torch.float32)
    torch.manual_seed(0)
    expected = posterior.sample_posterior(code, -20.0, 10.0)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.manual_seed(0)
        found = posterior.sample_posterior(code, -20.0, 10.0)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
