"""Run a grid: list it with an estimate of its time, then cell by cell, in processes if wanted, into a results file."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import connection, get_context, parent_process
from typing import Any

from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.cost import rows_of_training
from rvae_fast.experiments.kept import model_file
from rvae_fast.experiments.store import Results
from rvae_fast.experiments.work import build, run_cell, split_of

#: Steps that an estimate times, after as many that warm up.
TIMED_STEPS = 4


def default_jobs() -> int:
    """One process a processor core, or one in all where a GPU does the work."""
    import torch

    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    cells: Sequence[Cell],
    results: Results,
    *,
    folder: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    say: Callable[[str], None] = lambda text: None,
    progress: bool = False,
    work: Callable[..., dict[str, Any]] = run_cell,
) -> None:
    """Run those cells of a grid that have no row yet, or not all their scores; each finished one is a row at once.

    Parameters
    ----------
    cells : sequence of Cell
    results : Results
    folder : path, optional
        Where steps are kept; beside the results file unless given.
    jobs : int, default 1
        Processes, each computing with one thread. With 1 the cells run in this process, with one thread as well, so
        that the results do not depend on ``jobs``.
    say : callable
        Told a line of text now and then.
    progress : bool, default False
        A bar in a terminal.
    work : callable
        What a cell does: ``work(cell, folder)`` returns its metrics. To run in another process it must be importable.

    Raises
    ------
    ResultsError
        When the results file holds cells run by another recipe.
    RuntimeError
        Naming the cell that failed. Those finished before it have their rows, and those that were under way.

    Notes
    -----
    When this process is killed, the others end at once, without a row for the cells they are at.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    todo = left_to_do(cells, results)
    beside = str(results.path.parent if folder is None else folder)
    began = time.perf_counter()
    done = len(cells) - len(todo)
    with _bar(progress, len(cells), done) as advance:
        for cell, metrics in _finished(todo, beside, min(jobs, len(todo)), work):
            results.add(cell, metrics)
            done += 1
            advance()
            spent = time.perf_counter() - began
            left = spent / (done - (len(cells) - len(todo))) * (len(cells) - done)
            auroc = next((f", AUROC {v:.4f}" for k, v in metrics.items() if k.startswith("auroc_") and v), "")
            if metrics.get("loss_ratio") == math.inf:
                auroc = f", diverged at step {metrics['steps'] + 1}"
            say(f"{done}/{len(cells)}  {cell.label}{auroc}, {duration(metrics['seconds'])}; {duration(left)} left")


def left_to_do(cells: Sequence[Cell], results: Results) -> list[Cell]:
    """The cells without a row, and those whose row lacks scores, for these alone."""
    return [dataclasses.replace(cell, scores=results.lacking(cell)) for cell in results.missing(cells)]


def _finished(
    todo: Sequence[Cell], folder: str, jobs: int, work: Callable[..., dict[str, Any]]
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    if jobs <= 1:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for cell in todo:
                yield cell, _named(cell, lambda cell=cell: work(cell, folder))  # type: ignore[misc]
        finally:
            torch.set_num_threads(threads)
        return
    # A fork of a process whose threads are running may hang; a fresh interpreter reads the variable before torch does.
    with _one_thread(), ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_begin) as pool:
        # One a process and no more: what is handed to the pool cannot be taken back, should a cell fail.
        left = iter(todo)
        pending: dict[Future[dict[str, Any]], Cell] = {
            pool.submit(work, cell, folder): cell for cell in itertools.islice(left, jobs)
        }
        failed: RuntimeError | None = None
        try:
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    cell = pending.pop(future)
                    try:
                        metrics = _named(cell, future.result)
                    except RuntimeError as error:
                        failed = failed or error  # what is under way is waited for, and has its rows
                        continue
                    following = next(left, None) if failed is None else None
                    if following is not None:
                        pending[pool.submit(work, following, folder)] = following
                    yield cell, metrics
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        if failed is not None:
            raise failed


def _named(cell: Cell, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except Exception as error:
        raise RuntimeError(f"{cell.label}: {type(error).__name__}: {error}") from error


def _begin() -> None:
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that runs the grid is gone: nobody would write down what it finds."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@contextlib.contextmanager
def _bar(enabled: bool, total: int, done: int) -> Iterator[Callable[[], None]]:
    if not enabled or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("cells", total=total, completed=done)
        yield lambda: bar.advance(task)


# --- the estimate ---


def multiplications(cell: Cell, in_features: int) -> int:
    """Weights of the cell's network, each of which is one multiplication a row in the forward pass."""
    return sum(p.numel() for p in build(cell, in_features, 0).parameters())


def estimate(cells: Sequence[Cell], jobs: int, models: str | os.PathLike[str] | None = None) -> float:
    """Seconds that the cells will take, from a few timed steps of one network of each model, in fp32 or bf16 as given.

    Other depths scale by the number of their weights, other rows and epochs by themselves; what the scores take is
    counted in rows of training (:mod:`rvae_fast.experiments.cost`). It is the time on a machine that has nothing else
    to do. What is kept in the directory ``models`` is not trained.
    """
    import torch

    if not cells:
        return 0.0
    rates: dict[str, float] = {}
    weights: dict[tuple[Any, ...], int] = {}
    shapes: dict[tuple[str, str, str], tuple[int, int, int, int]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    total = 0.0
    try:
        for cell in cells:
            data = (cell.data, cell.setting, cell.novel)
            if data not in shapes:
                split = split_of(cell)
                shapes[data] = (*split.X_train.shape, len(split.X_validation), len(split.X_test))
            rows, width, validation, test = shapes[data]
            net = (cell.data, cell.model, cell.order, cell.n_layers, repr(cell.network))
            if net not in weights:
                weights[net] = multiplications(cell, width)
            series = f"{cell.model} {cell.order}"
            if series not in rates:
                rates[series] = _seconds_a_row(cell, width) / weights[net]
            most = cell.rows or rows
            seen = min(rows, most)
            scored = rows_of_training(cell.scores, seen, min(validation, most), min(test, 2 * most))
            untrained = sum(cell.steps or not _is_kept(models, *one) for one in cell.models)
            trained = untrained * seen * int(cell.training.get("epochs", 100))
            total += rates[series] * weights[net] * (trained + scored * len(cell.models))
    finally:
        torch.set_num_threads(threads)
    return total / min(jobs, len(cells))


def _is_kept(models: str | os.PathLike[str] | None, cell: Cell, member: int) -> bool:
    """Whether the model is kept, by its name: what it was trained by is looked at when it is taken."""
    return models is not None and model_file(models, cell, member).with_suffix(".json").exists()


def _seconds_a_row(cell: Cell, width: int) -> float:
    """Time of a training step of the cell, by its number of rows."""
    import torch

    from rvae_fast.training import TrainingConfig, train

    config = dict(cell.training)
    batch = int(config.get("batch_size", 256))
    rows = torch.rand(TIMED_STEPS * batch, width)
    given = TrainingConfig(**{**config, "epochs": 2, "seed": 0, "warmup_epochs": 0.0, "accumulate": 1})
    at: list[float] = []
    # On a CPU the thread's own time: what other processes take of the machine comes and goes.
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    train(build(cell, width, 0), rows, given, callbacks=[lambda model, history: at.append(clock())])
    return (at[1] - at[0]) / len(rows)


def duration(seconds: float) -> str:
    """A time for reading: ``42 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def listing(cells: Sequence[Cell], results: Results, seconds: float, jobs: int) -> str:
    """The grid in words: what varies, how much of it is done, how long the rest will take."""
    missing = results.missing(cells)
    scored_anew = sum(cell.key in results.rows for cell in missing)
    done = f"{len(cells) - len(missing)} of them done" + (f", {scored_anew} lacking a score" if scored_anew else "")
    lines = [f"{len(cells)} cells, {done}, into {results.path}"]
    for data, setting in sorted({(c.data, c.setting) for c in cells}):
        here = [c for c in cells if (c.data, c.setting) == (data, setting)]
        lines.append(f"  {data}, {setting}: {_spread('class', [c.novel for c in here])}")
        for series in dict.fromkeys(c.series for c in here):
            own = [c for c in here if c.series == series]
            told = (
                ("layers", [c.n_layers for c in own if c.n_layers]), ("seed", [c.seed for c in own]),
                ("epochs", [c.training["epochs"] for c in own if "epochs" in c.training]),
            )  # fmt: skip
            varied = "; ".join(_spread(name, values) for name, values in told if values)
            lines.append(f"    {series:24} {len(own):4} cells: {varied}")
    lines.append(f"about {duration(seconds)} with {jobs} {'process' if jobs == 1 else 'processes of one thread each'}")
    return "\n".join(lines)


def _spread(name: str, values: Sequence[Any]) -> str:
    return f"{name} {', '.join(str(value) for value in dict.fromkeys(values))}"
