"""``make gpu``: install with what is there, run the GPU's tests, then its benchmarks, all within eight minutes.

Needs no network: nothing is downloaded, and what is missing is named. Runs with the Python that it is started by.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Seconds in all, of those for installing and for testing at most, and the fewest that a benchmark is worth.
TOTAL, INSTALL, TESTS, FEWEST = 465.0, 90.0, 180.0, 30.0
#: What must be there, and what each is for.
NEEDED = {
    "torch": "the tensors",
    "triton": "the kernels (it comes with a CUDA build of torch)",
    "numpy": "torch's neighbour",
    "setuptools": "the installation",
    "pytest": "the tests",
}
#: What some tests or the native module want; without, they are left out.
WANTED = {
    "cmake": "the native CPU module", "ninja": "the native CPU module", "pybind11": "the native CPU module",
    "safetensors": "the test of resuming", "sklearn": "the detectors",
}  # fmt: skip


def missing(names: dict[str, str]) -> list[str]:
    """``name (what for)`` of every package that is not installed."""
    return [f"{name} ({why})" for name, why in names.items() if importlib.util.find_spec(name) is None]


def version(name: str) -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run(title: str, command: list[str], limit: float, environment: dict[str, str]) -> int:
    """Run a command for at most ``limit`` seconds; its exit status, 124 when it ran out of time."""
    print(f"\n==== {title}: at most {limit:.0f} s: {' '.join(command)}", flush=True)
    began = time.monotonic()
    # A session of its own, so that what the command has started (compilers) ends with it.
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(timeout=limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        status = 124
    print(
        f"==== {title}: {'passed' if status == 0 else f'FAILED ({status})'}, {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return status


def main(arguments: list[str] | None = None) -> int:
    """Everything in order; 0 when the tests passed and something was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds in all")
    parser.add_argument("--out", help="folder of the results (default: the benchmark's)")
    parser.add_argument("--only", default="", help="tests whose names match (pytest -k), and cells that do")
    parser.add_argument("--no-install", action="store_true", help="rvae_fast is installed already")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU: interpreter, toy sizes; proves the scripts")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    python = sys.executable

    print(f"Python {sys.version.split()[0]}; " + ", ".join(f"{n} {version(n)}" for n in ("torch", "triton", "numpy")))
    lacking = missing(NEEDED)
    if lacking:
        print("missing: " + "; ".join(lacking) + ". Nothing is downloaded here: install them into this Python first.")
        return 2
    optional = missing(WANTED)
    if optional:
        print("not installed, and done without: " + "; ".join(optional))

    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("there is no GPU that torch can use: torch.cuda.is_available() is False (--dry-run needs none)")
        return 2
    environment = {**os.environ}
    # Inductor's compilations in as many processes as there are cores.
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(os.cpu_count() or 1, 16)))
    if options.dry_run:
        environment |= {"TRITON_INTERPRET": "1", "RVAE_FAST_GPU_TESTS_ON_CPU": "1"}

    statuses = {}
    if not options.no_install:
        pip = [python, "-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", "--no-deps", "-e", "."]
        if run("install", pip, INSTALL, environment) != 0:
            print("without the native CPU module, then, which nothing here needs")
            if run("install again", pip, INSTALL, {**environment, "RVAE_FAST_NATIVE": "0"}) != 0:
                print("the installation failed; see above")
                return 1
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    tests += ["-k", options.only] * bool(options.only)
    limit = min(TESTS, options.total - (time.monotonic() - began) - FEWEST)
    statuses["tests"] = run("tests", tests, limit, environment)
    left = options.total - (time.monotonic() - began)
    if left < FEWEST:
        print("no time left for the benchmarks")
        return 1
    environment.pop("TRITON_INTERPRET", None)
    bench = [python, "benchmarks/bench_gpu.py", "--budget", f"{left:.0f}"] + ["--dry-run"] * options.dry_run
    for name, value in (("--out", options.out), ("--only", options.only)):
        bench += [name, value] * bool(value)
    statuses["benchmarks"] = run("benchmarks", bench, left + 15.0, environment)
    failed = [name for name, status in statuses.items() if status != 0]
    print(f"\n{'failed: ' + ', '.join(failed) if failed else 'all passed'}; {time.monotonic() - began:.0f} s in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
