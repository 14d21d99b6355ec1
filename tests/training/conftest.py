"""Small models and tables for the tests of the training loop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rvae_fast.models import AE, RAE, RVAE, VAE

MODELS = {"AE": AE, "RAE": RAE, "VAE": VAE, "RVAE": RVAE}


@pytest.fixture(autouse=True)
def ctrl_c_raises() -> Iterator[None]:
    """Python's own handler of SIGINT: a test run in the background of a shell inherits it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Standin(nn.Module):
    """A linear autoencoder without BatchNorm or noise: its steps are those of the plain formula."""

    def __init__(self, in_features: int = 6, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.in_features = in_features
        self.encoder = nn.Linear(in_features, 3, dtype=dtype)
        self.decoder = nn.Linear(3, in_features, dtype=dtype)
        self.seen: list[Tensor] = []
        self.calls = 0

    def before(self, x: Tensor) -> Tensor:
        """What a test changes; called with every batch."""
        return x

    def loss_terms(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            self.calls += 1
        self.seen.append(x.detach().clone())
        x = self.before(x)
        code = self.encoder(x)
        return (self.decoder(code) - x).square().sum(1), code.square().sum(1)


@pytest.fixture
def standin() -> Any:
    """``standin(in_features=6, dtype=float32, seed=0)``."""

    def make(in_features: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0) -> Standin:
        torch.manual_seed(seed)
        return Standin(in_features, dtype)

    return make


@pytest.fixture
def model() -> Any:
    """``model(name="RVAE", in_features=6, seed=0, **options)``: one of the four, small."""

    def make(name: str = "RVAE", in_features: int = 6, seed: int = 0, **options: Any) -> nn.Module:
        torch.manual_seed(seed)
        return MODELS[name](in_features, latent_features=2, n_layers=4, **options)

    return make


@pytest.fixture
def table() -> Any:
    """``table(n, width=6)``: correlated standard normal rows, fp32."""

    def make(n: int, width: int = 6) -> Tensor:
        generator = torch.Generator().manual_seed(n)
        mix = torch.randn(2, width, generator=generator)
        noise = torch.randn(n, width, generator=generator)
        return torch.randn(n, 2, generator=generator) @ mix + 0.1 * noise

    return make


@pytest.fixture
def same() -> Any:
    """``same(one, other)``: fails, naming the tensor, unless two modules (or state dicts) are equal bit for bit."""

    def check(one: Any, other: Any) -> None:
        a, b = (m.state_dict() if isinstance(m, nn.Module) else m for m in (one, other))
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name

    return check
