"""``rvae-fast reproduce`` on the embedded digits."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the report extra is not installed: no page")


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RVAE_FAST_DATA", str(tmp_path / "cache"))


def test_a_quick_run_without_cached_data(run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["reproduce", "novelty", "--quick", "--epochs", 1, "--jobs", 1, "--out", out]
    result = run(*options)
    assert "takes scikit-learn's digits instead" in result.stderr
    assert "12 cells, 0 of them done" in result.stderr
    assert "about" in result.stderr
    assert str(out / "index.html") in result.stdout
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {row["data"] for row in rows} == {"digits"}
    assert {row["seed"] for row in rows} == {"0", "1"}
    page = (out / "index.html").read_text()
    assert "rvae-fast reproduce novelty --quick --epochs 1" in page
    assert "A quick run" in page
    assert (out / "summary.csv").exists()
    assert "12 cells, 12 of them done" in run(*options).stderr
    more = run(*options, "--seeds", 3, "--page-only")
    assert "6 of 18 cells are not run yet" in (out / "index.html").read_text()
    assert "cells, " not in more.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "no experiment 'nothing'"),
        (["novelty", "--variant", "x"], "no variant 'x'"),
        (["novelty", "--jobs", "0"], "--jobs"),
        (["novelty", "--rows", "99"], "--rows"),
    ],
)
def test_wrong_usage(options: list[str], message: str, run: Callable[..., Any]) -> None:
    assert message in run("reproduce", *options, code=2).stderr


def test_a_part_of_the_rows(run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["reproduce", "deep", "--quick", "--seeds", 1, "--epochs", 1, "--jobs", 1, "--rows", 120, "--out", out]
    run(*options)
    with (out / "results.csv").open() as file:
        assert {row["train_rows"] for row in csv.DictReader(file)} == {"120"}
    page = (out / "index.html").read_text()
    assert "--epochs 1 --rows 120" in page
    assert "give another directory" in run(*options, "--rows", 130, code=1).stderr
    page = (out / "index.html").read_text()
    again = ["reproduce", "deep", "--data", "digits", "--seeds", 1, "--page-only", "--out", out]
    assert "give another directory" in run(*again, code=1).stderr  # the quick run's rows make no page of a full one
    assert (out / "index.html").read_text() == page


def test_unknown_data_and_nothing_to_show(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("reproduce", "deep", "--data", "mnsit", "--out", tmp_path / "out", code=1)
    assert "data must be among" in result.stderr
    result = run("reproduce", "deep", "--data", "digits", "--page-only", "--out", tmp_path / "out", code=1)
    assert "has none of the 20 cells" in result.stderr


def test_experiments_share_results_and_models(run: Callable[..., Any], tmp_path: Path) -> None:
    shared = ["--quick", "--seeds", 1, "--epochs", 1, "--jobs", 1, "--data", "digits"]
    table = tmp_path / "shared" / "table.csv"
    given = ["--results", table, "--models", tmp_path / "models"]
    run("reproduce", "novelty", *shared, *given, "--out", tmp_path / "novelty")
    assert len(list((tmp_path / "models").glob("*.safetensors"))) == 6
    assert not (tmp_path / "novelty" / "results.csv").exists()
    said = run("reproduce", "rapp", *shared, *given, "--out", tmp_path / "rapp").stderr
    assert "8 cells, 1 of them done, 1 lacking a score" in said  # VAE and RVAE pre, class 0 novel
    assert (tmp_path / "rapp" / "index.html").exists()
    assert "6 cells, 6 of them done" in run("reproduce", "novelty", *shared, *given, "--out", tmp_path / "n").stderr
