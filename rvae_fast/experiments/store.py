"""The results file: a CSV whose rows are finished cells, so that a killed run goes on where it stopped."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rvae_fast.experiments.cells import KEY, Cell

RECIPE = "recipe"


class ResultsError(ValueError):
    """A results file that cannot be continued: another experiment's, or of other settings."""


class Results:
    """Finished cells in a CSV file: the cell's name, its recipe, its metrics.

    A row is written whole and flushed to disk when its cell is done. A last line without its end, which a power cut may
    leave, is dropped when the file is opened.

    Parameters
    ----------
    path : path
        Made with its first row.
    metrics : sequence of str
        Names of the columns after the cell's own.

    Raises
    ------
    ResultsError
        When the file has other columns.
    """

    def __init__(self, path: str | os.PathLike[str], metrics: Sequence[str]) -> None:
        self.path = Path(path)
        self.columns = (*KEY, *metrics, RECIPE)
        self.rows: dict[tuple[str, ...], dict[str, str]] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        rows = csv.DictReader(io.StringIO(whole.decode(), newline=""))
        if whole and tuple(rows.fieldnames or ()) != self.columns:
            raise ResultsError(
                f"{self.path} holds the columns {', '.join(rows.fieldnames or ())}; "
                f"expected {', '.join(self.columns)}; "
                "continue it with the version that wrote it, or give another directory"
            )
        for row in rows:
            self.rows[tuple(row[name] for name in KEY)] = row

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells that have no row yet.

        Raises
        ------
        ResultsError
            When a cell was run by another recipe: the two must not stand in one table.
        """
        absent = []
        for cell in cells:
            row = self.rows.get(cell.key)
            if row is None:
                absent.append(cell)
            elif row[RECIPE] != cell.recipe:
                raise ResultsError(
                    f"{self.path} holds {cell.label} run with {row[RECIPE]}, and not with {cell.recipe}: "
                    "give another directory, or delete the file"
                )
        return absent

    def add(self, cell: Cell, metrics: dict[str, Any]) -> dict[str, str]:
        """Write a finished cell's row; a metric that is None or absent is left empty."""
        unknown = metrics.keys() - set(self.columns)
        if unknown:
            raise ValueError(f"metrics without a column: {', '.join(sorted(unknown))}")
        values = {**dict(zip(KEY, cell.key, strict=True)), RECIPE: cell.recipe}
        values |= {name: _text(value) for name, value in metrics.items()}
        row = {name: values.get(name, "") for name in self.columns}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        if not self.path.exists() or self.path.stat().st_size == 0:
            writer.writeheader()
        writer.writerow(row)
        with open(self.path, "ab") as file:
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows[cell.key] = row
        return row

    def of(self, cells: Iterable[Cell]) -> list[dict[str, str]]:
        """The rows of those cells that are done, in the order of the cells."""
        return [self.rows[cell.key] for cell in cells if cell.key in self.rows]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
