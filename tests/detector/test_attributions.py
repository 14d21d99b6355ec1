"""What each column adds to a score: the definition, one value at a time, and whether it finds what is off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rvae_fast import _attributions
from rvae_fast.detector import AEDetector, RVAEDetector
from rvae_fast.ensemble import EnsembleDetector
from tests.detector.conftest import SMALL


@pytest.mark.parametrize("score", ["reconstruction", "elbo", "sap", "nap", "local", "hyperplane"])
def test_one_value_at_a_time(score: str, table: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attributions, "BLOCK_BYTES", 8 * 6 * 6 * 3)  # three rows at once
    detector = RVAEDetector(**{**SMALL, "anomaly_score": score}).fit(table)
    rows = table[:8] * [1, 1, 1, 1, 1, 1.2]
    found = detector.feature_attributions(rows)
    assert found.shape == (8, 6)
    expected, scores = detector.reconstruct(rows), -detector.score_samples(rows)
    for j in range(6):
        changed = rows.copy()
        changed[:, j] = expected[:, j]
        np.testing.assert_allclose(found[:, j], scores + detector.score_samples(changed), rtol=1e-6, atol=1e-6)


def test_of_many_columns_some_are_changed_at_once(table: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = RVAEDetector(**SMALL).fit(table)
    expected = detector.feature_attributions(table[:3])
    at_once: list[int] = []
    score_samples = RVAEDetector.score_samples

    def counted(self: RVAEDetector, X: Any) -> Any:
        at_once.append(len(X))
        return score_samples(self, X)

    monkeypatch.setattr(RVAEDetector, "score_samples", counted)
    monkeypatch.setattr(_attributions, "BLOCK_BYTES", 8 * 6 * 4)  # four changed rows
    np.testing.assert_array_equal(detector.feature_attributions(table[:3]), expected)
    assert at_once == [3, *[4, 2] * 3]


@pytest.mark.parametrize("score", ["reconstruction", "nap", "hyperplane"])
def test_the_column_that_is_off_is_found(score: str) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(1500, 3)) @ rng.normal(size=(3, 12))
    detector = RVAEDetector(random_state=0, device="cpu", epochs=40, anomaly_score=score).fit(X[:1400])
    rows, which = X[1400:].copy(), rng.integers(0, 12, size=100)
    rows[np.arange(100), which] += 3.0 * X.std(axis=0)[which]
    found = detector.feature_attributions(rows).argmax(axis=1)
    assert (found == which).mean() > 0.8, "one in twelve by chance"


def test_ensembles(table: np.ndarray) -> None:
    ensemble = EnsembleDetector(AEDetector(**SMALL), random_state=0).fit(table)
    rows = table[:3]
    changed = rows.copy()
    changed[:, 2] = ensemble.reconstruct(rows)[:, 2]
    falls = ensemble.score_samples(changed) - ensemble.score_samples(rows)
    np.testing.assert_allclose(ensemble.feature_attributions(rows)[:, 2], falls, rtol=1e-6, atol=1e-9)


def test_overflows_and_gaps(table: np.ndarray) -> None:
    detector = AEDetector(**SMALL, scaler=None).fit(table[:, [0, 1, 4]])
    rows = np.array([[0.5, 1e300, 0.1], [0.5, 0.5, 0.1]])
    found = detector.feature_attributions(rows)
    assert found[0].tolist() == [0.0, np.inf, 0.0], "without the second value there is a score"
    assert np.isfinite(found[1]).all()
    filled = AEDetector(**SMALL, missing="median").fit(table)
    gap = table[:2].copy()
    gap[0, 3] = np.nan
    assert np.isfinite(filled.feature_attributions(gap)).all()


def test_what_is_refused_is_told_of_the_rows_given(table: np.ndarray) -> None:
    detector = AEDetector(**SMALL).fit(table)
    with pytest.raises(ValueError, match="6 features"):
        detector.feature_attributions(table[:, :5])
    with pytest.raises(ValueError, match="NaN"):
        detector.feature_attributions(np.full((1, 6), np.nan))


def test_names_are_checked_once(table: np.ndarray, recwarn: Any) -> None:
    pandas = pytest.importorskip("pandas", reason="the data extra is not installed: no data frames")
    frame = pandas.DataFrame(table, columns=list("abcdef"))
    detector = AEDetector(**SMALL).fit(frame)
    assert detector.feature_attributions(frame[:2]).shape == (2, 6)
    assert not recwarn.list
