"""``fit_score``: another score, or more rows to compare with, for a network that stays as it is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import rvae_fast.hyperplane
from rvae_fast._stepper import Stepper
from rvae_fast.detector import DETECTORS, RVAEDetector
from rvae_fast.ensemble import EnsembleDetector
from rvae_fast.serialization import load
from tests.detector.conftest import SMALL

SCORES = ["reconstruction", "elbo", "sap", "nap", "local", "hyperplane"]


@pytest.fixture(autouse=True)
def _few_rows() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="anomaly_score='nap' found")
        yield


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", DETECTORS)
def test_it_is_what_a_fit_by_that_score_learns(name: str, score: str, table: np.ndarray) -> None:
    detector_class = DETECTORS[name]
    if score == "elbo" and not detector_class._model_class.is_variational:
        score = "sap"
    wanted = detector_class(**SMALL, anomaly_score=score).fit(table)
    other = "sap" if score == "reconstruction" else "reconstruction"
    detector = detector_class(**SMALL, anomaly_score=other).fit(table)
    network = {key: value.clone() for key, value in detector.model_.state_dict().items()}
    assert detector.set_params(anomaly_score=score).fit_score(table) is detector
    assert all(value.equal(network[key]) for key, value in detector.model_.state_dict().items())
    np.testing.assert_array_equal(detector.score_samples(table), wanted.score_samples(table))
    assert detector.threshold_ == wanted.threshold_
    np.testing.assert_array_equal(detector.predict(table), wanted.predict(table))


@pytest.mark.parametrize("score", ["nap", "local", "hyperplane"])
def test_more_rows_to_compare_with(score: str, table: np.ndarray, tmp_path: Path) -> None:
    detector = RVAEDetector(**SMALL, anomaly_score=score, contamination=0.2).fit(table[:150])
    scaler, few = detector.scaler_, detector.score_samples(table[:5])
    detector.fit_score(table)
    assert detector.scaler_ is scaler
    assert not np.array_equal(detector.score_samples(table[:5]), few)
    flagged = (detector.predict(table) == -1).sum()
    assert 45 < flagged <= 60 if score == "nap" else flagged == 60  # by NAP each as if it had been held out
    if score == "hyperplane":
        assert len(detector.hyperplane_.features) == 300
    detector.save(tmp_path / "detector.safetensors")
    again = load(tmp_path / "detector.safetensors")
    np.testing.assert_array_equal(again.score_samples(table), detector.score_samples(table))
    assert again.threshold_ == detector.threshold_


def test_of_a_loaded_detector(table: np.ndarray, tmp_path: Path) -> None:
    RVAEDetector(**SMALL, anomaly_score="nap").fit(table).save(tmp_path / "nap.safetensors")
    detector = load(tmp_path / "nap.safetensors").set_params(anomaly_score="hyperplane").fit_score(table)
    detector.save(tmp_path / "hyperplane.safetensors")
    again = load(tmp_path / "hyperplane.safetensors")
    np.testing.assert_array_equal(again.predict(table), detector.predict(table))
    wanted = RVAEDetector(**SMALL, anomaly_score="hyperplane").fit(table)
    np.testing.assert_array_equal(again.score_samples(table), wanted.score_samples(table))


def test_back_to_the_score_of_before(table: np.ndarray) -> None:
    detector = RVAEDetector(**SMALL, anomaly_score="nap").fit(table)
    before, threshold = detector.score_samples(table), detector.threshold_
    detector.set_params(anomaly_score="hyperplane").fit_score(table).set_params(anomaly_score="nap")
    np.testing.assert_array_equal(detector.score_samples(table), before)
    with pytest.raises(NotFittedError, match="learn one for this score by fit_score"):
        detector.predict(table)
    assert detector.fit_score(table).threshold_ == threshold


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (lambda t: t[:, :4], "X has 4 features"),
        (lambda t: t[:1], "minimum of 2"),
        (lambda t: np.where(np.arange(6) == 2, np.nan, t), "column 2"),
        (lambda t: np.repeat(t[:1], 50, axis=0), "at least 4 distinct rows"),
    ],
)
def test_a_failure_leaves_the_detector_as_it_was(bad: Any, named: str, table: np.ndarray) -> None:
    detector = RVAEDetector(**SMALL, anomaly_score="hyperplane").fit(table)
    scores, threshold = detector.score_samples(table), detector.threshold_
    with pytest.raises(ValueError, match=named):
        detector.fit_score(bad(table))
    np.testing.assert_array_equal(detector.score_samples(table), scores)
    assert detector.threshold_ == threshold


def test_an_interrupt_leaves_the_detector_as_it_was(table: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = RVAEDetector(**SMALL, anomaly_score="hyperplane").fit(table)
    scores = detector.score_samples(table)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("rvae_fast._scored.hyperplane_parts", interrupted)  # after what it learns is learnt
    with pytest.raises(KeyboardInterrupt):
        detector.fit_score(table[:100])
    monkeypatch.undo()
    np.testing.assert_array_equal(detector.score_samples(table), scores)


def test_an_interrupt_before_the_first_step_leaves_nothing_of_an_earlier_fit(
    table: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = RVAEDetector(**SMALL).fit(table)
    assert detector.n_iter_ == len(detector.history_.epochs) > 0

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("rvae_fast._base_detector.train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        detector.fit(table)
    assert detector.history_.epochs == []
    assert detector.n_iter_ == 0


def test_parameters_are_checked(table: np.ndarray) -> None:
    with pytest.raises(NotFittedError):
        RVAEDetector(**SMALL).fit_score(table)
    detector = RVAEDetector(**SMALL).fit(table)
    with pytest.raises(ValueError, match="anomaly_score must be one of"):
        detector.set_params(anomaly_score="planes").fit_score(table)
    with pytest.raises(ValueError, match="contamination"):
        detector.set_params(anomaly_score="sap", contamination=0.9).fit_score(table)


def test_an_ensemble(table: np.ndarray) -> None:
    base = RVAEDetector(**{**SMALL, "random_state": None}, anomaly_score="hyperplane")
    wanted = EnsembleDetector(base, members=2, random_state=0).fit(table)
    plain = clone(base).set_params(anomaly_score="reconstruction")
    detector = EnsembleDetector(plain, members=2, random_state=0).fit(table)
    for member in detector.estimators_:
        member.set_params(anomaly_score="hyperplane")
    with pytest.raises(NotFittedError, match="call fit_score of the ensemble"):
        detector.predict(table)
    assert detector.fit_score(table) is detector
    np.testing.assert_array_equal(detector.score_samples(table), wanted.score_samples(table))
    assert detector.units_.tolist() == [1.0, 1.0]
    assert detector.threshold_ == wanted.threshold_
    assert not any(hasattr(member, "_training_scores") for member in detector.estimators_)


def test_a_member_that_learnt_by_itself(table: np.ndarray, tmp_path: Path) -> None:
    detector = EnsembleDetector(RVAEDetector(**{**SMALL, "random_state": None}), members=2, random_state=0).fit(table)
    detector.save(tmp_path / "m")
    before = detector.predict(table)
    for ensemble in (detector, load(tmp_path / "m")):
        np.testing.assert_array_equal(ensemble.predict(table), before)
        ensemble.estimators_[1].fit_score(table[:100])
        with pytest.raises(NotFittedError, match=r"estimators_\[1\] was fitted by itself after the ensemble"):
            ensemble.predict(table)
        with pytest.raises(ValueError, match="minimum of 2"):
            ensemble.fit_score(table[:1])
        with pytest.raises(NotFittedError, match=r"estimators_\[1\]"):
            ensemble.predict(table)
        np.testing.assert_array_equal(ensemble.fit_score(table).predict(table), before)


def test_an_ensemble_whose_second_member_fails_is_as_it_was(table: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    base = RVAEDetector(**{**SMALL, "random_state": None}, anomaly_score="hyperplane")
    detector = EnsembleDetector(base, members=2, random_state=0).fit(table)
    scores, threshold = detector.score_samples(table), detector.threshold_
    fits = iter([rvae_fast.hyperplane.fit_hyperplane])

    def once(*args: Any, **options: Any) -> Any:
        for fit in fits:
            return fit(*args, **options)
        raise MemoryError("no room")

    monkeypatch.setattr("rvae_fast._scored.fit_hyperplane", once)
    with pytest.raises(MemoryError, match="no room"):
        detector.fit_score(table[:100])
    np.testing.assert_array_equal(detector.score_samples(table), scores)
    assert detector.threshold_ == threshold


def test_of_an_interrupted_training(table: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Stepper.step

    def interrupted(self: Stepper, number: int, group: Any) -> None:
        if number == 5:  # of 2 an epoch
            raise KeyboardInterrupt
        step(self, number, group)

    detector = RVAEDetector(**{**SMALL, "epochs": 9})
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            detector.fit(table)
    with pytest.raises(NotFittedError):
        detector.predict(table)
    assert detector.n_iter_ == 2
    assert (detector.fit_score(table).predict(table) == -1).sum() == 30
    detector.save(tmp_path / "m")
    np.testing.assert_array_equal(load(tmp_path / "m").score_samples(table), detector.score_samples(table))
