"""Under ``torch.set_default_device`` of another device a model and rows on the CPU train and score as without it.

On a machine with a GPU that other device is "cuda"; here it is "meta", whose tensors have no values to go on with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from rvae_fast import RVAE, VAE, freeze
from rvae_fast.hyperplane import fit_hyperplane, hyperplane_scores
from rvae_fast.local import fit_local, local_scores
from rvae_fast.models import Autoencoder
from rvae_fast.rapp import fit_nap, nap_scores, sap_scores
from rvae_fast.scoring import score_rows
from rvae_fast.training import TrainingConfig, train

SCORES: dict[str, Callable[[Autoencoder, np.ndarray], np.ndarray]] = {
    "reconstruction": score_rows,
    "frozen": lambda model, x: freeze(model)(torch.from_numpy(x)).numpy(),
    "sap": sap_scores,
    "nap": lambda model, x: nap_scores(model, fit_nap(model, x), x),
    "local": lambda model, x: local_scores(model, fit_local(model, x), x),
    "hyperplane": lambda model, x: hyperplane_scores(model, fit_hyperplane(model, x), x),
}


@pytest.fixture
def elsewhere() -> Iterator[Callable[[], None]]:
    """Calling it sets the other device, until the test is over."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(150, 12)).astype(np.float32)


@pytest.mark.parametrize("score", SCORES)
def test_scores(score: str, elsewhere: Callable[[], None]) -> None:
    torch.manual_seed(0)
    model, x = RVAE(12, 3, n_layers=5, init="default").eval(), rows()
    again, expected = copy.deepcopy(model), SCORES[score](model, x)
    elsewhere()
    np.testing.assert_array_equal(SCORES[score](again, x), expected)


@pytest.mark.parametrize("model_class", [RVAE, VAE])
@pytest.mark.parametrize("optimizer", ["adam", "radam"])
def test_training(model_class: type[Autoencoder], optimizer: str, elsewhere: Callable[[], None]) -> None:
    config = TrainingConfig(epochs=2, batch_size=64, seed=0, validation_fraction=0.2, optimizer=optimizer)
    torch.manual_seed(0)
    here = model_class(12, 3, n_layers=4)
    torch.manual_seed(0)
    there = model_class(12, 3, n_layers=4)
    train(here, rows(), config)
    elsewhere()
    train(there, rows(), config)
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(a, b)
