"""Sampling the posterior: the counted random numbers, the reference op, and what every device promises."""

from __future__ import annotations

import math

import pytest
import torch

from rvae_fast import _backend, reference
from rvae_fast.ops.reparameterise import is_fused, reparameterise

forward_op = torch.ops.rvae_fast.reparameterise.default
backward_op = torch.ops.rvae_fast.reparameterise_backward.default


def seed(value: int = 12345) -> torch.Tensor:
    return torch.tensor([value])


def inputs(batch: int = 4, latent: int = 3, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(batch)
    return [t.clone().requires_grad_() for t in torch.randn(2, batch, latent, generator=g, dtype=dtype)]


def test_philox_known_answers() -> None:
    """From the authors' distribution (Random123, kat_vectors, philox4x32 10)."""
    words = reference.philox(torch.tensor([0]), torch.tensor([0]))
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_philox_against_exact_integers() -> None:
    def plain(key: int, counter: int) -> list[int]:
        c, k, low = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32], 0xFFFFFFFF
        for _ in range(10):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
            k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
        return c

    for key in (1, 2**31, 2**62 + 12345, 2**63 - 2):
        counters = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7]
        words = reference.philox(torch.tensor([key]), torch.tensor(counters))
        for i, counter in enumerate(counters):
            assert [int(w[i]) for w in words] == plain(key, counter)


def test_numbers_are_standard_normal() -> None:
    n = 200_000
    eps = reference.philox_normal(seed(), n // 4, 4).double()
    assert abs(eps.mean()) < 5 / math.sqrt(n)
    assert abs(eps.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((eps**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((eps**4).mean() - 3) < 5 * math.sqrt(96 / n)
    columns = eps.t().corrcoef() - torch.eye(4)
    assert columns.abs().max() < 5 / math.sqrt(n / 4)
    assert abs((eps[1:] * eps[:-1]).mean()) < 5 / math.sqrt(n)
    other = reference.philox_normal(seed(12346), n // 4, 4).double()
    assert abs((eps * other).mean()) < 5 / math.sqrt(n)


def test_numbers_depend_on_seed_and_position_alone() -> None:
    assert torch.equal(
        reference.philox_normal(seed(), 10, 6).view(-1)[:30], reference.philox_normal(seed(), 5, 6).view(-1)
    )


def test_gradients_with_the_same_numbers() -> None:
    mu, logvar = inputs()
    assert torch.autograd.gradcheck(lambda m, v: forward_op(m, v, seed()), (mu, logvar))
    z, kld = reference.reparameterise(mu, logvar, seed())
    grads = torch.randn(z.shape, dtype=z.dtype), torch.randn(kld.shape, dtype=z.dtype)
    by_autograd = torch.autograd.grad((z, kld), (mu, logvar), grads)
    by_formula = backward_op(*grads, mu.detach(), logvar.detach(), seed())
    for a, b in zip(by_formula, by_autograd, strict=True):
        torch.testing.assert_close(a, b)
    for given in ((grads[0], None), (None, grads[1])):
        z, kld = reference.reparameterise(mu, logvar, seed())
        outputs = [o for o, g in zip((z, kld), given, strict=True) if g is not None]
        by_autograd = torch.autograd.grad(outputs, (mu, logvar), [g for g in given if g is not None])
        for a, b in zip(backward_op(*given, mu.detach(), logvar.detach(), seed()), by_autograd, strict=True):
            torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    mu, logvar = inputs(dtype=torch.float32)
    torch.library.opcheck(forward_op, (mu, logvar, seed()))
    half = mu.detach().bfloat16(), logvar.detach().half()
    torch.library.opcheck(forward_op, (*half, seed()))
    torch.library.opcheck(backward_op, (torch.randn(4, 3), None, mu.detach(), logvar.detach(), seed()))


def test_without_a_kernel_it_is_torch_randn() -> None:
    mu, logvar = inputs(dtype=torch.float32)
    with _backend.backend("reference"):
        assert not is_fused(mu, logvar)
        torch.manual_seed(3)
        z, kld = reparameterise(mu, logvar)
    torch.manual_seed(3)
    assert torch.equal(z, mu + torch.exp(0.5 * logvar) * torch.randn_like(mu))
    torch.testing.assert_close(kld, reference.reconstruction_kld(mu, mu, mu, logvar)[1])
    assert not is_fused(mu, logvar), "auto never takes the interpreter"


def test_bad_input_is_named() -> None:
    with pytest.raises(TypeError, match=r"mu must be a floating-point torch.Tensor, got torch.int64"):
        reparameterise(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"mu must have shape \[batch, latent\] with latent >= 1, got \[2\]"):
        reparameterise(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"logvar must have the shape and device of mu, \[2, 3\] on cpu, got \[2, 4\]"):
        reparameterise(torch.ones(2, 3), torch.ones(2, 4))
