"""The GPU benchmark without a GPU: its arithmetic, its order, its handling of time and trouble, and one dry run."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_gpu
import gpu_cells
import gpu_floor
import gpu_measure
import gpu_table
import gpu_variants
import pytest
from gpu_cells import Cell, Job
from gpu_floor import Roof, Work

ROOT = Path(__file__).parents[2]


# --- floors ---


def test_a_layers_floor_by_hand() -> None:
    forward, backward = gpu_floor.linear(1000, 512, 512, 2, training=True)
    assert forward == Work(2 * 1000 * 512 * 512, 4 * 1000 * 512 + 2 * 512 * 512)
    assert backward == Work(4 * 1000 * 512 * 512, 6 * 1000 * 512 + 6 * 512 * 512)
    assert gpu_floor.linear(1000, 512, 512, 2, training=False) == [forward]


def test_the_floor_is_the_longer_time_of_each_pass() -> None:
    roof = Roof(flops=10.0, bytes=2.0)
    assert roof.seconds([Work(100.0, 2.0), Work(10.0, 8.0)]) == 10.0 + 4.0
    assert gpu_floor.total([Work(1.0, 2.0), Work(3.0, 4.0)]) == Work(4.0, 6.0)


def test_a_networks_floor_counts_its_own_layers() -> None:
    import torch
    from torch import nn

    cell = Cell("train", 16, 24, 4)
    net = gpu_cells.model(cell, torch.device("cpu"))
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    products = sum(2.0 * 24 * m.in_features * m.out_features for m in linears)
    assert gpu_floor.total(gpu_cells.passes(cell)).flops == 3 * products
    assert gpu_floor.total(gpu_cells.passes(Cell("score", 16, 24, 4))).flops == products


def test_the_loss_reads_each_input_once() -> None:
    forward, backward = gpu_floor.loss(10, 100, 3, 2, backward=True)
    assert forward.bytes == 2 * 10 * (100 + 100 + 3 + 3)
    assert backward.bytes == 2 * 10 * (3 * 100 + 4 * 3)


# --- order ---


def test_what_matters_most_comes_first() -> None:
    jobs = gpu_cells.jobs()
    assert len(jobs) == len(set(jobs))
    assert jobs[0].cell.workload == "roofs"
    first = [job.cell for job in jobs[1:32]]
    assert set(first) == set(gpu_cells.KEY)
    deep = [job for job in jobs[1:20] if job.variant.startswith("compile")]
    assert {job.cell for job in deep} == {gpu_cells.KEY[i] for i in (0, 1, 2, 5)}
    assert {job.variant for job in jobs} == {*gpu_cells.VARIANTS, gpu_cells.CALLABLE}
    assert {job.cell.workload for job in jobs if job.variant == gpu_cells.CALLABLE} == {"host overhead"}
    for cell in gpu_cells.KEY:
        variants = {job.variant for job in jobs if job.cell == cell}
        assert variants >= {"rvae_fast", "eager", *gpu_cells.COMPILED}
    train = {(j.cell.width, j.cell.batch, j.cell.blocks) for j in jobs if j.cell.workload == "train"}
    assert {w for w, _, _ in train} == {128, 512, 1024, 2048}
    assert {b for _, b, _ in train} == {1024, 8192, 65536}
    assert max(blocks for _, _, blocks in train) == 100


# --- time and trouble ---


class FakeWorker:
    """Plays a script of what jobs do: "hang", "crash", "error", or be measured."""

    script: dict[int, Any]
    started: list[list[int]]
    stopped: int

    def __init__(self, numbers: list[int], dry_run: bool) -> None:
        FakeWorker.started.append(list(numbers))
        self._messages = []
        for number in numbers:
            self._messages.append({"start": number})
            what = FakeWorker.script.get(number)
            if what in ("hang", "crash"):
                self._messages.append(what)
                break
            measured = {"number": number, "name": "n", "variant": "v", "seconds": 1.0}
            self._messages.append({**measured, **({"error": "x"} if what == "error" else {})})

    def next(self, timeout: float) -> Any:
        message = self._messages.pop(0) if self._messages else None
        if message == "hang":
            raise queue.Empty
        return None if message == "crash" else message

    def stop(self) -> int:
        FakeWorker.stopped += 1
        return -9


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    monkeypatch.setattr(bench_gpu, "Worker", FakeWorker)
    FakeWorker.script, FakeWorker.started, FakeWorker.stopped = {}, [], 0
    return FakeWorker


def run(numbers: list[int], deadline: float = float("inf")) -> dict[str, Any]:
    record: dict[str, Any] = {"results": [], "not_run": []}
    writes = []
    bench_gpu.measure(record, numbers, deadline, True, lambda: writes.append(len(record["results"])))
    assert writes
    assert writes[-1] == len(record["results"]), "the last result was not written"
    return record


def test_a_job_that_hangs_or_crashes_is_recorded_and_the_rest_goes_on(fake: type[FakeWorker]) -> None:
    fake.script = {2: "hang", 4: "crash"}
    record = run([1, 2, 3, 4, 5])
    assert [r["number"] for r in record["results"]] == [1, 2, 3, 4, 5]
    errors = {r["number"]: r["error"] for r in record["results"] if "error" in r}
    assert errors == {2: "stopped after 60 s", 4: "the process ended with status -9"}
    assert fake.started == [[1, 2, 3, 4, 5], [3, 4, 5], [5]]
    assert record["not_run"] == []


def test_after_an_error_another_process_goes_on(fake: type[FakeWorker]) -> None:
    """A lost device or a broken capture is not passed on to the next job."""
    fake.script = {2: "error"}
    record = run([1, 2, 3])
    assert [(r["number"], "error" in r) for r in record["results"]] == [(1, False), (2, True), (3, False)]
    assert fake.started == [[1, 2, 3], [3]]


def test_a_count_goes_to_the_time_of_its_variant() -> None:
    cell = gpu_cells.KEY[0]
    times = [{"name": cell.name, "variant": v, "seconds": 1.0} for v in ("rvae_fast", "eager")]
    results = [dict(t) for t in times]
    bench_gpu.add(results, {"name": cell.name, "variant": "eager", "kernels": 7}, Job(cell, "eager", counts=True))
    assert results == [times[0], {**times[1], "kernels": 7}]
    bench_gpu.add(results, {"name": cell.name, "variant": "compile", "kernels": 7}, Job(cell, "compile", counts=True))
    assert len(results) == 2
    todo = gpu_cells.jobs()
    counted = [job.counts for job in todo]
    assert counted == sorted(counted), "counts come last"
    assert {job.cell for job in todo if job.counts} == set(gpu_cells.KEY)


def test_compiles_ahead_what_takes_long_and_is_not_chosen_by_timing() -> None:
    todo = gpu_cells.jobs()
    ahead = [todo[n] for n in gpu_cells.compilations()]
    assert ahead[0] == Job(gpu_cells.KEY[1], "compile reduce-overhead")
    assert {Job(gpu_cells.KEY[i], "compile") for i in (0, 2, 5)} <= set(ahead)
    assert not [job for job in ahead if "max-autotune" in job.variant]
    import torch

    gpu_measure.compile_job(Job(gpu_cells.shrink(ahead[0].cell), ahead[0].variant), torch.device("cpu"))


def test_compiles_ahead_in_processes_and_says_what_failed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    commands = []

    def fake_run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, int("7" in command))

    monkeypatch.setattr(bench_gpu.subprocess, "run", fake_run)
    monkeypatch.setattr(gpu_cells, "compilations", lambda: [7, 9])
    assert bench_gpu.compile_ahead(2, dry_run=True) == 1
    assert sorted(c[c.index("--compile") + 1] for c in commands) == ["7", "9"]
    assert "FAILED (1)" in capsys.readouterr().out


def test_choices_by_timing_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.best_config").touch()
    (tmp_path / "a" / "x.py").touch()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    bench_gpu.forget_timings()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    bench_gpu.forget_timings()
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["x.py"]


def test_when_the_time_is_up_what_was_measured_is_written(fake: type[FakeWorker], monkeypatch: Any) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(bench_gpu.time, "monotonic", lambda: float(next(clock)))
    fake.script = {2: "hang"}
    record = run([0, 1, 2, 3], deadline=7.0)
    assert [r["number"] for r in record["results"]] == [0, 1]
    assert len(record["not_run"]) == 2
    assert fake.stopped == 1


def test_a_table_of_a_record() -> None:
    cell = {"workload": "train", "width": 512, "batch": 65536, "blocks": 50, "dtype": "bf16"}
    times = {"spread": 0.01, "peak_bytes": 2**30, "kernels": 600, "kept_bytes": None}
    record = {
        "device": {"gpu": "X", "torch": "2.11", "triton": "3.6", "date": "2026-01-01"},
        "not_run": ["a"],
        "results": [
            {"roofs": {"copy": 3e12, "bf16": 8e14, "tf32": 4e14, "fp32": 5e13}, "name": "r", "variant": "rvae_fast"},
            {"name": "c", "variant": "rvae_fast", "cell": cell, "seconds": 0.05, **times},
            {"name": "c", "variant": "compile", "cell": cell, "seconds": 0.10, **times},
            {"name": "c", "variant": "eager", "error": "OutOfMemoryError: no"},
        ],
    }
    text = gpu_table.summary(record)
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1, "rows of unequal length"
    assert rows[2][:3] == ["c", "rvae_fast", "50.000"]
    assert rows[3][4] == "2.00"
    assert "OutOfMemoryError" in rows[4][2]
    floor = Roof(8e14, 3e12).seconds(gpu_cells.passes(Cell(**cell)))
    assert rows[2][5] == f"{floor * 1e3:.3f}"


def test_a_cell_that_cannot_run_says_why() -> None:
    import torch

    result = gpu_measure.run_job(Job(Cell("no such workload", 4, 4), "rvae_fast"), torch.device("cpu"), 0.0)
    assert result["error"] == "ValueError: no workload 'no such workload'"
    assert "seconds" not in result
    broken = gpu_measure.run_job(Job(Cell("train", 4, 4, 0), "compile"), torch.device("meta"), 0.0)
    assert "error" in broken


def test_a_cell_that_runs_out_of_memory_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def prepare(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(gpu_measure, "prepare", prepare)
    result = gpu_measure.run_job(Job(Cell("train", 4, 4, 2), "eager"), torch.device("cpu"), 0.0)
    assert result["error"].startswith("OutOfMemoryError: CUDA out of memory")
    assert "seconds" not in result


def test_compiling_ahead_waits_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    left = [2]

    def step() -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_measure, "prepare", lambda *_: gpu_variants.Prepared(step))
    monkeypatch.setattr(gpu_measure, "WAITS", (0.0, 0.0))
    job, cpu = Job(Cell("train", 4, 4, 2), "compile"), torch.device("cpu")
    gpu_measure.compile_job(job, cpu)
    assert left == [-1]
    left[0] = 9
    with pytest.raises(torch.OutOfMemoryError):
        gpu_measure.compile_job(job, cpu)


def test_no_profiler_runs_where_something_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would slow the launches of whoever is measured next in the process."""
    import torch

    monkeypatch.setattr(gpu_measure, "_kernels", lambda *_: pytest.fail("a profiler"))
    result = gpu_measure.run_job(Job(Cell("host overhead", 8, 4, 1), "rvae_fast"), torch.device("cpu"), 0.0)
    assert "host_seconds" in result
    assert "error" not in result
    todo = gpu_cells.jobs()
    host = [n for n, job in enumerate(todo) if job.cell == gpu_cells.KEY[8]]
    assert todo[0].cell == gpu_cells.ROOFS
    assert host[:2] == [1, 2]


def test_a_count_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(gpu_measure, "_kernels", lambda *_: 5)
    monkeypatch.setattr(gpu_measure, "_measure", lambda *_: pytest.fail("a timing"))
    result = gpu_measure.run_job(Job(Cell("last layer with error", 8, 4), "eager", counts=True), torch.device("cpu"))
    assert result["kernels"] == 5


@pytest.mark.parametrize("workload", ["train", "stage forward", "loss forward"])
def test_graphs_of_the_compiler_are_told_of_each_step(workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a forward pass without its backward makes them record anew at every call."""
    import torch

    begun: list[str] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append("step"))
    monkeypatch.setattr(gpu_variants, "_compiled", lambda function, *_: function)
    for variant in gpu_cells.VARIANTS:
        ready = gpu_variants.prepare(Job(Cell(workload, 8, 12, 2), variant), torch.device("cpu"))
        begun.clear()
        ready.step()
        assert len(begun) == int("reduce-overhead" in variant or "max-autotune" in variant)


def test_dry_run(tmp_path: Path) -> None:
    """The real script and worker: every kind of variant of one workload, and the files it leaves."""
    only = r"last layer|roofs|train, W = 128, B = 1024, 50 blocks.*(rvae_fast|rvae_fast graph)$"
    command = [sys.executable, "benchmarks/bench_gpu.py", "--dry-run", "--budget", "500"]
    done = subprocess.run(
        [*command, "--only", only, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert record["not_run"] == []
    assert not [r for r in record["results"] if "error" in r]
    assert {r["variant"] for r in record["results"]} == set(gpu_cells.VARIANTS)
    assert "last layer with error" in (tmp_path / "gpu-dry-run.md").read_text()
    assert not list(tmp_path.glob("*.partial"))


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
