"""Shared by the ops' tests: the backends that run here, and samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from rvae_fast import _backend

Sample = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test under each backend; one that is not available here skips, saying why."""
    reason = _backend.available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with _backend.backend(request.param):
        yield request.param


@pytest.fixture
def native() -> Iterator[None]:
    """Run the test under the native backend; skip, saying why, where there is none."""
    reason = _backend.available_backends()["native"]
    if reason is not None:
        pytest.skip(f"backend native: {reason}")
    with _backend.backend("native"):
        yield


@pytest.fixture
def sample() -> Callable[..., Sample]:
    """``sample(batch, features, latent, dtype, requires_grad, seed)`` gives x in [0, 1], x_hat, mu, logvar, weights."""

    def make(
        batch: int = 5,
        features: int = 7,
        latent: int = 3,
        dtype: torch.dtype = torch.float32,
        requires_grad: bool = False,
        seed: int = 0,
    ) -> Sample:
        g = torch.Generator().manual_seed(seed)
        x = torch.rand(batch, features, generator=g)
        x_hat = 3 * torch.randn(batch, features, generator=g)
        mu, logvar = torch.randn(2, batch, latent, generator=g)
        weight = torch.rand(features, generator=g)
        made = [t.to(dtype).requires_grad_(requires_grad) for t in (x, x_hat, mu.clone(), logvar.clone(), weight)]
        return made[0], made[1], made[2], made[3], made[4]

    return make
