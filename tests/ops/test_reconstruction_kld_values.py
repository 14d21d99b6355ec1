"""Values and gradients against fp64: at most twice PyTorch's own error in the same dtype, plus 1e-6.

PyTorch's own error is that of the reference, which brings bf16 and fp16 to fp32 first and is therefore a stricter bar
than arithmetic in those dtypes. 1e-6 is relative to the largest value, absolute below 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rvae_fast import _backend, reference
from rvae_fast.ops.reconstruction_kld import reconstruction_kld

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BATCHES = [0, 1, 3, 257]
FEATURES = [1, 31, 65, 100, 257, 784, 1000]


def assert_as_accurate(ours: Tensor, torchs: Tensor, exact: Tensor, what: str) -> None:
    assert ours.shape == torchs.shape == exact.shape, what
    assert ours.dtype == torchs.dtype, what
    if ours.numel():
        bound = 2 * (torchs.double() - exact).abs().max() + 1e-6 * max(1.0, float(exact.abs().max()))
        error = (ours.double() - exact).abs().max()
        assert error <= bound, f"{what}: error {error:.3g}, bound {bound:.3g}"


def results_and_gradients(function, inputs, grads, likelihood, reduction):
    """(error, kld, gradient of every tensor given) with the given gradients coming in."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    error, kld = function(*leaves[:4], likelihood=likelihood, reduction=reduction, feature_weight=leaves[4])
    given = [t for t in leaves if t is not None]
    outputs = [(error, grads[0])] + ([] if leaves[2] is None else [(kld, grads[1])])
    incoming = [g.to(o.dtype) for o, g in outputs]
    return [error.detach(), kld.detach(), *torch.autograd.grad([o for o, _ in outputs], given, incoming)]


def check(inputs, likelihood, reduction, what):
    batch = inputs[0].shape[0]
    grads = torch.rand(2, batch, generator=torch.Generator().manual_seed(7)) + 0.5
    wide = [None if t is None else t.double() for t in inputs]
    ours = results_and_gradients(reconstruction_kld, inputs, grads, likelihood, reduction)
    torchs = results_and_gradients(reference.reconstruction_kld, inputs, grads, likelihood, reduction)
    exact = results_and_gradients(reference.reconstruction_kld, wide, grads, likelihood, reduction)
    names = ["error", "kld", "grad x", "grad x_hat", "grad mu", "grad logvar", "grad feature_weight"]
    for name, a, b, c in zip(names, ours, torchs, exact, strict=False):
        assert_as_accurate(a, b, c, f"{name}, {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
def test_against_fp64(native, sample, likelihood, dtype) -> None:
    for batch in BATCHES:
        for features in FEATURES:
            x, x_hat, mu, logvar, weight = sample(batch, features, latent=features % 23 + 1, dtype=dtype)
            reduction = "mean" if features % 2 else "sum"
            check((x, x_hat, mu, logvar, weight), likelihood, reduction, f"weighted, {batch} x {features}")
            check((x, x_hat, mu, logvar, None), likelihood, "sum", f"plain, {batch} x {features}")


@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
def test_every_pair_of_dtypes(native, sample, likelihood) -> None:
    for dtype in DTYPES:
        for other in DTYPES:
            x, x_hat, mu, logvar, weight = sample(9, 37)
            inputs = (x.to(dtype), x_hat.to(other), mu.to(other), logvar.to(dtype), weight.to(other))
            check(inputs, likelihood, "sum", f"{dtype} with {other}")


def test_reference_against_formulas(backend) -> None:
    """The oracle itself, by hand and by PyTorch's distributions."""
    x = torch.tensor([[0.0, 1.0], [0.25, 0.5]], dtype=torch.float64)
    x_hat = torch.tensor([[2.0, -1.0], [0.0, 3.0]], dtype=torch.float64)
    mu, logvar = torch.tensor([[1.0], [-2.0]]).double(), torch.tensor([[0.0], [1.5]]).double()
    weight = torch.tensor([1.0, 10.0], dtype=torch.float64)
    posterior = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)

    error, kld = reconstruction_kld(x, x_hat, mu, logvar)
    torch.testing.assert_close(error, torch.tensor([8.0, 6.3125], dtype=torch.float64))
    torch.testing.assert_close(kld, expected)
    error, _ = reconstruction_kld(x, x_hat, likelihood="absolute", reduction="mean", feature_weight=weight)
    torch.testing.assert_close(error, torch.tensor([11.0, 12.625], dtype=torch.float64))
    error, none = reconstruction_kld(x, x_hat, likelihood="bernoulli")
    bernoulli = torch.distributions.Bernoulli(logits=x_hat, validate_args=False)
    torch.testing.assert_close(error, -bernoulli.log_prob(x).sum(1))
    assert none.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_magnitudes(native, dtype) -> None:
    logvar = torch.tensor([[-80.0, 80.0, 0.0, 1e-3], [80.0, 80.0, -80.0, 5.0]], dtype=dtype)
    mu = torch.tensor([[1e4, -1e4, 0.0, 1.0], [0.0, 1e-8, 3.0, 4.0]], dtype=dtype)
    x = torch.tensor([[0.0, 1.0, 0.5, 0.999, 1e-3], [1.0, 0.0, 1.0, 0.0, 0.25]], dtype=dtype)
    logits = torch.tensor([[1e4, 1e4, -1e4, 1e4, 1e4], [-1e4, 1e4, 90.0, -90.0, 0.0]], dtype=dtype)
    for likelihood in reference.LIKELIHOODS:
        check((x, logits, mu, logvar, None), likelihood, "sum", likelihood)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
def test_non_finite_stays_in_its_row(backend, sample, likelihood, bad) -> None:
    for column in (0, 20, 36):  # in a whole vector and in the last, partial one, at every vector width
        x, x_hat, mu, logvar, _ = sample(4, 37, latent=20)
        x_hat[1, column], mu[2, 1], logvar[3, 17] = bad, bad, bad
        clean = sample(4, 37, latent=20)
        error, kld = reconstruction_kld(x, x_hat, mu, logvar, likelihood=likelihood)
        expected, expected_kld = reconstruction_kld(*clean[:4], likelihood=likelihood)
        assert not error[1].isfinite()
        assert not kld[2:].isfinite().any()
        assert torch.equal(error[[0, 2, 3]], expected[[0, 2, 3]])
        assert torch.equal(kld[:2], expected_kld[:2])


def test_non_finite_gradients(backend, sample) -> None:
    x, x_hat, mu, logvar, _ = sample(3, 37, latent=20, dtype=torch.bfloat16)
    x_hat[1, 3] = x_hat[1, 36] = logvar[2, 18] = float("nan")
    leaves = [t.requires_grad_() for t in (x_hat, mu, logvar)]
    error, kld = reconstruction_kld(x, *leaves)
    got = torch.autograd.grad((error + kld).sum(), leaves)
    assert got[0].isnan().nonzero().tolist() == [[1, 3], [1, 36]]
    assert got[2].isnan().nonzero().tolist() == [[2, 18]]
    assert got[1].isfinite().all()


def test_repeats_bit_for_bit_at_any_number_of_threads(native, sample) -> None:
    inputs = sample(1000, 257, dtype=torch.float32)
    grads = torch.rand(2, 1000)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(results_and_gradients(reconstruction_kld, inputs, grads, "bernoulli", "sum"))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_gradients_past_the_cache(native, sample) -> None:
    """A gradient large enough to be written past the cache has the bits of the same rows in a small batch."""
    for features, dtype in [(784, torch.float32), (784, torch.bfloat16), (783, torch.float32)]:
        x, x_hat, _, _, _ = sample(6000, features, dtype=dtype)
        x_hat.requires_grad_()
        (whole,) = torch.autograd.grad(reconstruction_kld(x, x_hat)[0].sum(), x_hat)
        (part,) = torch.autograd.grad(reconstruction_kld(x[-40:], x_hat[-40:])[0].sum(), x_hat)
        assert torch.equal(whole[-40:], part[-40:])


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lesser_instruction_sets(native, isa) -> None:
    """The files compiled for lesser CPUs, by the same tests in a process that may not use the better ones."""
    if "RVAE_FAST_CPU_ISA" in os.environ:
        pytest.skip("already inside such a process")
    names = "against_fp64 or pair_of_dtypes or large or non_finite or past_the_cache"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, str(Path(__file__))]
    environment = {**os.environ, "RVAE_FAST_CPU_ISA": isa, _backend.ENVIRONMENT_VARIABLE: "native"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " skipped" not in done.stdout.splitlines()[-1]
