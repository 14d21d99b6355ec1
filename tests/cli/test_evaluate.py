"""``rvae-fast evaluate``: figures beside those of the library, its report, and labels of any kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvae_fast.report import evaluate_scores
from rvae_fast.serialization import load
from tests.cli.conftest import make_rows, parse, write_csv

Run = Callable[..., Any]


def test_evaluate_prints_exact_figures(
    model: Path, table: Path, expected: np.ndarray, tmp_path: Path, run: Run
) -> None:
    _, labels = make_rows()
    reference = evaluate_scores(expected, labels, load(model).threshold_)
    arguments = ("evaluate", model, table, "--label", "faulty", "--id", "serial", "--chunk-rows", 33)
    found = json.loads(run(*arguments, "--json").stdout)
    assert {name: found[name] for name in reference.to_dict()} == reference.to_dict()
    assert found["auroc"] > 0.9
    shown = run(*arguments, "--out", tmp_path / "s.csv").stdout
    assert f"{reference.auroc:.4f}" in shown
    assert f"{reference.false_negatives:,} missed" in shown
    assert parse((tmp_path / "s.csv").read_text())[1].tolist() == expected.tolist()


def test_evaluate_report(model: Path, table: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("jinja2")
    run("evaluate", model, table, "--label", "faulty", "--id", "serial", "--report", tmp_path / "r", "--json")
    page = (tmp_path / "r" / "index.html").read_text()
    for expected in ("ROC curve", "Precision and recall", "Gradient norm", "pressure"):
        assert expected in page
    run("evaluate", model, table, "--label", "faulty", "--report", tmp_path / "r", code=2)


def test_evaluate_labels(model: Path, tmp_path: Path, run: Run) -> None:
    X, _ = make_rows(30)
    one_class = write_csv(tmp_path / "one.csv", X, np.zeros(30))
    result = run("evaluate", model, one_class, "--label", "faulty", "--json")
    assert json.loads(result.stdout)["auroc"] is None
    assert "both classes" in result.stderr
    assert "undefined" in run("evaluate", model, one_class, "--label", "faulty").stdout
    strange = write_csv(tmp_path / "strange.csv", X, np.arange(30) % 3)
    assert "--anomaly-value" in run("evaluate", model, strange, "--label", "faulty", code=1).stderr
    result = run("evaluate", model, strange, "--label", "faulty", "--anomaly-value", 2, "--anomaly-value", 1, "--json")
    assert json.loads(result.stdout)["anomalies"] == 20
    assert "--label" in run("evaluate", model, one_class, code=2).stderr
