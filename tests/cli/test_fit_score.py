"""``rvae-fast fit-score``: another score, the same network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from rvae_fast.datasets import novelty_split
from rvae_fast.serialization import load
from tests.cli.conftest import make_rows, write_csv

pytestmark = pytest.mark.filterwarnings("ignore:X does not have valid feature names")


def test_another_score(model: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    X, labels = make_rows(300, 30, seed=5)
    fresh, out = write_csv(tmp_path / "fresh.csv", X, labels), tmp_path / "planes.safetensors"
    said = json.loads(
        run("fit-score", model, fresh, "--label", "faulty", "--score-by", "hyperplane", "--contamination", 0.1,
            "-o", out, "--json").stdout
    )  # fmt: skip
    before, after = load(model), load(out)
    assert (said["rows"], said["left_out"], said["anomaly_score"]) == (270, 30, "hyperplane")
    assert (said["threshold"], said["threshold_before"]) == (after.threshold_, before.threshold_)
    expected = before.set_params(anomaly_score="hyperplane", contamination=0.1).fit_score(X[labels == 0])
    np.testing.assert_allclose(after.score_samples(X), expected.score_samples(X), rtol=1e-9)
    assert (after.predict(X[labels == 0]) == -1).sum() == 27
    for name, value in after.model_.state_dict().items():
        assert value.equal(before.model_.state_dict()[name])


def test_several_files(model: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    parts = [make_rows(n, 0, seed=seed) for n, seed in ((100, 1), (60, 2))]
    files = [write_csv(tmp_path / f"{i}.csv", X, labels) for i, (X, labels) in enumerate(parts)]
    out = tmp_path / "o"
    result = run("fit-score", model, *files, "--label", "faulty", "--score-by", "local", "-o", out)
    assert "160 normal rows\nscores by local; threshold " in result.stderr
    expected = load(model).set_params(anomaly_score="local").fit_score(np.concatenate([X for X, _ in parts]))
    assert load(out).threshold_ == pytest.approx(expected.threshold_, rel=1e-9)
    narrow = tmp_path / "narrow.csv"
    narrow.write_text("a,b\n1,2\n3,4\n")
    assert "narrow.csv" in run("fit-score", model, files[0], narrow, "-o", out, "--force", code=1).stderr


def test_parts_of_built_in_data_and_an_ensemble(tmp_path: Path, run: Callable[..., Any]) -> None:
    model, out = tmp_path / "m", tmp_path / "o"
    run("fit", "digits", "--novel", 0, "--members", 2, "--epochs", 1, "--widths", 8, "--blocks", 1, "-o", model)
    how = ("--part", "train,validation", "--score-by", "hyperplane")
    said = json.loads(run("fit-score", model, "digits", "--novel", 0, *how, "-o", out, "--json").stdout)
    digits = load_digits()
    split = novelty_split(digits.data, digits.target, 0, seed=0)
    assert said["rows"] == len(split.X_train) + len(split.validation_indices)
    after = load(out)
    assert [member.anomaly_score for member in (*after.estimators_, after.estimator)] == ["hyperplane"] * 3
    assert len(after.estimators_[1].hyperplane_.features) == said["rows"]
    assert after.predict(digits.data[:3]).shape == (3,)
    result = run("fit-score", model, "digits", "-o", out, "--force", code=2)
    assert "say which class is" in result.stderr


def test_views_of_images(tmp_path: Path, run: Callable[..., Any]) -> None:
    model, out, back = tmp_path / "m", tmp_path / "o", tmp_path / "back"
    shape = ("--widths", 8, "--blocks", 1, "--epochs", 1)
    run("fit", "digits", "--novel", 0, *shape, "--scaler", "none", "-o", model)
    run("fit-score", model, "digits", "--novel", 0, "--views", "image", "-o", out)
    before, after = load(model), load(out)
    assert (before.views, after.views) == (None, "image")
    X = load_digits().data[:20]
    assert (after.score_samples(X) > before.score_samples(X)).any()
    run("fit-score", out, "digits", "--novel", 0, "--views", "none", "-o", back)
    np.testing.assert_array_equal(load(back).score_samples(X), before.score_samples(X))
    result = run("fit-score", model, "digits", "--novel", 0, "--views", "8x9", "-o", out, "--force", code=1)
    assert "views has the shape (8, 9), 72 values, where the rows have 64 columns" in result.stderr
    run("fit", "digits", "--novel", 0, *shape, "--scaler", "standard", "-o", model, "--force")
    result = run("fit-score", model, "digits", "--novel", 0, "--views", "image", "-o", out, "--force", code=1)
    assert "--views needs --scaler none, got --scaler standard" in result.stderr


def test_refusals(model: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    X, labels = make_rows(50, 0, seed=5)
    fresh, out = write_csv(tmp_path / "fresh.csv", X, labels), tmp_path / "o"
    result = run("fit-score", model, fresh, "--label", "faulty", "--score-by", "planes", "-o", out, code=1)
    assert "--score-by must be one of" in result.stderr
    result = run("fit-score", model, fresh, "--label", "faulty", "--contamination", 0.8, "-o", out, code=1)
    assert "contamination" in result.stderr
    odd = write_csv(tmp_path / "odd.csv", X, np.ones(50, dtype=int))
    result = run("fit-score", model, odd, "--label", "faulty", "-o", out, code=1)
    assert "odd.csv: all of its 50 rows are labelled anomalies" in result.stderr
    assert "needs --label" in run("fit-score", model, fresh, "--anomaly-value", 1, "-o", out, code=2).stderr
    assert not out.exists()
    assert "exists; --force overwrites it" in run("fit-score", model, fresh, "-o", model, code=2).stderr
