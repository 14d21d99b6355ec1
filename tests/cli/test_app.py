"""The program as a whole: help, version, the built-in data, the demo, real processes and pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rvae_fast
from rvae_fast import datasets
from rvae_fast.serialization import load

Run = Callable[..., Any]
PROGRAM = (sys.executable, "-m", "rvae_fast")
COMMANDS = (
    ("fit",),
    ("score",),
    ("evaluate",),
    ("demo",),
    ("doctor",),
    ("data",),
    ("data", "fetch"),
    ("data", "export"),
)


@pytest.mark.parametrize("command", [(), *COMMANDS], ids=" ".join)
def test_help(command: tuple[str, ...], run: Run) -> None:
    text = run(*command, "--help").stdout
    assert "Usage: " in text
    assert " ".join(command) in text
    if command and command[0] in {"fit", "score", "evaluate", "demo"}:
        assert "Examples" in text
        assert f"rvae-fast {command[0]} " in text


def test_every_option_explains_itself(run: Run) -> None:
    for command in COMMANDS:
        for line in run(*command, "--help").stdout.splitlines():
            if line.startswith("│ --"):
                assert len(line.strip("│ ").split("  ")) > 1, line


def test_version_and_no_arguments(run: Run) -> None:
    assert run("--version").stdout.strip() == f"rvae-fast {rvae_fast.__version__}"
    assert "Usage" in run(code=2).stdout + run(code=2).stderr
    assert "No such command" in run("guess", code=2).stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['rvae-fast', 'fit', '--help']\n"
        "from rvae_fast.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'sklearn', 'pandas', 'pyarrow', 'matplotlib', 'triton'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_doctor(run: Run) -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["versions"]["rvae-fast"]["value"] == rvae_fast.__version__
    assert "reference" in found["backends"]
    assert "backends" in run("doctor").stdout


def test_data_list(run: Run, tmp_path: Path) -> None:
    found = json.loads(run("data", "list", "--json", "--cache", tmp_path).stdout)
    assert set(found) == set(datasets.names())
    assert found["digits"]["cached"] is True
    assert found["mnist"]["cached"] is False
    text = run("data", "list", "--cache", tmp_path).stdout
    assert "mnist" in text
    assert "70,000" in text
    assert "mnist" in run("data").stdout


def test_data_fetch_and_export(run: Run, tmp_path: Path) -> None:
    assert "embedded" in run("data", "fetch", "digits").stderr
    assert "no data set 'nist'" in run("data", "fetch", "nist", code=2).stderr
    digits = datasets.load("digits")
    for kind in ("npz", "csv", "parquet"):
        if kind != "npz":
            pytest.importorskip("pandas")
        out = tmp_path / f"d.{kind}"
        run("data", "export", "digits", out)
        table = datasets.read_table(out, label="y")
        assert np.allclose(table.X, digits.scaled(), atol=1e-7)
        assert table.labels is not None
        assert np.array_equal(table.labels, digits.y)
        assert table.columns == digits.feature_names
        assert "--force" in run("data", "export", "digits", out, code=2).stderr
    run("data", "export", "digits", tmp_path / "d.npz", "--raw", "--force")
    assert datasets.read_table(tmp_path / "d.npz", label="y").X.max() == 16
    run("data", "export", "digits", tmp_path / "d.xlsx", code=2)


def test_built_in_data_by_name(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no file there is called digits
    run("fit", "digits", "--novel", 0, "-o", "m", "--epochs", 2, "-q")
    detector = load("m")
    assert detector.scaler is None
    split = datasets.novelty_split(datasets.load("digits").scaled(), datasets.load("digits").y, 0, seed=0)
    found = json.loads(run("evaluate", "m", "digits", "--novel", 0, "--json").stdout)
    assert (found["rows"], found["anomalies"]) == (len(split.X_test), int(split.y_test.sum()))
    lines = run("score", "m", "digits", "--novel", 0, "--part", "validation").stdout.splitlines()
    assert [int(line.partition(",")[0]) for line in lines[1:]] == split.validation_indices.tolist()
    assert len(run("score", "m", "digits").stdout.splitlines()) == 1798
    assert "--novel" in run("evaluate", "m", "digits", code=2).stderr
    assert "'12'" in run("evaluate", "m", "digits", "--novel", 12, code=1).stderr
    assert "--part" in run("evaluate", "m", "digits", "--novel", 0, "--part", "half", code=2).stderr
    assert "--label" in run("evaluate", "m", "digits", "--label", "y", code=2).stderr


def test_a_built_in_table_gives_its_test_rows(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``score`` took all rows, those of the training among them."""
    from tests.cli.conftest import COLUMNS, make_rows

    X, y = make_rows(100, 10)
    toy = datasets.Dataset(X, y, COLUMNS, None, ("normal", "anomaly"), "wbc", "a stand-in", "made here", "none")
    monkeypatch.setattr(datasets, "load", lambda name: toy)
    monkeypatch.chdir(tmp_path)  # no file there is called wbc
    split = datasets.anomaly_split(X, y, seed=0)
    fitted = json.loads(run("fit", "wbc", "-o", "m", "--epochs", 1, "--widths", 8, "--blocks", 1, "--json").stdout)
    assert fitted["rows"] == len(split.train_indices)
    parts = {"test": split.test_indices, "validation": split.validation_indices, "all": range(100)}
    for part, rows in parts.items():
        given = () if part == "test" else ("--part", part)
        lines = run("score", "m", "wbc", "-q", *given).stdout.splitlines()[1:]
        assert [int(line.partition(",")[0]) for line in lines] == list(rows)
    assert json.loads(run("evaluate", "m", "wbc", "--json").stdout)["rows"] == len(split.test_indices)


def test_demo(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    out = tmp_path / "demo"
    found = json.loads(run("demo", "--novel", 4, "--epochs", 12, "--out", out, "--json", "-q").stdout)
    assert found["auroc"] > 0.9
    assert (found["data"], found["rows"], found["anomalies"]) == ("digits", 504, 181)
    assert found["rows_per_second"] > 0
    page = (out / "index.html").read_text()
    for expected in ("Demo: digits, RVAE", "AUROC", "Gradient norm", 'class="strip"', "rows/s"):
        assert expected in page
    # the file holds the threshold that the report shows
    assert load(out / "model.safetensors").threshold_ == found["threshold"]
    shown = run("demo", "--epochs", 1, "--out", out)  # replaces the first one unasked
    assert "AUROC" in shown.stdout
    assert "rows/s" in shown.stdout
    assert str(out) in shown.stdout
    assert "any image of class 0" in shown.stderr


def test_demo_replaces_nothing_but_a_demo(run: Run, tmp_path: Path, model: Path, table: Path) -> None:
    pytest.importorskip("jinja2")
    demo, other = tmp_path / "demo", tmp_path / "other"
    run("demo", "--epochs", 1, "--out", demo, "-q")
    own = demo / "model.safetensors"
    own.write_bytes(model.read_bytes())
    assert "model.safetensors is not of the demo beside it" in run("demo", "--epochs", 1, "--out", demo, code=2).stderr
    assert own.read_bytes() == model.read_bytes()
    run("score", model, table, "--id", "serial", "--report", other, "-o", tmp_path / "s.csv", "-q")
    (other / "model.safetensors").write_bytes(b"precious")
    assert "holds other files" in run("demo", "--epochs", 1, "--out", other, code=2).stderr
    assert (other / "model.safetensors").read_bytes() == b"precious"
    run("demo", "--epochs", 1, "--out", demo, "--force", "-q")
    run("demo", "--epochs", 1, "--out", demo, "-q")
    own.unlink()
    own.mkdir()
    result = run("demo", "--epochs", 1, "--out", demo, "--force", code=2)
    assert "is a directory, expected the name of a file" in result.stderr


def test_demo_refuses(run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert "holds other files" in run("demo", "--out", tmp_path, "--epochs", 1, code=2).stderr
    assert "no built-in data set" in run("demo", "--data", "imagenet", "--out", tmp_path / "d", code=2).stderr
    assert "'ten'" in run("demo", "--novel", "ten", "--out", tmp_path / "d", code=1).stderr
    assert not (tmp_path / "d").exists()


def test_an_unexpected_error_is_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("lost")

    monkeypatch.setattr("rvae_fast.doctor.collect", broken)
    result = run("doctor", code=1)
    assert result.stderr.splitlines() == [
        "error: KeyError: 'lost' (probably a mistake in rvae-fast; --debug shows where)"
    ]
    assert "Traceback" in run("doctor", "--debug", code=1).stderr


def test_ctrl_c_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rvae_fast.doctor.collect", interrupted)
    assert run("doctor", code=130).stderr.strip() == "interrupted"


def test_a_real_process_and_a_pipe(model: Path, table: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(
        [*PROGRAM, "score", str(model), "-", "--id", "serial", "--fail-on-anomaly"],
        input=table.read_bytes(), capture_output=True, env=environment, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 3
    lines = done.stdout.decode().splitlines()
    assert lines[0] == "id,score,anomaly"
    assert [line[:5] for line in lines[1:3]] == ["00000", "00001"]
    assert len(lines) == 241
    message = done.stderr.decode().splitlines()
    assert len(message) == 1
    assert "rows flagged" in message[0]

    done = subprocess.run([*PROGRAM, "score", str(table), str(table)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {table} is damaged")
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_leaves_early_is_no_error(model: Path, tmp_path: Path) -> None:
    """As in ``rvae-fast score ... | head -1``: more is written than a pipe holds."""
    from tests.cli.conftest import make_rows

    np.save(tmp_path / "many.npy", make_rows(20_000)[0])
    with subprocess.Popen(
        [*PROGRAM, "score", str(model), str(tmp_path / "many.npy")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"id,score,anomaly\n"
        process.stdout.close()
        message = process.stderr.read().decode()
        assert process.wait() == 141
    assert "Traceback" not in message
    assert "Exception" not in message
