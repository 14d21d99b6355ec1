"""Calibration: the rate of false alarms that it promises, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

from rvae_fast._conformal import conformal_offset
from rvae_fast.detector import RVAEDetector
from rvae_fast.ensemble import EnsembleDetector
from rvae_fast.serialization import load
from tests.detector.conftest import SMALL


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (100, 0.05), (699, 0.01), (700, 0.013), (3, 0.25)])
def test_the_rate_is_kept_in_the_mean_and_nearly_used(n: int, rate: float) -> None:
    """A further row is as likely at any rank: over all of them, the flagged are k of n + 1, the most that rate lets."""
    scores = np.random.default_rng(0).normal(size=n + 1)
    flagged = sum(scores[i] < conformal_offset(np.delete(scores, i), rate) for i in range(n + 1))
    assert flagged / (n + 1) <= rate + 1e-12
    assert (flagged + 1) / (n + 1) > rate


def test_ties_are_on_the_safe_side() -> None:
    offset = conformal_offset(np.zeros(100), 0.05)
    assert offset == 0.0
    assert not (np.zeros(50) < offset).any()


@pytest.mark.parametrize(("rate", "needed"), [(0.01, 99), (0.001, 999), (0.5, 1), (1 / 3, 2)])
def test_how_many_rows_it_takes(rate: float, needed: int) -> None:
    conformal_offset(np.arange(float(needed)), rate)
    with pytest.raises(ValueError, match=rf"needs at least {needed:,} rows, X has {needed - 1:,}"):
        conformal_offset(np.arange(float(needed - 1)), rate)


@pytest.mark.parametrize(("rate", "needed"), [(1e-300, "1e\\+300"), (5e-324, "inf")])
def test_rates_that_no_table_is_long_enough_for(rate: float, needed: str) -> None:
    with pytest.raises(ValueError, match=f"needs at least {needed} rows"):
        conformal_offset(np.zeros(3), rate)


def test_rows_without_a_finite_score() -> None:
    with pytest.raises(ValueError, match="1 of 100 rows have NaN for a score"):
        conformal_offset(np.r_[np.nan, np.zeros(99)], 0.05)
    scores = np.r_[np.full(3, -np.inf), np.arange(97.0)]
    assert conformal_offset(scores, 0.05) == 1.0  # the fifth smallest
    with pytest.raises(ValueError, match=r"3 of 100 rows have no finite score, more than false_alarm_rate=0.02"):
        conformal_offset(scores, 0.02)


@pytest.mark.parametrize("several", [False, True])
def test_detectors(several: bool, table: np.ndarray, tmp_path: Path) -> None:
    detector: Any = RVAEDetector(**SMALL)
    detector = EnsembleDetector(detector, random_state=0) if several else detector
    fitted = detector.fit(table[:150]).offset_
    assert detector.calibrate(table[150:], false_alarm_rate=0.05) is detector
    assert detector.offset_ != fitted
    assert detector.offset_ == conformal_offset(detector.score_samples(table[150:]), 0.05)
    assert (detector.predict(table[150:]) < 0).sum() == 6  # of 150, the rows below the seventh
    detector.save(tmp_path / "m")
    assert load(tmp_path / "m").offset_ == detector.offset_
    detector.threshold_ = 3
    assert (detector.threshold_, detector.offset_) == (3.0, -3.0)
    np.testing.assert_array_equal(detector.predict(table) < 0, -detector.score_samples(table) > 3)


def test_a_score_set_after_fit_gets_its_threshold(table: np.ndarray, tmp_path: Path) -> None:
    detector = RVAEDetector(**SMALL).fit(table).set_params(anomaly_score="sap")
    with pytest.raises(NotFittedError, match="learn one for this score by fit_score, place one by calibrate"):
        detector.predict(table)
    detector.calibrate(table, false_alarm_rate=0.1)
    assert (detector.predict(table) < 0).sum() == 29
    detector.save(tmp_path / "m")
    assert load(tmp_path / "m").threshold_ == detector.threshold_
    detector.set_params(anomaly_score="nap")
    with pytest.raises(NotFittedError, match="took nothing for it of the rows: call fit_score"):
        detector.calibrate(table)


def test_members_that_changed(table: np.ndarray) -> None:
    detector = EnsembleDetector(RVAEDetector(**SMALL), random_state=0).fit(table)
    detector.estimators_[0].set_params(anomaly_score="sap")
    with pytest.raises(NotFittedError, match="anomaly_score='sap' was set on estimators_"):
        detector.calibrate(table)


@pytest.mark.parametrize(
    ("rate", "error"), [(0, ValueError), (0.6, ValueError), (np.nan, ValueError), ("a", TypeError), (True, TypeError)]
)
def test_rates_that_are_none(rate: Any, error: type[Exception], table: np.ndarray) -> None:
    detector = RVAEDetector(**SMALL).fit(table)
    before = detector.offset_
    with pytest.raises(error, match="false_alarm_rate must be"):
        detector.calibrate(table, false_alarm_rate=rate)
    with pytest.raises(ValueError, match="needs at least 999 rows, X has 300"):
        detector.calibrate(table, false_alarm_rate=0.001)
    assert detector.offset_ == before


@pytest.mark.parametrize("value", [np.nan, np.inf, "3", True, None, [3.0]])
def test_thresholds_that_are_none(value: Any, table: np.ndarray) -> None:
    detector = RVAEDetector(**SMALL).fit(table)
    with pytest.raises(ValueError, match="threshold_ must be a finite number"):
        detector.threshold_ = value


def test_before_fit(table: np.ndarray) -> None:
    with pytest.raises(NotFittedError):
        RVAEDetector().calibrate(table)
    with pytest.raises(NotFittedError):
        RVAEDetector().threshold_ = 3.0
