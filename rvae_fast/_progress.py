"""Progress of a training run, and of a long scoring, on standard error: a bar in a terminal, now and then a line
elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Part = TypeVar("Part")

#: Seconds between two lines where there is no terminal.
LINE_INTERVAL = 5.0


class Progress:
    """Shows epochs and steps; does nothing when ``enabled`` is False.

    Parameters
    ----------
    enabled : bool
    epochs, steps_per_epoch : int
    done : int
        Steps already taken (a resumed run).
    """

    def __init__(self, enabled: bool, epochs: int, steps_per_epoch: int, done: int = 0) -> None:
        self._epochs, self._enabled = epochs, enabled
        self._bar: Any = None
        self._last = time.monotonic()
        self._pending = 0
        if not enabled:
            return
        stream = sys.stderr
        if stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
                TimeRemainingColumn(), console=Console(file=stream), transient=False,
            )  # fmt: skip
            self._task = self._bar.add_task("training", total=epochs * steps_per_epoch, completed=done)
            self._bar.start()

    def advance(self) -> None:
        """One optimiser step is done."""
        if self._bar is None:
            return
        self._pending += 1
        now = time.monotonic()
        if now - self._last > 0.1:  # the bar redraws ten times a second; its lock is not for every step
            self._bar.advance(self._task, self._pending)
            self._pending, self._last = 0, now

    def epoch(self, row: dict[str, Any], *, last: bool = False) -> None:
        """An epoch is done; ``row`` is its row of the history."""
        if not self._enabled:
            return
        text = f"epoch {row['epoch']}/{self._epochs}  loss {row['train_loss']:.5g}"
        if row["val_loss"] is not None:
            text += f"  val {row['val_loss']:.5g}"
        if self._bar is not None:
            self._bar.update(self._task, description=text, advance=self._pending)
            self._pending = 0
        elif last or row["epoch"] == 1 or time.monotonic() - self._last > LINE_INTERVAL:
            self._last = time.monotonic()
            print(f"{text}  {row['seconds']:.2f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop drawing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def watched(parts: Iterable[Part], total: int, text: str, enabled: bool) -> Iterator[Part]:
    """The parts, one by one, and how many of ``total`` are done, if they take longer than a second.

    Parameters
    ----------
    parts : iterable
    total : int
    text : str
        What is done with them.
    enabled : bool
        Whether anything is shown.
    """
    bar: Any = None
    began = last = time.monotonic()
    try:
        for done, part in enumerate(parts):
            now = time.monotonic()
            if enabled and done and sys.stderr.isatty() and (bar is not None or now - began > 1.0):
                if bar is None:
                    bar, task = _bar(text, total)
                bar.update(task, completed=done)
            elif enabled and done and now - last > LINE_INTERVAL:
                last = now
                print(f"{text}  {done}/{total} parts", file=sys.stderr, flush=True)
            yield part
        if bar is not None:
            bar.update(task, completed=total)
    finally:
        if bar is not None:
            bar.stop()


def _bar(text: str, total: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("parts"),
        TimeRemainingColumn(), console=Console(file=sys.stderr),
    )  # fmt: skip
    task = bar.add_task(text, total=total)
    bar.start()
    return bar, task
