"""The results file: a CSV whose rows are finished cells, so that a killed run goes on where it stopped."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
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
    leave, counts as none, and is dropped with the next row. Several runs may write to one file: each takes in what the
    others have written before it writes a row.

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
        When the file has other columns, or a damaged line.
    """

    def __init__(self, path: str | os.PathLike[str], metrics: Sequence[str]) -> None:
        self.path = Path(path)
        self.columns = self._expected = (*KEY, *metrics, RECIPE)
        self.rows: dict[tuple[str, ...], dict[str, str]] = {}
        self._has_other_header = False
        self._read()

    def _read(self) -> None:
        """Take in the file as it is now."""
        self._seen = _state(self.path)
        text = self.path.read_bytes() if self._seen else b""
        whole = text[: text.rfind(b"\n") + 1]
        self._torn = len(whole) < len(text)
        if not whole:
            self._has_other_header = bool(self.rows)  # of a file that is gone: it is written anew
            return
        rows = csv.DictReader(io.StringIO(whole.decode(), newline=""))
        there = tuple(rows.fieldnames or ())
        if not _only_scores_apart(there, self._expected):
            raise ResultsError(
                f"{self.path} holds the columns {', '.join(there)}; "
                f"expected {', '.join(self._expected)}; "
                "continue it with the version that wrote it, or give another directory"
            )
        found: dict[tuple[str, ...], dict[str, str]] = {}
        for row in rows:
            if None in row or None in row.values():
                raise ResultsError(
                    f"{self.path}, line {rows.line_num}, has not the {len(there)} values of the header: remove the "
                    "line, and its cell is run again"
                )
            found[tuple(row[name] for name in KEY)] = row
        self.rows = found
        further = [name for name in self._expected if name not in there]
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
            self._check_recipe(cell)
            if cell.key not in self.rows or self.lacking(cell):
                absent.append(cell)
        return absent

    def _check_recipe(self, cell: Cell) -> None:
        row = self.rows.get(cell.key)
        if row is None:
            return
        there, wanted = (_trained(recipe) for recipe in (row[RECIPE], cell.recipe))
        if there != wanted:
            there, wanted = _flat(there), _flat(wanted)
            names = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
            had, asked = (", ".join(f"{name} {recipe.get(name)}" for name in names) for recipe in (there, wanted))
            raise ResultsError(
                f"{self.path} holds {cell.label} run with {had}, and not with {asked}: "
                "give another directory, or another file of results"
            )

    def add(self, cell: Cell, metrics: dict[str, Any]) -> dict[str, str]:
        """Write a finished cell's row; a metric that is None or absent is left empty.

        A row that is there already, which lacked some scores, gets these, and keeps the rest, its times among them.

        Raises
        ------
        ResultsError
            When another run has meanwhile written the cell by another recipe.
        """
        folder = self.path.resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if _state(self.path) != self._seen:
                self._read()
            row = self._add(cell, metrics)
            self._seen, self._torn = _state(self.path), False
        return row

    def _add(self, cell: Cell, metrics: dict[str, Any]) -> dict[str, str]:
        unknown = metrics.keys() - set(self.columns)
        if unknown:
            raise ValueError(f"metrics without a column: {', '.join(sorted(unknown))}")
        self._check_recipe(cell)
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
        self.rows[cell.key] = row
        if self._has_other_header or self._torn or len(self.rows) == 1:
            self._rewrite()
            return row
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns, lineterminator="\n").writerow(row)
        with open(self.path, "ab") as file:
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
        return row

    def of(self, cells: Iterable[Cell]) -> list[dict[str, str]]:
        """The rows of those cells that are done, in the order of the cells."""
        return [self.rows[cell.key] for cell in cells if cell.key in self.rows]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runs from writing to the folder's results meanwhile, where the system has locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without them
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _state(path: Path) -> tuple[int, int, int] | None:
    """What tells that a file is as it was; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _only_scores_apart(there: Sequence[str], expected: Sequence[str]) -> bool:
    """Whether two lists of columns are the same but for those of scores."""
    return [n for n in there if not n.startswith(OF_SCORE)] == [n for n in expected if not n.startswith(OF_SCORE)]


def _trained(recipe: str) -> dict[str, Any]:
    """What of a recipe a trained model depends on."""
    return {name: value for name, value in json.loads(recipe).items() if name != "scores"}


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with the settings of its parts beside the others, to tell two apart in few words."""
    found: dict[str, Any] = {}
    for name, value in recipe.items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
