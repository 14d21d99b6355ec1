"""The sampling kernel in the interpreter, against the reference with the same random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rvae_fast
from rvae_fast import reference
from rvae_fast.kernels import reparameterise as kernels
from rvae_fast.ops.reparameterise import is_fused, reparameterise

SHAPES = [(1, 1), (3, 31), (130, 20), (7, 2), (70, 257), (2, 1100)]


def make(rows: int, latent: int) -> tuple[Tensor, Tensor]:
    mu, logvar = torch.randn(2, rows, latent, generator=torch.Generator().manual_seed(rows))
    return mu.clone(), 2 * logvar


def seed(value: int = 2**40 + 99) -> Tensor:
    return torch.tensor([value])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_match_the_reference(shape: tuple[int, int], compare: Any) -> None:
    mu, logvar = make(*shape)
    grads = torch.randn(*shape), torch.randn(shape[0])
    ours = (*kernels.forward(mu, logvar, seed()), *kernels.backward(*grads, mu, logvar, seed()))
    results = []
    for dtype in (torch.float32, torch.float64):
        wide = mu.to(dtype), logvar.to(dtype)
        results.append(
            (
                *reference.reparameterise(*wide, seed()),
                *reference.reparameterise_backward(*(g.to(dtype) for g in grads), *wide, seed()),
            )
        )
    for name, one, *pair in zip(("z", "kld", "mu", "logvar"), ours, *results, strict=True):
        scale = max(1.0, float(pair[1].abs().max()))
        compare(name, one / scale, *(t / scale for t in pair))


def test_the_numbers_are_the_references() -> None:
    eps, _ = kernels.forward(torch.zeros(50, 20), torch.zeros(50, 20), seed())
    torch.testing.assert_close(eps, reference.philox_normal(seed(), 50, 20), rtol=1e-5, atol=1e-6)
    other, _ = kernels.forward(torch.zeros(50, 20), torch.zeros(50, 20), seed(5))
    assert not torch.isclose(eps, other).any()


@pytest.mark.parametrize("grads", [(True, False), (False, True)])
def test_one_gradient_alone(grads: tuple[bool, bool]) -> None:
    mu, logvar = make(9, 5)
    given = [g if wanted else None for g, wanted in zip((torch.randn(9, 5), torch.randn(9)), grads, strict=True)]
    ours = kernels.backward(*given, mu, logvar, seed())
    for a, b in zip(ours, reference.reparameterise_backward(*given, mu, logvar, seed()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_strided_views_of_one_code_and_expanded_gradients() -> None:
    code = torch.randn(11, 8)
    mu, logvar = code.chunk(2, dim=1)
    dense = kernels.forward(mu.contiguous(), logvar.contiguous(), seed())
    assert all(torch.equal(a, b) for a, b in zip(kernels.forward(mu, logvar, seed()), dense, strict=True))
    one = kernels.backward(torch.ones(1, 1).expand(11, 4), torch.ones(1).expand(11), mu, logvar, seed())
    other = kernels.backward(torch.ones(11, 4), torch.ones(11), mu, logvar, seed())
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_half_precision() -> None:
    mu, logvar = (t.half() for t in make(9, 5))
    z, kld = kernels.forward(mu, logvar, seed())
    exact_z, exact_kld = reference.reparameterise(mu.double(), logvar.double(), seed())
    assert z.dtype == torch.float16
    assert kld.dtype == torch.float32
    torch.testing.assert_close(z.double(), exact_z, rtol=2**-10, atol=1e-3)
    torch.testing.assert_close(kld.double(), exact_kld, rtol=1e-5, atol=1e-5)


def test_no_rows() -> None:
    z, kld = kernels.forward(torch.zeros(0, 3), torch.zeros(0, 3), seed())
    assert z.shape == (0, 3)
    assert kld.shape == (0,)
    assert kernels.backward(z, kld, z, z, seed())[0].shape == (0, 3)


def test_the_function_draws_its_seed_from_torch() -> None:
    mu, logvar = (t.requires_grad_() for t in make(20, 4))
    with rvae_fast.backend("triton"):
        assert is_fused(mu, logvar)
        torch.manual_seed(7)
        z, kld = reparameterise(mu, logvar)
        again, _ = reparameterise(mu, logvar)
        torch.manual_seed(7)
        same, _ = reparameterise(mu, logvar)
        torch.manual_seed(7)
        drawn = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
    assert torch.equal(z, same)
    assert not torch.isclose(z, again).any()
    by_op = reference.reparameterise(mu.double(), logvar.double(), drawn)
    torch.testing.assert_close(z.double(), by_op[0], rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(z.sum() + kld.sum(), (mu, logvar))
    theirs = torch.autograd.grad(by_op[0].sum() + by_op[1].sum(), (mu, logvar))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)
