"""Measure rvae-fast on a GPU against eager and torch.compile: ``python benchmarks/bench_gpu.py --budget 270``.

Writes ``results/gpu-<device>.json`` and a table beside it, anew after every measurement, so that whenever it stops,
what it measured is there. The most important cells come first (``gpu_cells.jobs``). Jobs run in a process of their own:
one that hangs, crashes or compiles for too long is ended and recorded as such, and the next begins.
Kernels are counted at the end.

``--dry-run`` runs everything on the CPU at toy sizes, with stand-ins for graphs and for the code generator: it proves
the script, and its figures mean nothing.

``--compile-ahead 3`` measures nothing: three processes run what the compilers of the key cells' rivals take longest
for, so that a later run on this machine finds it in the compiler's cache.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()  # importing torch is part of the budget

import gpu_cells  # noqa: E402
import gpu_measure  # noqa: E402
import gpu_table  # noqa: E402

RESULTS = Path(__file__).parent / "results"
#: Seconds at the end that are kept for writing.
RESERVE = 2.0
#: Seconds at the end for counting kernels.
COUNTING = 30.0


# --- the worker: jobs by number, one line of JSON each ---


def _job(number: int, dry_run: bool) -> gpu_cells.Job:
    job = gpu_cells.jobs()[number]
    return replace(job, cell=gpu_cells.shrink(job.cell)) if dry_run else job


def work(numbers: list[int], dry_run: bool) -> None:
    """Run jobs and print what they found."""
    import torch

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no result
    device = torch.device("cpu") if dry_run else torch.device("cuda", 0)
    todo = gpu_cells.jobs()
    for number in numbers:
        job = _job(number, dry_run)
        print(json.dumps({"start": number}), file=out, flush=True)
        result = gpu_measure.run_job(job, device, 0.02 if dry_run else gpu_measure.TIMED)
        print(json.dumps({"number": number, **result, "name": todo[number].cell.name}), file=out, flush=True)


def compile_ahead(processes: int, dry_run: bool) -> int:
    """Compile :func:`gpu_cells.compilations`, each in a process of its own; 1 if one of them failed."""

    def run(number: int) -> int:
        began = time.monotonic()
        command = [sys.executable, str(Path(__file__).resolve()), "--compile", str(number)] + ["--dry-run"] * dry_run
        # In this process's group, so that what ends this one ends them.
        status = subprocess.run(command, check=False).returncode
        job = gpu_cells.jobs()[number]
        how = f"compiled in {time.monotonic() - began:.0f} s" if status == 0 else f"FAILED ({status})"
        print(f"{job.cell.name}: {job.variant}: {how}", flush=True)
        return status

    with ThreadPoolExecutor(processes) as pool:
        # All of them, before the verdict: to leave `map` early would cancel those that have not begun.
        return int(any(list(pool.map(run, gpu_cells.compilations()))))


def forget_timings() -> None:
    """Drop what the compiler has chosen by timing: perhaps beside other work. Its code stays in its cache."""
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        for file in Path(folder).rglob("*.best_config"):
            file.unlink(missing_ok=True)


class Worker:
    """A process that works through a list of jobs."""

    def __init__(self, numbers: list[int], dry_run: bool) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--work", ",".join(map(str, numbers))]
        self._process = subprocess.Popen(
            command + ["--dry-run"] * dry_run, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def next(self, timeout: float) -> dict[str, Any] | None:
        """The next message; None when the process has ended; ``queue.Empty`` after ``timeout`` seconds."""
        line = self._lines.get(timeout=max(timeout, 0.0))
        return None if line is None else json.loads(line)

    def stop(self) -> int:
        """End the process and its children, and return its exit status."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


# --- the parent: time, restarts, records ---


def measure(record: dict[str, Any], numbers: list[int], deadline: float, dry_run: bool, write: Any) -> None:
    """Run jobs until they are done or the time is up; every result goes into ``record["results"]``."""
    todo = gpu_cells.jobs()
    left = list(numbers)
    while left and time.monotonic() < deadline:
        worker = Worker(left, dry_run)
        current: int | None = None
        # The first message has to wait for imports and the device.
        limit = time.monotonic() + 120.0
        ended: str | None = None
        try:
            while True:
                message = worker.next(min(limit, deadline) - time.monotonic())
                if message is None:
                    ended = f"the process ended with status {worker.stop()}"
                    break
                if "start" in message:
                    current = message["start"]
                    limit = time.monotonic() + todo[current].limit
                    continue
                left.remove(message["number"])
                current = None
                limit = time.monotonic() + 120.0
                add(record["results"], message, todo[message["number"]])
                write()
                if "error" in message:
                    # A device error stays with its process, and a capture that broke off leaves its stream in place:
                    # what followed in this process would fail, or be another measurement.
                    worker.stop()
                    break
        except queue.Empty:
            worker.stop()
            if time.monotonic() >= deadline:
                break
            ended = f"stopped after {todo[current].limit:.0f} s" if current is not None else "no job began"
        if not left:
            break
        if ended is None:
            continue  # no job has failed but those that have said so
        failed = left[0] if current is None else current
        job = todo[failed]
        left.remove(failed)
        record["results"].append({"number": failed, "name": job.cell.name, "variant": job.variant, "error": ended})
        write()
    record["not_run"] += [f"{todo[n].cell.name}: {todo[n].variant}" for n in left if not todo[n].counts]
    write()


def add(results: list[dict[str, Any]], message: dict[str, Any], job: gpu_cells.Job) -> None:
    """Add a result; a count goes to the time of the same variant, if that was measured."""
    if not job.counts:
        results.append(message)
        return
    for result in results:
        if (result["name"], result["variant"]) == (job.cell.name, job.variant) and "seconds" in result:
            result["kernels"] = message.get("kernels")


def facts(dry_run: bool) -> dict[str, Any]:
    """The device and the versions."""
    import torch
    from harness import device_facts

    device = torch.device("cuda", 0) if not dry_run else torch.device("cpu")
    found = device_facts(device)
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure within the budget; 0 unless nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=270.0, help="seconds in all (default 270)")
    parser.add_argument("--only", default="", help="a regular expression on 'cell: variant'")
    parser.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results; dry: build)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at toy sizes")
    parser.add_argument("--floors", nargs=2, type=float, metavar=("TFLOPS", "TBS"), help="print the cells' floors")
    parser.add_argument(
        "--compile-ahead", type=int, metavar="PROCESSES", help="compile the rivals, and measure nothing"
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work is not None:
        work([int(number) for number in options.work.split(",")], options.dry_run)
        return 0
    if options.compile is not None:
        import torch

        device = torch.device("cpu") if options.dry_run else torch.device("cuda", 0)
        gpu_measure.compile_job(_job(options.compile, options.dry_run), device)
        return 0
    if options.compile_ahead is not None:
        return compile_ahead(options.compile_ahead, options.dry_run)
    if options.floors is not None:
        print(gpu_table.floors(options.floors[0] * 1e12, options.floors[1] * 1e12))
        return 0
    deadline = BEGAN + options.budget - RESERVE
    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device: torch.cuda.is_available() is False (--dry-run needs none)", file=sys.stderr)
            return 2
        forget_timings()
    facts_of_device = facts(options.dry_run)
    slug = "dry-run" if options.dry_run else re.sub(r"[^a-z0-9]+", "-", facts_of_device["gpu"].lower()).strip("-")
    folder = options.out or (RESULTS.parents[1] / "build" if options.dry_run else RESULTS)
    path = folder / f"gpu-{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "suite": "gpu", "device": facts_of_device, "budget": options.budget, "dry_run": options.dry_run, "results": [],
        "not_run": [], "began": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip

    def write() -> None:
        record["took"] = time.monotonic() - BEGAN
        for target, text in (
            (path, json.dumps(record, indent=1) + "\n"),
            (path.with_suffix(".md"), gpu_table.summary(record)),
        ):
            partial = target.with_name(target.name + ".partial")
            partial.write_text(text)
            partial.replace(target)

    todo = gpu_cells.jobs()
    numbers = [n for n, job in enumerate(todo) if re.search(options.only, f"{job.cell.name}: {job.variant}")]
    # Counts last, in processes of their own: a profiler may slow whatever its process launches later.
    counts = [n for n in numbers if todo[n].counts]
    until = deadline - min(COUNTING, options.budget / 8) * bool(counts)
    measure(record, [n for n in numbers if n not in counts], until, options.dry_run, write)
    measure(record, counts, deadline, options.dry_run, write)
    print(gpu_table.summary(record))
    print(f"wrote {path} and {path.with_suffix('.md').name} in {record['took']:.0f} s")
    return 0 if any("seconds" in r or "roofs" in r for r in record["results"]) else 1


if __name__ == "__main__":
    sys.exit(main())
