"""One experiment from its name to its page."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rvae_fast.datasets.cache import atomic_path
from rvae_fast.experiments import by_name, runner
from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.experiment import EMBEDDED, VARIANTS, Experiment, Settings
from rvae_fast.experiments.page import write_page
from rvae_fast.experiments.store import Results
from rvae_fast.experiments.tables import Row, diverged, to_csv
from rvae_fast.report.page import require_packages

QUICK_SEEDS = 2
#: Fewer tell nothing, and the scores that are fitted on them need some.
FEWEST_ROWS = 100


def reproduce(
    name: str,
    *,
    quick: bool = False,
    seeds: int | None = None,
    data: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    results: str | os.PathLike[str] | None = None,
    models: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    epochs: int | None = None,
    rows: int | None = None,
    variant: str = "",
    run: bool = True,
    command: str = "",
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> Path:
    """Run one of the article's experiments, or what is left of it, and write its page.

    Parameters
    ----------
    name : {"degradation", "explosion", "novelty", "deep", "rapp", "places", "views", "tabular"}
    quick : bool, default False
        A few epochs on a part of the rows, one or two classes, two seeds: meant to take under three minutes on two idle
        cores. It shows that everything works, and proves nothing.
    seeds : int, optional
        How many; the experiment's own number unless given.
    data : sequence of str, optional
        Names of data sets; the experiment's own unless given. A quick run takes the first of them that is cached, else
        the embedded digits, and says so.
    out : path, optional
        Folder of ``results.csv``, ``summary.csv``, ``index.html`` and the pictures; ``reproduce-<name>`` unless given.
        A results file that is there is continued.
    results : path, optional
        The results file, where it is not ``out``'s own. Experiments with the same scores may share one: ``novelty`` and
        ``rapp`` have cells in common, and a cell that one of them has finished the other does not run again.
    models : path, optional
        A folder of trained models: a cell whose model is there is scored without training, any other is kept there when
        it is trained (10 to 14 MB for ten layers on images).
    jobs : int, optional
        Processes, each of one thread; as many as there are cores unless given (one where a GPU does the work).
    epochs : int, optional
        In place of the experiment's own.
    rows : int, optional
        Training rows at most, as many for validation, and about twice as many for the test; all unless given. Such
        cells are of another recipe than those on all rows, and need a results file of their own.
    variant : str, optional
        A change to every cell, see :data:`rvae_fast.experiments.experiment.VARIANTS`.
    run : bool, default True
        False only writes the page of what is there.
    command : str
        For the page: what was typed.
    say : callable
        Told what happens, a line or several at a time.
    progress : bool, default False
        A bar in a terminal.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ValueError
        Naming the argument.
    ImportError
        At once, without the packages that draw the page.
    rvae_fast.experiments.store.ResultsError
        When the results file holds these cells run by other settings.
    """
    require_packages()
    chosen = by_name(name)
    if variant and variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    for argument, value in (("seeds", seeds), ("jobs", jobs), ("epochs", epochs)):
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    if rows is not None and rows < FEWEST_ROWS:
        raise ValueError(f"rows must be at least {FEWEST_ROWS}, got {rows}")
    if models is not None and not chosen.keeps_models:
        raise ValueError(f"models must be None for {name}, which keeps no models, got {os.fspath(models)!r}")
    notes: list[str] = []
    names = _data(chosen, data, quick, notes)
    count = seeds or (QUICK_SEEDS if quick else chosen.seeds)
    settings = Settings(data=names, seeds=count, quick=quick, epochs=epochs, variant=variant, max_rows=rows)
    cells = chosen.grid(settings)
    folder = Path(f"reproduce-{name}" if out is None else out)
    table = Results(folder / "results.csv" if results is None else results, chosen.metrics(chosen.scores))
    processes = runner.default_jobs() if jobs is None else jobs
    if quick:
        notes.insert(0, "A quick run: few epochs on a part of the rows. It shows the machinery and proves nothing.")
    for note in notes:
        say(note)
    # An error where cells were run by another recipe: no page is made of them by this one's name either.
    todo = runner.left_to_do(cells, table)
    if run:
        seconds = chosen.estimate(todo, processes, models)
        say(runner.listing(cells, table, seconds, processes))
        work = functools.partial(chosen.work, models=None if models is None else os.fspath(models))
        runner.run(cells, table, folder=folder, jobs=processes, say=say, progress=progress, work=work)
    return _write(chosen, settings, cells, table, folder, notes, command, processes)


def _data(chosen: Experiment, given: Sequence[str] | None, quick: bool, notes: list[str]) -> tuple[str, ...]:
    """The data sets to run on; a quick run takes what is at hand."""
    from rvae_fast import datasets

    wanted = tuple(dict.fromkeys(chosen.data if given is None else given))
    known = datasets.names()
    for name in wanted:
        if name not in known:
            raise ValueError(f"data must be among {', '.join(known)}, got {name!r}")
    if not wanted:
        raise ValueError("data must name at least one data set, got none")
    at_hand = {info.name: info.cached for info in datasets.list_datasets()}
    if quick and given is None:
        cached = [name for name in wanted if at_hand[name]]
        if cached:
            return (cached[0],)
        notes.append(f"None of {', '.join(wanted)} is in the cache: this run takes scikit-learn's digits instead.")
        return (EMBEDDED,)
    return wanted


def _write(
    chosen: Experiment,
    settings: Settings,
    cells: Sequence[Cell],
    results: Results,
    folder: Path,
    notes: list[str],
    command: str,
    jobs: int,
) -> Path:
    rows = results.of(cells)
    if not rows:
        raise ValueError(f"{results.path} has none of the {len(cells)} cells: there is nothing to make a page of")
    if len(rows) < len(cells):
        notes = [*notes, f"{len(cells) - len(rows)} of {len(cells)} cells are not run yet."]
    if settings.variant:
        notes = [*notes, f"Variant {settings.variant}: {VARIANTS[settings.variant][0]}."]
    if lost := diverged(rows):
        notes = [
            *notes,
            f"{len(lost)} of {len(rows)} trainings diverged, their loss or gradient no longer finite: "
            f"{'; '.join(lost)}. They count as spikes without end, and have no part in anything else.",
        ]
    folder.mkdir(parents=True, exist_ok=True)  # the results file may be elsewhere
    found = chosen.findings(rows, settings, folder)
    for i, (heading, table) in enumerate(found.tables.items()):
        stem = "summary" if i == 0 else f"summary-{heading.lower().replace(' ', '-')}"
        with atomic_path(folder / f"{stem}.csv") as temporary:
            temporary.write_text(to_csv(table), encoding="utf-8")
    seconds = sum(float(row["cpu_seconds"]) for row in rows)
    return write_page(
        folder,
        title=chosen.title,
        description=chosen.description,
        findings=found,
        notes=notes,
        configuration={
            "command": command,
            "data": ", ".join(settings.data),
            "seeds": ", ".join(str(seed) for seed in range(settings.seeds)),
            "cells": f"{len(rows)} of {len(cells)}",
            "epochs": _values(rows, "epochs"),
            "training rows": _values(rows, "train_rows"),
            "precision": _values(rows, "precision"),
            "processor time": runner.duration(seconds),
            "processes": jobs,
            "recipe of the first cell": rows[0]["recipe"],
        },
    )


def _values(rows: Sequence[Row], name: str) -> str:
    """What a column has, each value once; what was not trained has no epochs."""
    return ", ".join(dict.fromkeys(row[name] for row in rows if row[name]))
