"""The loop that ``score`` and ``evaluate`` share: read a chunk, score it, write it, keep what the report needs."""

from __future__ import annotations

import contextlib
import csv
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rvae_fast.cli.common import fail

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from rvae_fast.cli.sink import ScoreSink
    from rvae_fast.cli.source import Source
    from rvae_fast.report import ExtremeRows

__all__ = [
    "Scored",
    "load_detector",
    "progress",
    "rate",
    "report_arguments",
    "run_scoring",
    "score_named",
    "split_names",
]

# Beyond this, a report names only the rows at either end by their ids.
_IDS_KEPT = 1_000_000


@dataclass(frozen=True)
class Scored:
    """What is known after the loop: all scores, labels as read, the rows at either end, ids unless too many."""

    scores: NDArray[np.float64]
    labels: list[NDArray[Any]]
    extremes: ExtremeRows | None
    ids: NDArray[Any] | None
    highest_id: str
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """Rows a second, reading and writing included."""
        return self.scores.size / max(self.seconds, 1e-9)


def load_detector(path: Path, device: str | None) -> Any:
    """Load a detector; an error says what else the file holds."""
    from rvae_fast.serialization import load

    detector = load(path, device=device)
    if not hasattr(detector, "threshold_"):
        fail(f"{path} holds a bare network ({type(detector).__name__}), without scaler and threshold; save a detector")
    return detector


def rate(rows_per_second: float) -> str:
    """Return a throughput in words."""
    return f"{rows_per_second:,.0f} rows/s"


def progress(quiet: bool) -> Any:
    """Return a rich progress display on standard error, which shows nothing where that is no terminal."""
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    from rvae_fast.cli.common import console

    class Rows(ProgressColumn):
        def render(self, task: Task) -> Text:
            total = "" if task.total is None else f"/{int(task.total):,}"
            speed = f"  {rate(task.speed)}" if task.speed else ""
            return Text(f"{int(task.completed):,}{total} rows{speed}")

    screen = console()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        Rows(),
        TimeElapsedColumn(),
        console=screen,
        disable=quiet or not screen.is_terminal,
        transient=True,
    )


@contextlib.contextmanager
def told_of_file(name: str, missing: str) -> Iterator[None]:
    """Put the file into the detectors' message about NaN, and in place of their parameter what a command has."""
    try:
        yield
    except ValueError as error:
        told, parameter = str(error), "missing='mean' or missing='median' fills NaN from the training table"
        if not told.startswith("Input X contains "):
            raise
        raise ValueError(told.replace("Input X", name, 1).replace(parameter, missing)) from error


def score_named(detector: Any, X: Any) -> NDArray[np.float64]:
    """Score rows whose columns are the detector's, in its order; higher is more anomalous."""
    from rvae_fast.cli.source import frame

    names = getattr(detector, "feature_names_in_", None)
    if names is not None and len(names) == X.shape[1]:
        X = frame(X, names)
    with warnings.catch_warnings():
        # A file without column names goes by position; its width is checked.
        warnings.filterwarnings("ignore", message="X does not have valid feature names", category=UserWarning)
        return np.asarray(-detector.score_samples(X))


def run_scoring(
    detector: Any,
    source: Source,
    threshold: float,
    *,
    chunk_rows: int,
    sink: ScoreSink | None = None,
    keep_rows: bool = False,
    explain: int | None = None,
    quiet: bool = False,
) -> Scored:
    """Score all rows of ``source``, a chunk in memory at a time; ``explain``: columns named of a flagged row."""
    from rvae_fast.cli.columns import tell_columns, use_columns
    from rvae_fast.cli.reasons import reasons
    from rvae_fast.report import ExtremeRows

    use_columns(source, getattr(detector, "feature_names_in_", None))
    if not quiet:
        tell_columns(source)
    extremes = ExtremeRows() if keep_rows else None
    scores: list[NDArray[np.float64]] = []
    labels: list[NDArray[Any]] = []
    all_ids: list[NDArray[Any]] | None = []
    seen = 0
    highest, highest_id = -np.inf, ""
    started = time.perf_counter()
    with progress(quiet) as bar:
        task = bar.add_task("scoring", total=source.count())
        explaining, explained = bar.add_task("explaining", total=0, visible=explain is not None), 0
        for chunk in source.chunks(chunk_rows):
            with told_of_file(source.name, "a model fitted with --missing mean or --missing median fills NaN"):
                part = score_named(detector, chunk.X)
            ids = chunk.row_ids()
            scores.append(part)
            if chunk.labels is not None:
                labels.append(chunk.labels)
            if sink is not None:
                flags = part > threshold
                because = None
                if explain is not None:
                    bar.update(explaining, total=explained + int(flags.sum()))
                    because = reasons(detector, chunk.X, flags, explain, lambda rows: bar.advance(explaining, rows))
                    explained += int(flags.sum())
                sink.write(ids, part, flags, because)
            seen += len(part)
            if extremes is not None:
                extremes.update(part, chunk.X, ids)
                if seen > _IDS_KEPT or chunk.ids is None:
                    all_ids = None
                elif all_ids is not None:
                    all_ids.append(ids)
            top = int(part.argmax())
            if part[top] > highest:
                highest, highest_id = float(part[top]), str(ids[top])
            bar.advance(task, len(part))
    if not scores:
        fail(f"{source.name}: there are no rows in it")
    kept = np.concatenate(all_ids) if all_ids else None
    return Scored(np.concatenate(scores), labels, extremes, kept, highest_id, time.perf_counter() - started)


def report_arguments(scored: Scored) -> dict[str, Any]:
    """Return the arguments of ``write_report`` that come from the kept rows."""
    if scored.extremes is None:
        return {}
    ids = scored.extremes.ids if scored.ids is None else scored.ids
    return {"X": scored.extremes.X, "rows": scored.extremes.rows, "ids": ids}


def split_names(text: str | None) -> Sequence[str]:
    """Read a comma-separated list of names; one that has a comma in it stands in double quotes, as in a CSV file."""
    cells: list[str] = []
    if text is not None:
        try:
            cells = next(csv.reader([text], skipinitialspace=True), [])
        except csv.Error:  # a line's end in a name
            cells = text.split(",")
    return [name.strip() for name in cells if name.strip()]
