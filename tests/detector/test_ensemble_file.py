"""An ensemble's file: what is saved comes back bit for bit, and every other file is refused with its reason."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

from rvae_fast.detector import RVAEDetector
from rvae_fast.ensemble import EnsembleDetector
from rvae_fast.serialization import FileFormatError, load
from tests.detector.conftest import SMALL
from tests.helpers.files import rewrite

QUICK: dict[str, Any] = {name: value for name, value in SMALL.items() if name != "random_state"}


def small(**parameters: Any) -> RVAEDetector:
    return RVAEDetector(**{**QUICK, **parameters})


@pytest.mark.parametrize("members", [2, [{}, {"learning_rate": np.float64(1e-3), "widths": (8,)}]])
@pytest.mark.parametrize("score", ["reconstruction", "nap", "hyperplane"])
@pytest.mark.filterwarnings("ignore:anomaly_score='nap' found")
def test_round_trip(members: Any, score: str, table: np.ndarray, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(table, columns=list("abcdef"))
    detector = EnsembleDetector(
        small(anomaly_score=score), members=members, contamination=0.2, random_state=np.int64(3)
    ).fit(frame)
    path = tmp_path / "m.safetensors"
    detector.save(path)
    for loaded in (load(path), load(path, device="cpu"), pickle.loads(pickle.dumps(detector))):
        assert type(loaded) is EnsembleDetector
        np.testing.assert_array_equal(loaded.score_samples(frame), detector.score_samples(frame))
        np.testing.assert_array_equal(loaded.predict(frame), detector.predict(frame))
        assert loaded.offset_ == detector.offset_
        assert loaded.feature_names_in_.tolist() == list("abcdef")
        assert (loaded.contamination, loaded.random_state) == (0.2, 3)
        assert type(loaded.estimator) is RVAEDetector
        assert loaded.estimator.anomaly_score == score
        assert len(loaded.members if isinstance(members, list) else loaded.estimators_) == 2
    loaded = load(path)
    np.testing.assert_array_equal(loaded.fit(frame).score_samples(frame), detector.score_samples(frame))


def test_round_trip_of_the_default_estimator(table: np.ndarray, tmp_path: Path) -> None:
    detector = EnsembleDetector(members=[{**QUICK}], random_state=0).fit(table)
    detector.save(tmp_path / "m")
    assert load(tmp_path / "m").estimator is None
    assert load(tmp_path / "m", device="cpu").estimators_[0].device == "cpu"


class Own(EnsembleDetector):
    """Somebody's own."""


class OwnMember(RVAEDetector):
    """Somebody's own too."""


def test_what_cannot_be_saved(table: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "m"
    with pytest.raises(NotFittedError):
        EnsembleDetector(small()).save(path)
    with pytest.raises(TypeError, match="the subclass Own: load could not make it again"):
        Own(small()).fit(table).save(path)
    with pytest.raises(TypeError, match="the subclass OwnMember"):
        EnsembleDetector(OwnMember(**QUICK)).fit(table).save(path)
    detector = EnsembleDetector(small()).fit(table).set_params(estimator=OwnMember(**QUICK))
    with pytest.raises(TypeError, match="its estimator is OwnMember"):
        detector.save(path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d["units"].pop(), "holds 2 members and 1 units"),
        (lambda d, t: d.pop("detectors"), "lacks 'detectors', which an ensemble EnsembleDetector must have"),
        (lambda d, t: d["detectors"][1].pop("scaler"), "lacks 'scaler', which member 1 of an ensemble must have"),
        (lambda d, t: t.pop("1.model.encoder.0.weight"), "encoder.0.weight is missing"),
        (lambda d, t: d["estimator"].update({"class": "Other"}), "an ensemble of Other"),
        (lambda d, t: d["detectors"][0].update({"class": "Other"}), "a detector of class 'Other'"),
    ],
)
def test_a_file_of_something_else(change: Any, message: str, table: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "m"
    EnsembleDetector(small(), random_state=0).fit(table).save(path)
    rewrite(path, change)
    with pytest.raises(FileFormatError, match=message):
        load(path)
