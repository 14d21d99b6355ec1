"""A small table, a model trained on it by the command line, and a runner."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("pyarrow", reason="the data extra is not installed: no CSV")

from rvae_fast.cli import app
from rvae_fast.serialization import load

COLUMNS = ("temp", "flow", "pressure", "load")


def make_rows(n: int = 240, anomalies: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return rows on a plane in four dimensions, the first few of them off it, and their labels."""
    rng = np.random.default_rng(seed)
    plane = np.random.default_rng(9).normal(size=(2, 4))
    X = rng.normal(size=(n, 2)) @ plane + 0.02 * rng.normal(size=(n, 4))
    labels = np.zeros(n, dtype=int)
    labels[:anomalies] = 1
    X[:anomalies] += rng.normal(scale=4.0, size=(anomalies, 4))
    order = rng.permutation(n)
    return X[order] * [1, 10, 100, 1] + [0, 0, 1000, 5], labels[order]


def write_csv(path: Path, X: np.ndarray, labels: np.ndarray | None = None, ids: bool = True) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((["serial"] if ids else []) + list(COLUMNS) + ([] if labels is None else ["faulty"]))
        for i, row in enumerate(X.tolist()):
            writer.writerow(([f"{i:05d}"] if ids else []) + row + ([] if labels is None else [int(labels[i])]))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run a command; returns typer's result, with exit_code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "300")  # a message with a path in it stays in one line
    monkeypatch.setenv("NO_COLOR", "1")
    runner = CliRunner()

    def call(*arguments: Any, code: int = 0, stdin: str | bytes | None = None) -> Any:
        result = runner.invoke(app, [str(argument) for argument in arguments], input=stdin)
        shown = f"exit {result.exit_code}\n{result.stdout}\n{result.stderr}\n{result.exception!r}"
        assert result.exit_code == code, shown
        return result

    return call


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a CSV file: serial (text with leading zeros), four features, faulty (0/1)."""
    X, labels = make_rows()
    return write_csv(tmp_path_factory.mktemp("table") / "table.csv", X, labels)


@pytest.fixture(scope="session")
def model(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model trained on the normal rows of ``table``."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    arguments = ["fit", str(table), "--id", "serial", "--label", "faulty", "--out", str(path), "--epochs", "15", "-q"]
    result = CliRunner().invoke(app, [*arguments, "--batch-size", "32", "--learning-rate", "0.003", "--latent", "2"])
    assert result.exit_code == 0, result.stderr
    return path


def parse(text: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Ids, scores and flags of a CSV file of scores."""
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["id", "score", "anomaly"]
    ids, scores, flags = zip(*rows[1:], strict=True)
    return list(ids), np.array(scores, dtype=float), np.array(flags, dtype=int)


@pytest.fixture(scope="session")
def expected(model: Path) -> np.ndarray:
    """Scores of the table's rows by the library."""
    pandas = pytest.importorskip("pandas")
    X, _ = make_rows()
    return -load(model).score_samples(pandas.DataFrame(X, columns=list(COLUMNS)))
