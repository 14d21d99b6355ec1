"""The grid runs, resumes, and does not mix results."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rvae_fast.experiments import by_name, runner
from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.cost import rows_of_training
from rvae_fast.experiments.experiment import Settings
from rvae_fast.experiments.kept import model_file
from rvae_fast.experiments.store import Results, ResultsError

from .conftest import cell

CELLS = [cell(seed=seed) for seed in range(4)]
METRICS = ("seconds", "auroc_reconstruction")


def results(folder: Path) -> Results:
    return Results(folder / "results.csv", METRICS)


def work(cell: Cell, folder: str) -> dict[str, Any]:
    """Stands for a training; leaves a mark, so that a test sees what ran."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / "ran", "a") as file:
        file.write(f"{cell.seed}\n")
    if cell.novel == "bad":
        raise ValueError("no such class")
    return {"seconds": 0.5, "auroc_reconstruction": 0.25 + cell.seed}


def ran(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "ran").read_text().split()]


def test_a_finished_cell_is_a_row_and_is_not_run_again(folder: Path) -> None:
    runner.run(CELLS[:2], results(folder), work=work)
    said: list[str] = []
    runner.run(CELLS, results(folder), work=work, say=said.append)
    assert ran(folder) == [0, 1, 2, 3]
    rows = results(folder).of(CELLS)
    assert [row["auroc_reconstruction"] for row in rows] == ["0.25", "1.25", "2.25", "3.25"]
    assert said[0].startswith("3/4  digits, 0 novel, AE, 4 layers, seed 2, AUROC 2.25")
    assert (folder / "results.csv").read_text().count("recipe") == 1  # one header


def test_a_failing_cell_is_named_and_those_before_it_are_kept(folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"digits, bad novel.*no such class"):
        runner.run([CELLS[0], cell(novel="bad"), CELLS[1]], results(folder), work=work)
    assert len(results(folder).rows) == 1


def slow_work(cell: Cell, folder: str) -> dict[str, Any]:
    """One cell fails while another is under way, and would be for a while."""
    if cell.novel == "bad":
        raise ValueError("no such class")
    time.sleep(2.0)
    return {"seconds": 2.0, "auroc_reconstruction": 0.5}


def test_a_failing_cell_costs_no_other_its_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # processes that are spawned import this module
    with pytest.raises(RuntimeError, match=r"digits, bad novel.*no such class"):
        runner.run([CELLS[0], cell(novel="bad"), *CELLS[1:]], results(folder), work=slow_work, jobs=2)
    assert len(results(folder).of(CELLS)) == 1, "the one that was under way, and none that was not"


def test_a_torn_last_line_is_run_again(folder: Path) -> None:
    runner.run(CELLS[:3], results(folder), work=work)
    path = folder / "results.csv"
    path.write_bytes(path.read_bytes()[:-20])
    assert results(folder).missing(CELLS[:3]) == [CELLS[2]]
    runner.run(CELLS[:3], results(folder), work=work)
    assert ran(folder) == [0, 1, 2, 2]
    assert len(path.read_text().splitlines()) == 4


def test_results_of_another_recipe_are_refused(folder: Path) -> None:
    runner.run(CELLS[:1], results(folder), work=work)
    with pytest.raises(ResultsError, match=r"with .*epochs 1,.* and not with .*epochs 2,.*: give another"):
        results(folder).missing([cell(training={"epochs": 2})])
    with pytest.raises(ResultsError, match="holds the columns"):
        Results(folder / "results.csv", ("hours", "auroc_reconstruction"))


def test_a_row_that_lacks_a_score_gets_it_and_keeps_the_rest(folder: Path) -> None:
    asked: list[tuple[int, tuple[str, ...]]] = []

    def score(cell: Cell, folder: str) -> dict[str, Any]:
        asked.append((cell.seed, cell.scores))
        return {"seconds": 9.0, **{f"auroc_{name}": 0.5 + 0.1 * len(asked) for name in cell.scores}}

    few = [cell(seed=seed) for seed in (0, 1)]
    more = [cell(seed=seed, scores=("reconstruction", "sap")) for seed in (0, 1, 2)]
    ranked = [cell(seed=0, scores=("reconstruction", "sap", "rank"))]
    runner.run(few, results(folder), work=work)
    wider = Results(folder / "results.csv", (*METRICS, "auroc_sap", "auroc_rank"))
    assert wider.missing(more) == more
    assert (folder / "results.csv").read_text().count("auroc_sap") == 0, "reading changes nothing"
    runner.run(more, wider, work=score)
    assert asked == [(0, ("sap",)), (1, ("sap",)), (2, ("reconstruction", "sap"))]
    for table in (wider, Results(folder / "results.csv", METRICS)):  # without a score's column it is there all the same
        assert table.missing(few) == table.missing(more) == []
        rows = table.of(more)
        assert [row["seconds"] for row in rows] == ["0.5", "0.5", "9"]
        assert [row["auroc_reconstruction"] for row in rows] == ["0.25", "1.25", "0.8"]
        assert [row["auroc_sap"] for row in rows] == ["0.6", "0.7", "0.8"]
        assert [row["auroc_rank"] for row in rows] == ["", "", ""]
    assert len((folder / "results.csv").read_text().splitlines()) == 4
    runner.run(ranked, wider, work=score)
    assert asked[-1] == (0, ("reconstruction", "sap", "rank")), "a rank sum sees the scores it is over"
    assert Results(folder / "results.csv", METRICS).of(ranked)[0]["seconds"] == "0.5"


def test_runs_that_share_a_file_lose_nothing_of_each_other(folder: Path) -> None:
    one = results(folder)
    one.add(CELLS[0], {"seconds": 1.0, "auroc_reconstruction": 0.5})
    other = Results(folder / "results.csv", (*METRICS, "auroc_sap"))
    one.add(CELLS[1], {"seconds": 1.0, "auroc_reconstruction": 0.6})
    other.add(cell(seed=0, scores=("sap",)), {"seconds": 9.0, "auroc_sap": 0.7})  # writes the file anew, with a column
    one.add(CELLS[2], {"seconds": 1.0, "auroc_reconstruction": 0.8})
    other.add(CELLS[2], {"seconds": 9.0, "auroc_reconstruction": 0.8})  # both were at it
    rows = results(folder).of(CELLS)
    assert [row["auroc_reconstruction"] for row in rows] == ["0.5", "0.6", "0.8"]
    assert [row["auroc_sap"] for row in rows] == ["0.7", "", ""]
    assert len((folder / "results.csv").read_text().splitlines()) == 4
    with pytest.raises(ResultsError, match="give another directory"):
        other.add(cell(seed=1, rows=100), {"seconds": 1.0, "auroc_reconstruction": 0.1})


def test_runs_that_begin_one_file_write_one_header(folder: Path) -> None:
    both = results(folder), Results(folder / "results.csv", (*METRICS, "auroc_sap"))
    for table, own in zip(both, CELLS, strict=False):
        table.add(own, {"seconds": 1.0, "auroc_reconstruction": 0.5})
    assert (folder / "results.csv").read_text().count("recipe") == 1
    assert results(folder).missing(CELLS[:2]) == []


def test_a_file_that_is_removed_meanwhile_is_written_anew(folder: Path) -> None:
    table = results(folder)
    table.add(CELLS[0], {"seconds": 1.0, "auroc_reconstruction": 0.5})
    table.path.unlink()
    table.add(CELLS[1], {"seconds": 1.0, "auroc_reconstruction": 0.6})
    assert len(results(folder).of(CELLS)) == 2


def test_reading_changes_nothing_and_a_damaged_line_is_named(folder: Path) -> None:
    runner.run(CELLS[:3], results(folder), work=work)
    path = folder / "results.csv"
    path.write_bytes(path.read_bytes()[:-20])
    torn = path.read_bytes()
    assert len(results(folder).of(CELLS)) == 2  # another run may be writing the line
    assert path.read_bytes() == torn
    path.write_bytes(b"\n".join([*torn.splitlines()[:2], b"digits,0", b""]))
    with pytest.raises(ResultsError, match=r"results\.csv, line 3, has not the \d+ values of the header"):
        results(folder)


def test_every_row_of_a_grid_has_its_own_name() -> None:
    from rvae_fast.experiments import NAMES, by_name
    from rvae_fast.experiments.experiment import Settings

    for name in NAMES:
        for quick in (True, False):
            chosen = by_name(name)
            cells = chosen.grid(Settings(data=chosen.data, seeds=2, quick=quick))
            assert len({c.key for c in cells}) == len(cells)
            assert all(set(c.scores) <= set(chosen.scores) for c in cells)


def test_processes_give_the_same_rows_as_one(folder: Path) -> None:
    cells = [cell(seed=seed, model=model) for seed in (0, 1) for model in ("AE", "VAE")]
    from rvae_fast.experiments.work import metric_names

    one = Results(folder / "one.csv", metric_names(("reconstruction",)))
    two = Results(folder / "two.csv", metric_names(("reconstruction",)))
    threads = torch.get_num_threads()
    runner.run(cells, one, jobs=1)
    runner.run(cells, two, jobs=2)
    assert torch.get_num_threads() == threads
    for a, b in zip(one.of(cells), two.of(cells), strict=True):
        same = {name: value for name, value in a.items() if not name.endswith("seconds")}
        assert same == {name: b[name] for name in same}
        assert 0 < float(a["auroc_reconstruction"]) < 1


def test_a_killed_run_goes_on_where_it_stopped(folder: Path) -> None:
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from rvae_fast.experiments import runner
        from rvae_fast.experiments.cells import Cell
        from rvae_fast.experiments.store import Results

        def work(cell, folder):
            if cell.seed == 2:
                time.sleep(600)
            return {"seconds": 0.0, "auroc_reconstruction": 0.5}

        cells = [Cell(data="digits", novel="0", model="AE", n_layers=4, seed=seed) for seed in range(4)]
        runner.run(cells, Results(sys.argv[1], ("seconds", "auroc_reconstruction")), work=work)
    """)
    path = folder / "results.csv"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)])
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not path.exists() or len(path.read_text().splitlines()) < 3):
            time.sleep(0.1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    cells = [Cell(data="digits", novel="0", model="AE", n_layers=4, seed=seed) for seed in range(4)]
    again = Results(path, METRICS)
    assert again.missing(cells) == cells[2:]
    runner.run(cells, again, work=work)
    assert ran(folder) == [2, 3]


@pytest.mark.skipif(sys.platform == "win32", reason="looks for a process by signal 0")
def test_processes_end_with_the_one_that_runs_the_grid(folder: Path) -> None:
    script = textwrap.dedent("""
        import os, sys, time
        from pathlib import Path
        from rvae_fast.experiments import runner
        from rvae_fast.experiments.cells import Cell
        from rvae_fast.experiments.store import Results

        def work(cell, folder):
            name = Path(folder) / f"pid-{cell.seed}"
            name.with_suffix(".part").write_text(str(os.getpid()))
            name.with_suffix(".part").rename(name)
            time.sleep(600)

        if __name__ == "__main__":
            cells = [Cell(data="digits", novel="0", model="AE", n_layers=4, seed=seed) for seed in range(2)]
            runner.run(cells, Results(sys.argv[1], ("seconds",)), jobs=2, work=work)
    """)
    folder.mkdir()
    path = folder / "script.py"
    path.write_text(script)
    process = subprocess.Popen([sys.executable, str(path), str(folder / "results.csv")])
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(list(folder.glob("pid-?"))) < 2:
            time.sleep(0.1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    workers = [int(file.read_text()) for file in folder.glob("pid-?")]
    assert len(workers) == 2
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and any(_runs(pid) for pid in workers):
            time.sleep(0.05)
        assert not any(_runs(pid) for pid in workers)
    finally:
        for pid in workers:
            if _runs(pid):
                os.kill(pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    """Whether there is such a process, one that has ended but that nobody has asked about apart."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_estimate_grows_with_the_work() -> None:
    short, long = cell(training={"epochs": 2, "batch_size": 32}), cell(training={"epochs": 200, "batch_size": 32})
    assert 20 * runner.estimate([short], 1) < runner.estimate([long], 1)
    assert runner.estimate([], 2) == 0.0


def test_an_estimate_trains_no_model_that_is_kept(folder: Path) -> None:
    own = cell(training={"epochs": 200, "batch_size": 32})
    path = model_file(folder, own).with_suffix(".json")
    path.parent.mkdir(parents=True)
    path.touch()
    assert 20 * runner.estimate([own], 1, folder) < runner.estimate([own], 1, folder / "others")
    with_steps = dataclasses.replace(own, steps=True)  # which a kept model does not have
    assert 20 * runner.estimate([own], 1, folder) < runner.estimate([with_steps], 1, folder)


def test_only_the_scores_that_a_row_lacks_are_left_to_do(folder: Path) -> None:
    table = results(folder)
    own = cell()
    table.add(own, {"auroc_reconstruction": 0.5})
    more, other = dataclasses.replace(own, scores=("reconstruction", "sap")), cell(seed=7)
    assert [c.scores for c in runner.left_to_do([more, other], table)] == [("sap",), other.scores]


def test_what_scores_take_counts() -> None:
    """In rows of training, by the figures of ten layers on images: half a training for novelty's and hyperplane."""
    rows = (38_000, 12_600, 19_500)
    shares = {
        name: rows_of_training(by_name(name).grid(Settings(("mnist",), 1))[-1].scores, *rows) / (12 * rows[0])
        for name in ("novelty", "rapp", "places", "views")
    }
    assert shares["novelty"] < shares["rapp"] < 0.7 < shares["places"] < 1.6
    assert shares["views"] > 1.0
    assert rows_of_training(("reconstruction",), *rows) < rows_of_training(("reconstruction@views",), *rows) / 10
    every = ("reconstruction", "elbo", "sap", "nap/units", "local", "hyperplane", "pixel", "samples", "rank")
    assert rows_of_training(every, *rows) > rows_of_training(every[:-2], *rows) > 0


@pytest.mark.parametrize(("seconds", "text"), [(42, "42 s"), (200, "3 min"), (9000, "2.5 h")])
def test_duration(seconds: float, text: str) -> None:
    assert runner.duration(seconds) == text
