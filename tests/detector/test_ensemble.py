"""Ensembles: what the members are, what their mean is, and what survives where one of them fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

from rvae_fast._base_detector import BaseDetector
from rvae_fast._stepper import Stepper
from rvae_fast.detector import DETECTORS, RAEDetector, RVAEDetector
from rvae_fast.ensemble import EnsembleDetector
from rvae_fast.presets import preset
from rvae_fast.serialization import load
from rvae_fast.training import NonFiniteError
from tests.detector.conftest import SMALL

QUICK: dict[str, Any] = {name: value for name, value in SMALL.items() if name != "random_state"}


def small(**parameters: Any) -> RVAEDetector:
    return RVAEDetector(**{**QUICK, **parameters})


@pytest.mark.parametrize("score", ["reconstruction", "sap", "hyperplane"])
def test_the_score_is_the_members_mean_in_their_units(score: str, table: np.ndarray) -> None:
    detector = EnsembleDetector(small(anomaly_score=score), members=3, random_state=0).fit(table[:200])
    own = [-member.score_samples(table) for member in detector.estimators_]
    if score == "hyperplane":
        assert detector.units_.tolist() == [1.0] * 3
    else:
        np.testing.assert_allclose(detector.units_, [scores[:200].mean() for scores in own], rtol=1e-12)
    expected = np.mean([scores / unit for scores, unit in zip(own, detector.units_, strict=True)], axis=0)
    np.testing.assert_allclose(detector.score_samples(table), -expected, rtol=1e-12)
    assert detector.threshold_ == -detector.offset_
    assert (detector.predict(table[:200]) < 0).sum() == 20  # the contamination's share
    np.testing.assert_array_equal(np.concatenate(list(detector.score_chunks([table[:7], table[7:]]))),
                                  detector.score_samples(table))  # fmt: skip


def test_members_differ_by_their_seeds_and_an_int_repeats_them(table: np.ndarray) -> None:
    first, again, other = (EnsembleDetector(small(), members=2, random_state=s).fit(table) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.score_samples(table), again.score_samples(table))
    assert (first.score_samples(table) != other.score_samples(table)).any()
    a, b = first.estimators_
    assert a.random_state != b.random_state
    assert (a.score_samples(table) != b.score_samples(table)).any()


def test_members_have_their_own_parameters(table: np.ndarray) -> None:
    base = small(random_state=5, learning_rate=1e-2)
    members = [{}, {"learning_rate": 1e-3, "random_state": 7}]
    detector = EnsembleDetector(base, members=members, random_state=0).fit(table)
    a, b = detector.estimators_
    assert (a.learning_rate, b.learning_rate, b.random_state) == (1e-2, 1e-3, 7)
    assert a.random_state not in (5, 7)
    assert not hasattr(base, "model_")
    assert members == [{}, {"learning_rate": 1e-3, "random_state": 7}]
    one = small(random_state=7, learning_rate=1e-3).fit(table)
    np.testing.assert_array_equal(b.score_samples(table), one.score_samples(table))


def test_reconstruction_and_errors_are_means(table: np.ndarray) -> None:
    detector = EnsembleDetector(RAEDetector(**QUICK), random_state=0).fit(table)
    a, b = detector.estimators_
    np.testing.assert_allclose(detector.reconstruct(table), (a.reconstruct(table) + b.reconstruct(table)) / 2)
    for units in ("input", "score"):
        expected = (a.feature_errors(table, units=units) + b.feature_errors(table, units=units)) / 2
        np.testing.assert_allclose(detector.feature_errors(table, units=units), expected)


def test_a_table_without_an_error_has_a_score(table: np.ndarray) -> None:
    with pytest.warns(UserWarning, match="constant columns 0, 1"):
        detector = EnsembleDetector(small(init="zero"), random_state=0).fit(np.ones((40, 2)))
    assert np.isfinite(detector.score_samples(np.ones((3, 2)))).all()


def test_names_of_columns(table: np.ndarray) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(table, columns=list("abcdef"))
    detector = EnsembleDetector(small(), random_state=0).fit(frame)
    assert detector.feature_names_in_.tolist() == list("abcdef")
    with pytest.raises(ValueError, match="feature names should match"):
        detector.score_samples(frame[list("bacdef")])
    frame.iloc[3, 2] = np.nan
    with pytest.raises(ValueError, match="'c'"):
        detector.score_samples(frame)
    detector.fit(table)
    assert not hasattr(detector, "feature_names_in_")


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"members": 0}, ValueError, "members must be at least 1, got 0"),
        ({"members": []}, ValueError, "at least one dict"),
        ({"members": True}, TypeError, "members must be a number or a list of dicts of parameters, got True"),
        ({"members": {"epochs": 3}}, TypeError, "members must be a number or a list of dicts"),
        ({"members": "two"}, TypeError, "members must be a number or a list of dicts"),
        ({"members": [{}, 3]}, TypeError, r"members\[1\] must be a dict of parameters, got 3"),
        ({"members": [{"learnig_rate": 1}]}, ValueError, r"members\[0\] has 'learnig_rate', which is no parameter of"),
        ({"members": [{}, {"epochs": -1}]}, ValueError, "epochs must be an integer of at least 1, got -1"),
        ({"members": [{}, {"anomaly_score": "x"}]}, ValueError, "anomaly_score must be one of"),
        ({"members": [{}, {"activation": "x"}]}, ValueError, "activation"),
        ({"members": [{}, {"device": "nowhere"}]}, ValueError, "device must be"),
        ({"members": [{}, {"resume": True}]}, ValueError, "checkpoint must be a path when resume is set"),
        ({"members": [{}, {"checkpoint": "/nowhere/run.ckpt"}]}, FileNotFoundError, "there is no directory"),
        ({"estimator": 3}, TypeError, r"estimator must be a detector of rvae_fast such as RVAEDetector\(\), got 3"),
        ({"estimator": RVAEDetector}, TypeError, "estimator must be a detector of rvae_fast"),
        ({"contamination": 0.7}, ValueError, "contamination must be in"),
    ],
)
def test_bad_parameters_are_found_before_any_training(
    parameters: Any, error: type[Exception], message: str, table: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseDetector, "_learn", lambda self, X: pytest.fail("a member was trained"))
    with pytest.raises(error, match=message):
        EnsembleDetector(**{"estimator": small(), **parameters}).fit(table)


def test_before_fit(table: np.ndarray) -> None:
    detector = EnsembleDetector(small())
    for ask in (detector.score_samples, detector.predict, detector.reconstruct, detector.feature_errors):
        with pytest.raises(NotFittedError):
            ask(table)


def test_what_was_trained_survives_a_member_that_fails(table: np.ndarray) -> None:
    wild = {"learning_rate": 1e30, "max_grad_norm": None, "warmup_epochs": 0, "optimizer": "adam", "epochs": 20}
    detector = EnsembleDetector(small(), members=[{}, wild, {}], random_state=0)
    with pytest.raises(NonFiniteError):
        detector.fit(table)
    done, broken = detector.estimators_
    assert np.isfinite(done.score_samples(table)).all()
    assert all(p.isfinite().all() for p in broken.model_.parameters())
    assert not any(name.startswith(("_keeps", "_training")) for member in detector.estimators_ for name in vars(member))
    with pytest.raises(NotFittedError):
        detector.score_samples(table)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_member_that_scores_by_something_else_now_has_no_threshold(
    loaded: bool, table: np.ndarray, tmp_path: Path
) -> None:
    detector = EnsembleDetector(small(), random_state=0).fit(table)
    if loaded:
        detector.save(tmp_path / "saved")
        detector = load(tmp_path / "saved")
    detector.estimators_[1].set_params(anomaly_score="sap")
    asked = [lambda: detector.threshold_, lambda: detector.predict(table), lambda: detector.save(tmp_path / "m"),
             lambda: detector.calibrate(table)]  # fmt: skip
    for calibrated in (False, True):  # by itself a member may be calibrated: the ensemble's units stay those of before
        if calibrated:
            detector.estimators_[1].calibrate(table)
        for ask in asked:
            message = r"anomaly_score='sap' was set on estimators_\[1\] after the ensemble's fit"
            with pytest.raises(NotFittedError, match=message):
                ask()
    assert not (tmp_path / "m").exists()


class Logarithms(RVAEDetector):
    """Somebody's own, which fits and scores something else than it is given."""

    def fit(self, X: Any, y: Any = None) -> Logarithms:
        super().fit(np.log1p(np.abs(X)))
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        return super().score_samples(np.log1p(np.abs(X)))


def test_the_fit_of_a_subclass_is_called(table: np.ndarray) -> None:
    detector = EnsembleDetector(Logarithms(**QUICK), random_state=0).fit(table)
    assert (detector.predict(table) < 0).sum() == 30


def test_the_table_s_warnings_come_once(table: np.ndarray) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(table, columns=list("abcdef")).assign(b=1.0)
    with pytest.warns(UserWarning) as caught:  # noqa: PT030
        detector = EnsembleDetector(small(), members=3, random_state=0).fit(frame)
    assert [str(w.message)[:19] for w in caught] == ["constant column 'b'"]
    with pytest.warns(UserWarning) as caught:  # noqa: PT030
        detector.score_samples(frame.to_numpy())
    assert [str(w.message)[:33] for w in caught] == ["X does not have valid feature nam"]


def test_an_interrupt_in_the_second_member(table: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.ckpt"

    def ensemble(**more: Any) -> EnsembleDetector:
        return EnsembleDetector(small(checkpoint=str(path), **more), members=3, random_state=0)

    whole = ensemble().fit(table)
    train, steps, counted = Stepper.step, 0, 0

    def interrupted(self: Stepper, step: int, group: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 11:  # a member has 3 epochs of 2 steps
            raise KeyboardInterrupt
        train(self, step, group)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensemble().fit(table)
    assert [(tmp_path / f"run.ckpt.{i}").exists() for i in range(3)] == [True, True, False]  # not the whole run's

    def counting(self: Stepper, step: int, group: Any) -> None:
        nonlocal counted
        counted += 1
        train(self, step, group)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", counting)
        resumed = ensemble(resume=True).fit(table)
    assert counted == 2 + 6  # what was left of the second, and the third
    np.testing.assert_array_equal(resumed.score_samples(table), whole.score_samples(table))


def test_bad_rows_cost_no_checkpoint(table: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    EnsembleDetector(small(checkpoint=str(path)), random_state=0).fit(table)
    before = [(tmp_path / f"run.ckpt.{i}").read_bytes() for i in range(2)]
    table[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 NaN"):
        EnsembleDetector(small(checkpoint=str(path)), random_state=0).fit(table)
    bernoulli = {"likelihood": "bernoulli", "scaler": None}
    with pytest.raises(ValueError, match="needs values in"):
        EnsembleDetector(small(checkpoint=str(path)), members=[{}, bernoulli]).fit(np.nan_to_num(table))
    assert [(tmp_path / f"run.ckpt.{i}").read_bytes() for i in range(2)] == before
    EnsembleDetector(small(missing="mean"), random_state=0).fit(table)


def test_resume_stated_by_a_member(table: np.ndarray, tmp_path: Path) -> None:
    members = [{"checkpoint": str(tmp_path / "a"), "resume": "auto"}, {}]
    first, again = (EnsembleDetector(small(), members=members).fit(table) for _ in range(2))
    a, b = first.estimators_[0], again.estimators_[0]
    np.testing.assert_array_equal(a.score_samples(table), b.score_samples(table))


def test_checkpoints_of_each_member(table: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    detector = EnsembleDetector(small(checkpoint=str(path)), random_state=0).fit(table)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.ckpt.0", "run.ckpt.1"]
    (tmp_path / "run.ckpt.1").unlink()
    for seed in (0, None):  # without one, the seeds are those of the checkpoints
        again = EnsembleDetector(small(checkpoint=str(path), resume=True), random_state=seed).fit(table)
        np.testing.assert_array_equal(again.estimators_[0].score_samples(table),
                                      detector.estimators_[0].score_samples(table))  # fmt: skip
    np.testing.assert_array_equal(again.score_samples(table), detector.score_samples(table))


@pytest.mark.parametrize("detector", DETECTORS.values())
def test_every_detector_can_be_the_estimator(detector: Any, table: np.ndarray) -> None:
    scores = EnsembleDetector(detector(**QUICK), random_state=0).fit(table).score_samples(table)
    assert scores.shape == (300,)
    assert np.isfinite(scores).all()


def test_the_preset(table: np.ndarray) -> None:
    detector = EnsembleDetector(**preset("image-two-rates"))
    assert detector.estimator.get_params() == RVAEDetector(**preset("image-hyperplane")).get_params()
    assert detector.members == [{}, {"learning_rate": 1e-3}]
    preset("image-two-rates")["members"].clear()
    assert len(preset("image-two-rates")["members"]) == 2
    detector.estimator.set_params(n_layers=None, **QUICK)
    rates = [member.learning_rate for member in detector.fit(table).estimators_]
    assert rates == [2e-3, 1e-3]
