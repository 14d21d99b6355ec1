"""A threshold by rows that a copy has not seen: what it is, what stays as it was, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import KFold
from sklearn.utils import check_random_state

from rvae_fast._conformal import conformal_offset
from rvae_fast._cross_calibration import held_out_scores
from rvae_fast.detector import RVAEDetector, VAEDetector
from rvae_fast.ensemble import EnsembleDetector
from rvae_fast.serialization import load
from tests.detector.conftest import SMALL


def rows(n: int, seed: int) -> np.ndarray:
    """Five directions of 16, and noise: few rows of them can be learnt by heart."""
    mixing = np.random.default_rng(0).normal(size=(5, 16))
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=(n, 5)) @ mixing + 0.5 * rng.normal(size=(n, 16)))


def test_rows_known_by_heart_no_longer_set_the_threshold() -> None:
    X, new = rows(120, 1), rows(2000, 2)
    detector = RVAEDetector(epochs=400, kld_weight=0.1, random_state=0, device="cpu").fit(X)
    scores = detector.score_samples(new)
    assert (scores < detector.offset_).mean() > 0.6, "a tenth was intended"
    assert detector.cross_calibrate(X) is detector
    np.testing.assert_array_equal(detector.score_samples(new), scores)
    flagged = (detector.predict(new) == -1).mean()
    assert 0.02 < flagged < 0.2
    detector.cross_calibrate(X, false_alarm_rate=0.3)
    assert (detector.predict(new) == -1).mean() > flagged


@pytest.mark.parametrize("score", ["reconstruction", "nap", "hyperplane"])
@pytest.mark.filterwarnings("ignore:anomaly_score='nap' found")
def test_every_row_is_scored_by_a_copy_that_has_not_seen_it(score: str, table: np.ndarray) -> None:
    detector = RVAEDetector(**{**SMALL, "anomaly_score": score, "random_state": 3}).fit(table)
    found = held_out_scores(detector, table, 3)
    seed = int(check_random_state(3).randint(2**31 - 1))
    for learnt, held in KFold(3, shuffle=True, random_state=seed).split(table):
        own = clone(detector).fit(table[learnt]).score_samples(table[held])
        np.testing.assert_allclose(found[held], own, rtol=1e-9)
    detector.cross_calibrate(table, folds=3)
    assert detector.offset_ == conformal_offset(found, detector.contamination)


def test_ensembles_keep_their_units(table: np.ndarray) -> None:
    ensemble = EnsembleDetector(VAEDetector(**SMALL), members=[{}, {"learning_rate": 1e-3}], random_state=0)
    ensemble.fit(table)
    before, units, scores = ensemble.offset_, ensemble.units_.copy(), ensemble.score_samples(table)
    ensemble.cross_calibrate(table, folds=2, false_alarm_rate=0.2)
    assert ensemble.offset_ != before
    np.testing.assert_array_equal(ensemble.units_, units)
    np.testing.assert_array_equal(ensemble.score_samples(table), scores)
    ensemble.estimators_[0].set_params(anomaly_score="sap")
    with pytest.raises(NotFittedError, match="was set on estimators_"):
        ensemble.cross_calibrate(table)


@pytest.mark.parametrize("several", [False, True])
def test_checkpoints_are_the_detectors_own(several: bool, table: np.ndarray, tmp_path: Path) -> None:
    one = RVAEDetector(**{**SMALL, "checkpoint": str(tmp_path / "run.ckpt")})
    members = [{}, {"checkpoint": str(tmp_path / "other.ckpt")}]
    detector: Any = EnsembleDetector(one, members=members, random_state=0) if several else one
    detector.fit(table)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before
    detector.cross_calibrate(table, folds=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert one.checkpoint is not None


def test_frames_and_files(table: np.ndarray, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="the data extra is not installed: no data frames")
    frame = pandas.DataFrame(table, columns=[f"sensor{i}" for i in range(table.shape[1])])
    detector = RVAEDetector(**SMALL).fit(frame).cross_calibrate(frame, folds=2)
    detector.save(tmp_path / "m")
    assert load(tmp_path / "m").offset_ == detector.offset_
    with pytest.raises(ValueError, match="feature names"):
        detector.cross_calibrate(frame.rename(columns={"sensor0": "other"}))


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"folds": 1}, ValueError, "folds must be at least 2 and at most the number of rows, 20, got 1"),
        ({"folds": 21}, ValueError, "folds must be at least 2 and at most the number of rows, 20, got 21"),
        ({"folds": 2.5}, TypeError, "folds must be a whole number, got 2.5"),
        ({"folds": True}, TypeError, "folds must be a whole number, got True"),
        ({"false_alarm_rate": 0.7}, ValueError, "false_alarm_rate"),
        ({"false_alarm_rate": 0.01}, ValueError, "needs at least 99 rows, X has 20"),
    ],
)
def test_refused_before_any_training(
    given: dict[str, Any], error: type[Exception], told: str, table: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = RVAEDetector(**SMALL).fit(table[:20])
    before = detector.offset_
    monkeypatch.setattr("rvae_fast._base_detector.train", lambda *args, **kwargs: pytest.fail("was trained"))
    with pytest.raises(error, match=told):
        detector.cross_calibrate(table[:20], **given)
    with pytest.raises(NotFittedError):
        RVAEDetector().cross_calibrate(table)
    assert detector.offset_ == before


def test_two_rows_are_too_few(table: np.ndarray) -> None:
    detector = RVAEDetector(**SMALL).fit(table[:2])
    with pytest.raises(ValueError, match="2 in 2 folds leave a copy fewer than 2 to learn from"):
        detector.cross_calibrate(table[:2], folds=2, false_alarm_rate=0.5)
