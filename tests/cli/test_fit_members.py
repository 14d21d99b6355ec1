"""``rvae-fast fit --members`` and presets of several networks: an ensemble from one command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rvae_fast.serialization import load
from tests.cli.conftest import COLUMNS

QUICK = ("--epochs", 1, "--widths", "8", "--blocks", "1", "--latent", 2)


def test_members(table: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    out, checkpoint = tmp_path / "m.safetensors", tmp_path / "run.ckpt"
    arguments = ("fit", table, "--label", "faulty", "--id", "serial", "-o", out, *QUICK, "--members", 3,
                 "--contamination", 0.2, "--checkpoint", checkpoint)  # fmt: skip
    result = run(*arguments, "--json")
    summary = json.loads(result.stdout)
    assert (summary["detector"], summary["members"], summary["epochs"], summary["best_epoch"]) == (
        "RVAEDetector", 3, 3, None,
    )  # fmt: skip
    assert "trained RVAEDetector 3 times on 220 rows" in result.stderr
    ensemble = load(out)
    assert type(ensemble).__name__ == "EnsembleDetector"
    assert len(ensemble.estimators_) == 3
    assert ensemble.feature_names_in_.tolist() == list(COLUMNS)
    assert ensemble.contamination == 0.2
    assert summary["threshold"] == ensemble.threshold_
    assert [(tmp_path / f"run.ckpt.{i}").exists() for i in range(4)] == [True, True, True, False]
    assert "run.ckpt.0" in run(*arguments, "-o", tmp_path / "other", code=2).stderr
    (tmp_path / "run.ckpt.2").unlink()
    run(*arguments, "--resume", "--force")
    assert load(out).threshold_ == ensemble.threshold_
    scored = json.loads(run("score", out, table, "-o", tmp_path / "s.csv", "--json").stdout)
    assert scored["rows"] == 240
    rated = run("evaluate", out, table, "--label", "faulty", "--json").stdout
    assert json.loads(rated)["auroc"] > 0.5


def test_members_and_a_preset_of_several(table: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    result = run("fit", table, "--preset", "image-two-rates", "--members", 2, "-o", tmp_path / "m", code=2)
    assert "--preset image-two-rates has its own" in result.stderr
    result = run("fit", table, "--members", 1, "-o", tmp_path / "m", code=2)
    assert "--members" in result.stderr


def test_what_a_preset_of_several_says_itself(table: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    result = run("fit", table, "--preset", "image-two-rates", "--learning-rate", 0.01, "-o", tmp_path / "m", code=2)
    assert "--preset image-two-rates has its own learning_rate for each member" in result.stderr
    result = run("fit", table, "--anomaly-value", 1, "-o", tmp_path / "m", code=2)
    assert "needs --label" in result.stderr


def test_the_report_of_several(table: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    pytest.importorskip("jinja2")
    run("fit", table, "--id", "serial", "--label", "faulty", "-o", tmp_path / "m", *QUICK, "--members", 2, "--report",
        tmp_path / "r", "-q")  # fmt: skip
    page = (tmp_path / "r" / "index.html").read_text()
    assert page.count("Of the first of 2 networks.") == 2  # losses and gradient norms
    for expected in ("RVAEDetector", "max_grad_norm", "members", "pressure"):
        assert expected in page
