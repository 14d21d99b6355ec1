"""Detectors on the GPU: every score that they have, beside what the same network gives on the CPU."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from rvae_fast import RVAEDetector

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
