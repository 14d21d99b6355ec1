"""``rvae-fast fit --folds``: the threshold by rows that a copy has not seen, and what an interrupt leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rvae_fast.serialization import load


def test_folds(table: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    options = ("--label", "faulty", "--id", "serial", "--epochs", 2, "--widths", 8, "--blocks", 1, "-o")
    plain, crossed = tmp_path / "plain", tmp_path / "crossed"
    assert "rows are few" in run("fit", table, *options, plain).stderr
    result = run("fit", table, *options, crossed, "--folds", 3, "--json")
    said = json.loads(result.stdout)
    assert "placing the threshold by 3 trainings" in result.stderr
    assert "rows are few" not in result.stderr
    one, other = load(plain), load(crossed)
    assert (said["folds"], said["threshold"]) == (3, other.threshold_)
    assert other.threshold_ != one.threshold_
    assert other.model_.state_dict().keys() == one.model_.state_dict().keys()
    for name, value in one.model_.state_dict().items():
        assert bool((other.model_.state_dict()[name] == value).all()), name


def test_folds_are_checked_first_and_an_interrupt_keeps_the_model(
    table: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--label", "faulty", "--id", "serial", "--epochs", 2, "--widths", 8, "--blocks", 1)
    out = tmp_path / "m.safetensors"
    result = run("fit", table, *options, "-o", out, "--folds", 5, "--contamination", 0.0001, code=2)
    assert "--contamination 0.0001 needs at least 9,999 rows" in " ".join(result.stderr.split())
    assert "epoch" not in result.stderr

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rvae_fast._thresholded.held_out_scores", interrupted)
    result = run("fit", table, *options, "-o", out, "--members", 2, "--folds", 5, code=130)
    assert not out.exists()
    kept = tmp_path / "m.interrupted.safetensors"
    assert f"wrote {kept}, its threshold by the training rows" in result.stderr
    run("score", kept, table, "--id", "serial", "-o", tmp_path / "scores.csv")


def test_a_copy_that_fails_costs_no_model(tmp_path: Path, run: Callable[..., Any]) -> None:
    path, out = tmp_path / "few.csv", tmp_path / "m.safetensors"
    path.write_text("a,b\n" + "".join(f"{i},{i % 3}\n" for i in range(7)))
    options = ("--score-by", "hyperplane", "--folds", 2, "--contamination", 0.2, "--epochs", 2)
    result = run("fit", path, "-o", out, *options, code=1)
    kept = tmp_path / "m.interrupted.safetensors"
    assert f"wrote {kept}, its threshold by the training rows" in result.stderr
    assert "X must have at least 4 distinct rows, got 3" in result.stderr
    run("score", kept, path)
