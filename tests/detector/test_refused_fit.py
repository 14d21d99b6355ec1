"""What ``fit`` refuses costs nothing of what an earlier ``fit`` has made; and scores that are set afterwards."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rvae_fast
from rvae_fast import AEDetector, EnsembleDetector, RVAEDetector

rng = np.random.default_rng(0)
X = rng.normal(size=(80, 3)) @ rng.normal(size=(3, 6))


def holed(X: Any) -> Any:
    X = X.copy()
    X[3, 2] = np.nan
    return X


REFUSED: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "a NaN": ({}, holed),
    "a row": ({}, lambda X: X[:1]),
    "rows too few to compare": ({}, lambda X: X[:3]),
    "rows too few that differ": ({}, lambda X: np.repeat(X[:3], 20, axis=0)),
    "rows too few that differ, of many": ({}, lambda X: np.repeat(X[:3], 2000, axis=0)),
    "rows too few that differ once filled": ({"missing": "mean"}, lambda X: np.repeat(holed(X)[1:4], 20, axis=0)),
    "text": ({}, lambda X: X.astype(str)),
    "another width, with a NaN": ({}, lambda X: holed(X)[:, 1:]),
    "epochs": ({"epochs": -1}, lambda X: X),
    "widths": ({"widths": [0]}, lambda X: X),
    "nap_tolerance": ({"nap_tolerance": 1.0}, lambda X: X),
    "checkpoint": ({"checkpoint": "/dev/null"}, lambda X: X),
    "resume": ({"resume": True}, lambda X: X),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_fit_leaves_the_detector_as_it_was(what: str, tmp_path: Path) -> None:
    detector = RVAEDetector(epochs=2, random_state=0, anomaly_score="hyperplane").fit(X)
    expected, given = detector.score_samples(X), detector.get_params()
    changes, rows = REFUSED[what]
    with pytest.raises((TypeError, ValueError, OSError)):
        detector.set_params(**changes).fit(rows(X))
    assert detector.n_features_in_ == 6
    np.testing.assert_array_equal(detector.score_samples(X), expected)
    detector.set_params(**given).save(tmp_path / "kept.safetensors")
    np.testing.assert_array_equal(rvae_fast.load(tmp_path / "kept.safetensors").score_samples(X), expected)


@pytest.mark.parametrize(
    ("anomaly_score", "rows", "message"),
    [
        (
            "hyperplane",
            X[:3],
            "anomaly_score='hyperplane' compares rows .* X must have at least 4 distinct rows, got 3",
        ),
        ("hyperplane", np.repeat(X[:3], 20, axis=0), "at least 4 distinct rows, got 3"),
        ("local", X[:2], "anomaly_score='local' compares rows with each other: X must have at least 3 rows, got 2"),
    ],
)
def test_too_few_rows_for_a_score_are_told_before_the_training(
    anomaly_score: str, rows: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rvae_fast._base_detector.train", None)  # not reached
    with pytest.raises(ValueError, match=message):
        RVAEDetector(anomaly_score=anomaly_score).fit(rows)
    with pytest.raises(ValueError, match=message):
        EnsembleDetector(RVAEDetector(anomaly_score=anomaly_score), members=2).fit(rows)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no os.posix_fallocate here")
def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a memory-mapped table the scaled rows are mapped too: on a full disk, writing them killed the process."""
    detector = RVAEDetector(epochs=2, random_state=0).fit(X)
    expected, sizes = detector.score_samples(X), []
    np.save(tmp_path / "table.npy", X)
    mapped = np.load(tmp_path / "table.npy", mmap_mode="r")

    def allocate(file: int, start: int, size: int) -> None:
        sizes.append(size)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    code = errno.ENOSPC
    with pytest.raises(OSError, match=r"No space left.*take 0\.0 MB in a temporary file; TMPDIR"):
        detector.fit(mapped)
    assert sizes == [4 * X.size]
    np.testing.assert_array_equal(detector.score_samples(X), expected)
    code = errno.EOPNOTSUPP  # of a file system that cannot reserve
    np.testing.assert_array_equal(detector.fit(mapped).score_samples(X), expected)


def test_a_warning_that_is_an_error_is_a_refusal() -> None:
    detector = RVAEDetector(epochs=2, random_state=0).fit(X)
    expected = detector.predict(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="constant"):
            detector.fit(np.column_stack([X, np.ones(len(X))]))
    np.testing.assert_array_equal(detector.predict(X), expected)


@pytest.mark.parametrize("what", ["a NaN", "a row", "another width, with a NaN"])
def test_and_the_ensemble(what: str) -> None:
    ensemble = EnsembleDetector(RVAEDetector(epochs=2), members=2, random_state=0).fit(X)
    expected, members = ensemble.score_samples(X), ensemble.estimators_
    with pytest.raises(ValueError, match=r"NaN|missing|sample"):
        ensemble.fit(REFUSED[what][1](X))
    assert ensemble.estimators_ is members
    np.testing.assert_array_equal(ensemble.score_samples(X), expected)
    with pytest.raises(ValueError, match="members"):
        ensemble.set_params(members=0).fit(X)
    np.testing.assert_array_equal(ensemble.score_samples(X), expected)


@pytest.mark.parametrize(
    ("detector", "changes", "message"),
    [
        (RVAEDetector, {"anomaly_score": "foo"}, "anomaly_score must be one of 'reconstruction'.*got 'foo'"),
        (AEDetector, {"anomaly_score": "elbo"}, "anomaly_score must be one of"),
        (RVAEDetector, {"anomaly_score": "sap", "pathway_input": "no"}, "pathway_input must be True, False or 'auto'"),
        (RVAEDetector, {"anomaly_score": "sap", "pathway": "all"}, "pathway must be one of"),
        (RVAEDetector, {"anomaly_score": "elbo", "kld_weight": -5.0}, "kld_weight must be at least 0"),
        (RVAEDetector, {"anomaly_score": "elbo", "kld_weight": "1"}, "kld_weight must be a number"),
    ],
)
def test_a_score_that_there_is_not_set_after_fit(detector: Any, changes: dict[str, Any], message: str) -> None:
    fitted = detector(epochs=2, random_state=0).fit(X).set_params(**changes)
    for use in (fitted.score_samples, fitted.predict, fitted.calibrate, fitted.fit_score, fitted.feature_attributions):
        with pytest.raises((TypeError, ValueError), match=message):
            use(X)


def test_two_numbers_for_one_depth() -> None:
    with pytest.raises(ValueError, match=r"n_layers and widths both say.*n_layers=6 and widths=\[8, 4\]"):
        RVAEDetector(epochs=1, widths=[8, 4], n_layers=6).fit(X)


@pytest.mark.parametrize("value", [-1, 2**32, "x", 0.5, np.random.default_rng(0)])
def test_a_random_state_that_is_none_is_named(value: Any) -> None:
    for refused in (
        RVAEDetector(epochs=1, random_state=value),
        EnsembleDetector(RVAEDetector(epochs=1), members=2, random_state=value),
        EnsembleDetector(RVAEDetector(epochs=1), members=[{}, {"random_state": value}]),
    ):
        with pytest.raises(ValueError, match=r"^random_state must be None, a whole number from 0 to .*, got"):
            refused.fit(X)
        assert not hasattr(refused, "estimators_")
