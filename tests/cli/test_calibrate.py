"""``rvae-fast calibrate``: another threshold, everything else as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from rvae_fast._conformal import conformal_offset
from rvae_fast.datasets import novelty_split
from rvae_fast.serialization import load
from tests.cli.conftest import make_rows, write_csv

pytestmark = pytest.mark.filterwarnings("ignore:X does not have valid feature names")


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "fresh.csv", *make_rows(300, 30, seed=5))


def test_only_the_threshold_is_another(model: Path, fresh: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    out = tmp_path / "c.safetensors"
    result = run("calibrate", model, fresh, "--label", "faulty", "--false-alarms", 0.05, "-o", out, "--json")
    said = json.loads(result.stdout)
    before, after = load(model), load(out)
    X, labels = make_rows(300, 30, seed=5)
    expected = conformal_offset(before.score_samples(X[labels == 0]), 0.05)
    assert after.offset_ == pytest.approx(expected, rel=1e-9)
    assert (said["rows"], said["left_out"], said["flagged"]) == (270, 30, 12)
    assert (said["threshold"], said["threshold_before"]) == (after.threshold_, before.threshold_)
    np.testing.assert_array_equal(after.score_samples(X), before.score_samples(X))
    assert after.get_params() == before.get_params()
    assert "left out 30 labelled anomalies" in result.stderr


def test_the_same_file_with_force(model: Path, fresh: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(model.read_bytes())
    assert "exists; --force overwrites it" in run("calibrate", own, fresh, "-o", own, code=2).stderr
    run("calibrate", own, fresh, "-o", own, "--force", "--device", "cpu", "-q")
    assert load(own).threshold_ != load(model).threshold_
    assert load(own).device == load(model).device


def test_refusals(model: Path, fresh: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    out = tmp_path / "c.safetensors"
    for rate in (0, 0.7, "nan"):
        result = run("calibrate", model, fresh, "-o", out, "--false-alarms", rate, code=2)
        assert "must be above 0 and at most 0.5" in result.stderr
    result = run("calibrate", model, fresh, "--label", "faulty", "-o", out, "--false-alarms", 0.001, code=1)
    assert "--false-alarms 0.001 needs at least 999 rows, " in result.stderr
    assert result.stderr.endswith("fresh.csv are 270\n")
    result = run("calibrate", model, fresh, "--anomaly-value", 1, "-o", out, code=2)
    assert "needs --label" in result.stderr
    assert not out.exists()


def test_built_in_data_give_their_validation_rows(tmp_path: Path, run: Callable[..., Any]) -> None:
    model, out = tmp_path / "m", tmp_path / "c"
    quick = ("--epochs", 1, "--widths", 8, "--blocks", 1)
    run("fit", "digits", "--novel", 0, *quick, "-o", model)
    said = json.loads(run("calibrate", model, "digits", "--novel", 0, "-o", out, "--json").stdout)
    digits = load_digits()
    split = novelty_split(digits.data, digits.target, 0, seed=0)
    assert (said["rows"], said["left_out"]) == (len(split.validation_indices), 0)
    result = run("calibrate", model, "digits", "-o", out, "--force", code=2)
    assert "say which class is" in result.stderr
