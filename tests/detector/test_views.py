"""Detectors that score the lowest over views of an image."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import rvae_fast
from rvae_fast import EnsembleDetector, RVAEDetector
from rvae_fast.views import ImageViews

SHAPE = (8, 8)
OPTIONS: dict[str, Any] = {
    "scaler": None, "latent_features": 4, "widths": [32, 16], "epochs": 15, "random_state": 0, "device": "cpu",
}  # fmt: skip


def images(n: int, seed: int) -> np.ndarray:
    """Blurred bars at a slant and a place of their own, in [0, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:8, :8] - 3.5
    angle, place = rng.normal(0.4, 0.15, (n, 1, 1)), rng.normal(0.0, 0.7, (n, 1, 1))
    across = x * np.cos(angle) + y * np.sin(angle) - place
    return np.exp(-(across**2)).reshape(n, 64)


@pytest.fixture(scope="module")
def fitted() -> RVAEDetector:
    return RVAEDetector(**OPTIONS).fit(images(600, 0))


@pytest.mark.parametrize("anomaly_score", ["reconstruction", "elbo", "sap", "nap", "local", "hyperplane"])
def test_a_score_is_the_lowest_over_views(fitted: RVAEDetector, anomaly_score: str) -> None:
    normal, X = images(600, 0), images(70, 1)
    plain = copy.deepcopy(fitted).set_params(anomaly_score=anomaly_score, nap_ridge=1.0).fit_score(normal)
    views = ImageViews(SHAPE)
    rows = torch.from_numpy(X.astype(np.float32))
    by_view = np.stack([plain.score_samples(views(rows, i).numpy()) for i in range(len(views))])
    seen = copy.deepcopy(plain).set_params(views="image").fit_score(normal)
    scores = seen.score_samples(X)
    np.testing.assert_allclose(scores, by_view.max(0), rtol=1e-5, atol=1e-7)
    assert (by_view.argmax(0) > 0).any()
    np.testing.assert_allclose(np.concatenate(list(seen.score_chunks([X[:9], X[9:]]))), scores, rtol=1e-9)
    # The network, and what it makes of the row, are those of the row as it is.
    np.testing.assert_array_equal(seen.reconstruct(X), plain.reconstruct(X))
    np.testing.assert_array_equal(seen.feature_errors(X), plain.feature_errors(X))


def test_fit_and_fit_score_agree(fitted: RVAEDetector) -> None:
    X = images(600, 0)
    whole = RVAEDetector(**OPTIONS, views=ImageViews(SHAPE), anomaly_score="hyperplane").fit(X)
    later = copy.deepcopy(fitted).set_params(views="8x8", anomaly_score="hyperplane").fit_score(X)
    np.testing.assert_array_equal(whole.score_samples(X[:50]), later.score_samples(X[:50]))
    assert whole.offset_ == later.offset_
    assert later.threshold_ < copy.deepcopy(fitted).set_params(anomaly_score="hyperplane").fit_score(X).threshold_


@pytest.mark.parametrize("anomaly_score", ["reconstruction", "local", "hyperplane"])
def test_the_threshold_is_one_for_new_rows(fitted: RVAEDetector, anomaly_score: str) -> None:
    """A training row is no neighbour of what it becomes in a view: new rows would all be far beside that."""
    options = {"anomaly_score": anomaly_score, "views": "image", "contamination": 0.1}
    detector = copy.deepcopy(fitted).set_params(**options).fit_score(images(600, 0))
    flagged = (detector.predict(images(2000, 5)) < 0).mean()
    assert 0.04 < flagged < 0.2


def test_what_it_was_fitted_by_is_told(fitted: RVAEDetector, tmp_path: Path) -> None:
    X = images(600, 0)
    detector = copy.deepcopy(fitted).set_params(views={"shape": SHAPE, "shift": 2}).fit_score(X)
    scores = detector.score_samples(X[:20])
    detector.save(tmp_path / "detector.rvae")
    for other in (rvae_fast.load(tmp_path / "detector.rvae"), pickle.loads(pickle.dumps(detector))):
        np.testing.assert_array_equal(other.score_samples(X[:20]), scores)
        np.testing.assert_array_equal(other.predict(X[:20]), detector.predict(X[:20]))
    assert clone(detector).views == {"shape": SHAPE, "shift": 2}
    given = copy.deepcopy(fitted).set_params(views=ImageViews(SHAPE, rotation=3)).fit_score(X)
    given.save(tmp_path / "given.rvae")
    np.testing.assert_array_equal(
        rvae_fast.load(tmp_path / "given.rvae").decision_function(X[:20]), given.decision_function(X[:20])
    )
    detector.set_params(views=None)
    np.testing.assert_array_equal(detector.score_samples(X[:20]), fitted.score_samples(X[:20]))
    with pytest.raises(NotFittedError, match="views=None was set after fit"):
        detector.predict(X[:20])


def test_an_ensemble_takes_its_members(fitted: RVAEDetector) -> None:
    X = images(300, 0)
    short = {**OPTIONS, "epochs": 2, "random_state": None}
    ensemble = EnsembleDetector(RVAEDetector(**short, views="image"), members=2, random_state=0).fit(X)
    plain = EnsembleDetector(RVAEDetector(**short), members=2, random_state=0).fit(X)
    assert (ensemble.estimators_[0].score_samples(X) >= plain.estimators_[0].score_samples(X)).all()
    mean = np.mean([m.score_samples(X) / u for m, u in zip(ensemble.estimators_, ensemble.units_, strict=True)], axis=0)
    np.testing.assert_allclose(ensemble.score_samples(X), mean)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"views": "image", "scaler": "standard"}, "views needs scaler=None, got scaler='standard'"),
        ({"views": "8x9"}, r"views has the shape \(8, 9\), 72 values, where the rows have 64 columns"),
        ({"views": 3}, "views must be None"),
    ],
)
def test_bad_views_are_named_before_anything_is_trained(changes: dict[str, Any], named: str) -> None:
    detector = RVAEDetector(**{**OPTIONS, "epochs": 10_000, **changes})
    for broken in (detector, EnsembleDetector(detector)):
        with pytest.raises((TypeError, ValueError), match=named):
            broken.fit(images(300, 0))


def test_views_that_do_not_suit_what_was_fitted(fitted: RVAEDetector) -> None:
    X = images(300, 0)
    scaled = RVAEDetector(**{**OPTIONS, "scaler": "minmax", "epochs": 1}).fit(X)
    with pytest.raises(ValueError, match="views needs scaler=None, got scaler='minmax'"):
        scaled.set_params(views="image").score_samples(X)
    other = copy.deepcopy(fitted).set_params(views="9x9")
    before = other.offset_
    with pytest.raises(ValueError, match="where the rows have 64 columns"):
        other.fit_score(X)
    assert other.offset_ == before
    # A refit by another scaler is not held to the scaler before.
    assert scaled.set_params(scaler=None).fit(X).offset_ < 0
