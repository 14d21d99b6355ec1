"""The results file: a CSV whose rows are finished cells, so that a killed run goes on where it stopped."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rvae_fast.datasets.cache import atomic_path
from rvae_fast.experiments.cells import KEY, Cell

RECIPE = "recipe"

#: How the columns of a score begin: its AUROC, and of detectors the share of new normal rows beyond their threshold.
OF_SCORE = ("auroc_", "flagged_")


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
        Names of the columns after the cell's own. A file may lack some scores' columns (``auroc_...``), or have more of
        them: what its rows have stays, and what they lack is added.

    Raises
    ------
    ResultsError
        When the file has other columns.
    """

    def __init__(self, path: str | os.PathLike[str], metrics: Sequence[str]) -> None:
        self.path = Path(path)
        self.columns = (*KEY, *metrics, RECIPE)
        self.rows: dict[tuple[str, ...], dict[str, str]] = {}
        self._has_other_header = False
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        rows = csv.DictReader(io.StringIO(whole.decode(), newline=""))
        there = tuple(rows.fieldnames or ())
        if whole and not _only_scores_apart(there, self.columns):
            raise ResultsError(
                f"{self.path} holds the columns {', '.join(there)}; "
                f"expected {', '.join(self.columns)}; "
                "continue it with the version that wrote it, or give another directory"
            )
        for row in rows:
            self.rows[tuple(row[name] for name in KEY)] = row
        if whole:
            further = [name for name in self.columns if name not in there]
            self.columns = (*there[:-1], *further, RECIPE)
            self._has_other_header = bool(further)

    def _rewrite(self) -> None:
        """Write all rows anew, the file whole at every moment."""
        self.rows = {key: {name: row.get(name, "") for name in self.columns} for key, row in self.rows.items()}
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        with atomic_path(self.path) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
        self._has_other_header = False

    def lacking(self, cell: Cell) -> tuple[str, ...]:
        """Which of the cell's scores are still to be taken: all, if it has no row."""
        row = self.rows.get(cell.key)
        if row is None:
            return cell.scores
        absent = tuple(name for name in cell.scores if name not in json.loads(row[RECIPE])["scores"])
        # The rank sum is over other scores, which it has to see.
        return cell.scores if "rank" in absent else absent

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells that have no row yet, or whose row lacks some of their scores.

        Raises
        ------
        ResultsError
            When a cell was run by another recipe: the two must not stand in one table.
        """
        absent = []
        for cell in cells:
            row = self.rows.get(cell.key)
            if row is not None and _trained(row[RECIPE]) != _trained(cell.recipe):
                raise ResultsError(
                    f"{self.path} holds {cell.label} run with {row[RECIPE]}, and not with {cell.recipe}: "
                    "give another directory, or delete the file"
                )
            if self.lacking(cell):
                absent.append(cell)
        return absent

    def add(self, cell: Cell, metrics: dict[str, Any]) -> dict[str, str]:
        """Write a finished cell's row; a metric that is None or absent is left empty.

        A row that is there already, which lacked some scores, gets these, and keeps the rest, its times among them.
        """
        unknown = metrics.keys() - set(self.columns)
        if unknown:
            raise ValueError(f"metrics without a column: {', '.join(sorted(unknown))}")
        values = {**dict(zip(KEY, cell.key, strict=True)), RECIPE: cell.recipe}
        values |= {name: _text(value) for name, value in metrics.items()}
        before = self.rows.get(cell.key)
        if before is not None:
            scores = dict.fromkeys((*json.loads(before[RECIPE])["scores"], *cell.scores))
            recipe = dataclasses.replace(cell, scores=tuple(scores)).recipe
            names = [prefix + score for score in cell.scores for prefix in OF_SCORE]
            added = {name: values[name] for name in names if name in values}
            self.rows[cell.key] = {**before, **added, RECIPE: recipe}
            self._rewrite()
            return self.rows[cell.key]
        row = {name: values.get(name, "") for name in self.columns}
        if self._has_other_header:
            self.rows[cell.key] = row
            self._rewrite()
            return row
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


def _only_scores_apart(there: Sequence[str], expected: Sequence[str]) -> bool:
    """Whether two lists of columns are the same but for those of scores."""
    return [n for n in there if not n.startswith(OF_SCORE)] == [n for n in expected if not n.startswith(OF_SCORE)]


def _trained(recipe: str) -> dict[str, Any]:
    """What of a recipe a trained model depends on."""
    return {name: value for name, value in json.loads(recipe).items() if name != "scores"}


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
