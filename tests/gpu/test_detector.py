"""Detectors on the GPU: every score that they have, beside what the same network gives on the CPU."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from rvae_fast import RVAE, RVAEDetector, freeze

SCORES = ("reconstruction", "elbo", "sap", "nap", "local", "hyperplane")


def table(rows: int = 400, width: int = 12) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, 3)) @ rng.normal(size=(3, width)) + 0.1 * rng.normal(size=(rows, width))


@pytest.mark.parametrize("score", SCORES)
def test_scores_as_on_the_cpu(score: str, device: torch.device) -> None:
    # With NAP's ridge, else its directions of next to no variance raise the rounding of either device to the rest.
    options = {"epochs": 4, "random_state": 0, "nap_ridge": 1.0, "anomaly_score": score, "device": device.type}
    detector = RVAEDetector(**options).fit(table())
    assert next(detector.model_.parameters()).device.type == device.type
    X = table(430)[-101:]
    there = detector.score_samples(X)
    here = copy.deepcopy(detector).set_params(device="cpu").score_samples(X)
    assert np.isfinite(there).all()
    # Not each score alone: which of two rows is the nearest may hang on a rounding.
    assert np.corrcoef(there, here)[0, 1] > 0.999
    assert np.median(np.abs(there - here)) < 1e-2 * here.std()


def test_what_else_a_detector_gives(device: torch.device) -> None:
    X = table()
    detector = RVAEDetector(epochs=2, random_state=0, device=device.type).fit(X)
    again = pickle.loads(pickle.dumps(detector))
    assert next(again.model_.parameters()).device.type == "cpu"
    here = again.set_params(device="cpu")
    for name in ("transform", "reconstruct", "feature_errors"):
        np.testing.assert_allclose(getattr(detector, name)(X), getattr(here, name)(X), rtol=1e-3, atol=1e-3)
    one, all_of_them = detector.score_samples(X[:1]), detector.score_samples(X)
    np.testing.assert_allclose(one, all_of_them[:1], rtol=1e-4)


def test_a_frozen_model_scores_on_the_cpu(device: torch.device) -> None:
    """Whether the native scorer covers it, or, in fp64, a copy of the model has to run."""
    for dtype in (torch.float32, torch.float64):
        model, x = RVAE(12, 3, n_layers=4).to(device, dtype).eval(), torch.rand(9, 12, dtype=dtype)
        torch.testing.assert_close(
            freeze(model)(x), model.anomaly_score(x.to(device)).float().cpu(), rtol=1e-3, atol=1e-4
        )
