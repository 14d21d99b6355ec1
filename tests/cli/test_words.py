"""Errors speak of options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rvae_fast.cli.words import in_options
from tests.cli.conftest import make_rows, write_csv

QUICK = ("--epochs", 1, "--widths", "8", "--blocks", "1", "--latent", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resume", "--checkpoint", "none.ckpt"), "to begin one there, train without --resume"),
        (("--patience", "3"), "--patience needs validation data: give --validation, a share above 0"),
        (("--validation", "2"), "--validation must be a finite number in [0, 1), got 2.0"),
        (("--latent", "0"), "--latent must be at least 1, got 0"),
        (("--blocks", "1,2"), "--blocks has 2 entries but --widths 1"),
        (("--likelihood", "bernoulli"), "use --scaler minmax, or --scaler none for data"),
        (("--label", "fauly"), ": --label 'fauly' is not a column (did you mean 'faulty'?)"),
        (("--columns", "temp,temp"), ": --columns names a column twice"),
        (("--drop", "seral"), ": --drop 'seral' is not a column"),
        (("--columns", "temp,load", "--id", "load"), "'load' is both in --columns and --id"),
        (("--delimiter", ";", "--no-header"), "leave them out (--drop or --columns of fit), or name one by --label or"),
        (("--label", "faulty", "--anomaly-value", "7"), "--anomaly-value: '7' is not among the labels"),
        (("--label", "serial"), "mean anomaly; say so with --anomaly-value VALUE"),
    ],
)
def test_of_fit(
    options: tuple[str, ...], message: str, table: Path, tmp_path: Path, run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in run("fit", table, "-o", "m", *QUICK, *options, code=1).stderr


def test_what_is_no_parameter_stays() -> None:
    for text in (
        "t.csv: order needs no words",
        "the label has a meaning",
        "x=None and y='z'",
        "widths of scaler='a b'",
    ):
        assert in_options(text) == text
    assert in_options("order must be pre or post") == "--order must be pre or post"


def test_a_guess_of_the_delimiter_can_be_corrected(tmp_path: Path, run: Callable[..., Any]) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n3,4,5\n")
    said = run("fit", path, "-o", tmp_path / "m", *QUICK, code=1).stderr
    assert "expected 2 (separated by ','; --delimiter says another)" in said
    said = run("fit", tmp_path, "-o", tmp_path / "m", *QUICK, code=1).stderr
    assert "=" not in said


def test_csv_by_another_name(tmp_path: Path, table: Path, run: Callable[..., Any]) -> None:
    path = tmp_path / "t.data"
    path.write_bytes(table.read_bytes())
    said = run("fit", path, "-o", tmp_path / "m", *QUICK, code=1).stderr
    assert "or idx; CSV by another name is read from standard input: - < FILE" in said
    run("fit", "-", "--id", "serial", "-o", tmp_path / "m", *QUICK, stdin=path.read_bytes())


def test_an_anomaly_value_is_a_number_where_the_labels_are(tmp_path: Path, run: Callable[..., Any]) -> None:
    X, _ = make_rows(30, 0)
    path = write_csv(tmp_path / "t.csv", X, ids=False)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{lines[0]},y", *(f"{line},{2.0 * (i < 5)}" for i, line in enumerate(lines[1:]))]))
    said = run("fit", path, "--label", "y", "--anomaly-value", "2", "-o", tmp_path / "m", *QUICK).stderr
    assert "left out 5 labelled anomalies" in said


@pytest.mark.parametrize("shape", ["3x32x32", "8x8x2"])
def test_an_image_has_its_channels_last(shape: str, table: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    said = run("fit", table, "-o", tmp_path / "m", "--image-shape", shape, code=2).stderr
    assert "channels, expected 1 or 3, and them last: 32x32x3" in " ".join(said.split())
    shown = " ".join(run("fit", "--help").stdout.replace("│", " ").split())
    assert "--views has them first" in shown
    assert "--image-shape has them last" in shown
