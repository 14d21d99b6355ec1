"""Which columns the commands take: by the file's names, however they look, without pandas' index, and what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvae_fast.serialization import load
from tests.cli.conftest import make_rows

pandas = pytest.importorskip("pandas")

Run = Callable[..., Any]
QUICK = ("--epochs", 2, "--widths", "8", "--blocks", "1", "--latent", 2)
ORDER = [2, 0, 3, 1]


def table(prefix: str = "x") -> Any:
    X, labels = make_rows(60, 10)
    frame = pandas.DataFrame(X, columns=[f"{prefix}{i}" for i in range(4)])
    return frame.assign(y=labels, serial=np.arange(100, 160))


def scores(text: str) -> list[float]:
    return [float(line.split(",")[1]) for line in text.splitlines()[1:]]


@pytest.mark.parametrize("kind", ["csv", "parquet", "npz"])
def test_names_that_look_like_numbered_ones_are_names(kind: str, tmp_path: Path, run: Run) -> None:
    """Once a model forgot them, and took the columns of another file by position."""
    frame = table()
    paths = tmp_path / f"t.{kind}", tmp_path / f"other.{kind}"
    for path, order in zip(paths, ([0, 1, 2, 3], ORDER), strict=True):
        part = frame[[f"x{i}" for i in order] + ["y", "serial"]]
        if kind == "npz":
            names = part.columns[:4]
            arrays = {"X": part[names].to_numpy(), "y": part["y"].to_numpy(), "serial": part["serial"].to_numpy()}
            np.savez(path, **arrays, columns=np.array(names.tolist()))
        else:
            part.to_csv(path, index=False) if kind == "csv" else part.to_parquet(path, index=False)
    roles = ("--label", "y", "--id", "serial")
    out = tmp_path / "m"
    run("fit", paths[0], *roles, "-o", out, *QUICK, "-q")
    assert load(out).feature_names_in_.tolist() == ["x0", "x1", "x2", "x3"]
    first, second = (run("score", out, path, *roles, "-q").stdout for path in paths)
    assert first == second
    found = [json.loads(run("evaluate", out, path, *roles, "-q", "--json").stdout)["auroc"] for path in paths]
    assert found[0] == found[1]
    thresholds = []
    for path in paths:
        run("calibrate", out, path, *roles, "--false-alarms", 0.1, "-o", tmp_path / "c", "-f", "-q")
        run("fit-score", out, path, *roles, "-o", tmp_path / "f", "-f", "-q")
        thresholds.append((load(tmp_path / "c").threshold_, load(tmp_path / "f").threshold_))
    assert thresholds[0] == thresholds[1]


def test_arrays_have_no_names_but_those_that_were_chosen(tmp_path: Path, run: Run) -> None:
    path, out = tmp_path / "t.npy", tmp_path / "m"
    np.save(path, make_rows(60, 10)[0])
    run("fit", path, "-o", out, *QUICK, "-q")
    assert not hasattr(load(out), "feature_names_in_")
    run("fit", path, "-o", out, *QUICK, "-q", "-f", "--columns", "x3,x1")
    assert load(out).feature_names_in_.tolist() == ["x3", "x1"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_index_of_pandas_is_left_out_and_said(kind: str, tmp_path: Path, run: Run) -> None:
    frame = table("s").sample(frac=1, random_state=0)
    name = "unnamed0" if kind == "csv" else "__index_level_0__"
    indexed, bare = tmp_path / f"indexed.{kind}", tmp_path / f"bare.{kind}"
    for path, index in ((indexed, True), (bare, False)):
        frame.to_csv(path, index=index) if kind == "csv" else frame.to_parquet(path, index=index)
    roles = ("--label", "y", "--id", "serial")
    models = tmp_path / "m", tmp_path / "n"
    said = run("fit", indexed, *roles, "-o", models[0], *QUICK).stderr
    assert f"left out '{name}'" in said
    assert f"--id {name}" in said
    assert "left out 's" not in run("fit", bare, *roles, "-o", models[1], *QUICK).stderr
    assert load(models[0]).feature_names_in_.tolist() == ["s0", "s1", "s2", "s3"]
    results = [run("score", model, path, *roles) for model in models for path in (indexed, bare)]
    assert len({result.stdout for result in results}) == 1
    assert not any("left out" in result.stderr for result in results), "further columns do not matter to a model"
    lines = run("score", models[0], indexed, "--id", name, "-q").stdout.splitlines()
    assert [int(line.split(",")[0]) for line in lines[1:]] == frame.index.tolist()
    said = run("fit", indexed, "--columns", f"s0,s1,{name}", "-o", tmp_path / "kept", *QUICK).stderr
    assert "left out" not in said
    assert load(tmp_path / "kept").feature_names_in_.tolist() == ["s0", "s1", name]


def test_a_header_that_counts_the_columns(tmp_path: Path, run: Run) -> None:
    X, _ = make_rows(60, 10)
    counted, indexed, bare = (tmp_path / f"{name}.csv" for name in ("counted", "indexed", "bare"))
    pandas.DataFrame(X).to_csv(counted, index=False)
    pandas.DataFrame(X).to_csv(indexed)
    pandas.DataFrame(X).to_csv(bare, index=False, header=False)
    out = tmp_path / "m"
    result = run("fit", counted, "-o", out, *QUICK, "--json")
    assert json.loads(result.stdout)["rows"] == 60
    assert "counted.csv: the first line, 0, 1, 2, ..., names the columns; with --no-header it is a row" in result.stderr
    assert load(out).feature_names_in_.tolist() == ["0", "1", "2", "3"]
    expected = run("score", out, counted, "-q").stdout
    assert len(scores(expected)) == 60
    for path in (indexed, bare):
        assert run("score", out, path, "-q").stdout == expected
    assert len(scores(run("score", out, counted, "--no-header", "-q").stdout)) == 61
    # In another order they are numbers, too, but those that the model knows its columns by.
    pandas.DataFrame(X)[ORDER].to_csv(tmp_path / "other.csv", index=False)
    assert run("score", out, tmp_path / "other.csv", "-q").stdout == expected
    # A model with names of its own takes such a file by position, as an array.
    named = tmp_path / "named.csv"
    pandas.DataFrame(X, columns=list("abcd")).to_csv(named, index=False)
    run("fit", named, "-o", tmp_path / "n", *QUICK, "-q")
    by_name = run("score", tmp_path / "n", named, "-q").stdout
    for path in (counted, indexed, bare):
        assert run("score", tmp_path / "n", path, "-q").stdout == by_name


def test_a_name_with_a_comma_stands_in_quotes(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "t.csv"
    path.write_text('"mass, kg",b,"of, what"\n1,2,x\n3,4,y\n5,7,z\n')
    out = tmp_path / "m"
    run("fit", path, "--drop", '"of, what"', "-o", out, *QUICK)
    assert load(out).feature_names_in_.tolist() == ["mass, kg", "b"]
    run("fit", path, "--columns", 'b, "mass, kg"', "-o", out, "--force", *QUICK)
    assert load(out).feature_names_in_.tolist() == ["b", "mass, kg"]
    run("score", out, path)


def test_a_comma_at_the_end_of_every_line(tmp_path: Path, run: Run) -> None:
    path, out = tmp_path / "t.csv", tmp_path / "m"
    table("s").to_csv(path, index=False)
    path.write_text("".join(f"{line},\n" for line in path.read_text().splitlines()))
    said = run("fit", path, "--label", "y", "--id", "serial", "-o", out, *QUICK).stderr
    assert "left out a column at the end without name and values" in said
    assert load(out).n_features_in_ == 4
