"""``make gpu``: install with what is there, run the GPU's tests, then its benchmarks, all within eight minutes.

Needs no network: nothing is downloaded, and what is missing is named. Runs with the Python that it is started by.

The tests have most cores idle and are not timed, so two things run beside them: the compilers of the rivals that take
longest (their code is then in Inductor's cache when they are measured), and the native module's build, whose result
nothing here needs. Both are ended when the benchmarks begin: nothing runs beside a measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Where caches and the logs of what runs beside the tests go.
SCRATCH = ROOT / "build" / "gpu"
#: Seconds in all, of those for installing and for testing at most, and the fewest that a benchmark is worth.
TOTAL, INSTALL, TESTS, FEWEST = 465.0, 45.0, 170.0, 30.0
#: Seconds between the signal to end and the end, in which pytest writes its summary.
GRACE = 6.0
#: Processes that test, where pytest-xdist is there, and that compile ahead.
TESTERS, COMPILERS = 8, 5
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
    "safetensors": "the test of resuming", "sklearn": "the detectors", "xdist": "tests in several processes",
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


def settings(dry_run: bool) -> dict[str, str]:
    """The environment of all that runs here: caches of its own, wherever (and whether) there is a home."""
    environment = {**os.environ}
    environment.setdefault("HOME", str(SCRATCH))
    environment.setdefault("TRITON_CACHE_DIR", str(SCRATCH / "triton"))
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(SCRATCH / "inductor"))
    # Inductor's compilations in as many processes as there are cores.
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(os.cpu_count() or 1, 16)))
    environment["PYTHONUNBUFFERED"] = "1"
    if dry_run:
        environment |= {"TRITON_INTERPRET": "1", "RVAE_FAST_GPU_TESTS_ON_CPU": "1"}
    return environment


def end(process: subprocess.Popen[bytes], grace: float) -> None:
    """Ask a process for its end, and after ``grace`` seconds make one of it and of all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        if grace and process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=grace)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(title: str, command: list[str], limit: float, environment: dict[str, str]) -> int:
    """Run a command for at most ``limit`` seconds; its exit status, 124 when it ran out of time."""
    print(f"\n==== {title}: at most {limit:.0f} s: {' '.join(command)}", flush=True)
    began = time.monotonic()
    # A session of its own, so that what the command has started (compilers) ends with it.
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(timeout=max(limit - GRACE, limit / 2))
    except BaseException as error:
        end(process, min(GRACE, limit / 2))
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        status = 124
    print(
        f"==== {title}: {'passed' if status == 0 else f'FAILED ({status})'}, {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return status


class Beside:
    """A command that runs beside the tests; what it says goes into a file."""

    def __init__(self, title: str, command: list[str], environment: dict[str, str]) -> None:
        self.title, self._log = title, SCRATCH / f"{title.replace(' ', '-')}.log"
        print(f"\n==== beside the tests, {title}: {' '.join(command)}", flush=True)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as out:
            nice = ["nice"] if shutil.which("nice") else []
            self._process = subprocess.Popen(
                [*nice, *command], cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def wait(self, limit: float) -> None:
        """Let it finish, for ``limit`` seconds at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=max(limit, 0.0))

    def stop(self) -> None:
        """End it, and say how far it came."""
        status = self._process.poll()
        end(self._process, 0.0)
        how = "not finished" if status is None else "done" if status == 0 else f"FAILED ({status})"
        said = self._log.read_text(errors="replace").splitlines()[-12 if status == 0 else -25 :]
        print("\n".join([f"==== {self.title}: {how}; the end of {self._log.relative_to(ROOT)}:", *said]), flush=True)


def installed() -> bool:
    """Whether this Python has this source tree installed already; then its native module stays as it is."""
    try:
        specs = [importlib.util.find_spec(name) for name in ("rvae_fast", "rvae_fast.kernels")]
    except ImportError:
        return False
    return all(spec and spec.origin and Path(spec.origin).resolve().is_relative_to(ROOT) for spec in specs)


@contextlib.contextmanager
def importable(python: str, environment: dict[str, str], began: float, total: float) -> Iterator[None]:
    """Inside, commands in ``environment`` can import rvae_fast: by an editable install, else by a link in the tree."""
    link = None
    # Without the native module, whose compilation could take all the time.
    pip = [python, "-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", "--no-deps", "-e", "."]
    limit = min(max(INSTALL, total / 10), total - (time.monotonic() - began) - FEWEST)
    if run("install", pip, limit, {**environment, "RVAE_FAST_NATIVE": "0"}) != 0:
        print("without an installation, then: rvae_fast from this folder, with a link to its kernels")
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
        link = ROOT / "rvae_fast" / "kernels"
        if not link.exists():
            link.symlink_to(Path("..", "kernels"))
    try:
        yield
    finally:
        if link is not None and link.is_symlink():
            link.unlink()


def main(arguments: list[str] | None = None) -> int:
    """Everything in order; 0 when the tests passed and something was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds in all")
    parser.add_argument("--out", help="folder of the results (default: the benchmark's)")
    parser.add_argument("--tests", default="", help="tests whose names match (an expression of pytest -k)")
    parser.add_argument("--only", default="", help="cells that match (a regular expression on 'cell: variant')")
    parser.add_argument("--no-install", action="store_true", help="rvae_fast is installed already")
    parser.add_argument("--no-tests", action="store_true", help="compile the rivals, and measure")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU: interpreter, toy sizes; proves the scripts")
    options = parser.parse_args(arguments)
    began = time.monotonic()

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
    environment = settings(options.dry_run)
    there = options.no_install or installed()
    with contextlib.nullcontext() if there else importable(sys.executable, environment, began, options.total):
        return measure(options, environment, began)


def measure(options: argparse.Namespace, environment: dict[str, str], began: float) -> int:
    """The tests with what runs beside them, then the benchmarks."""
    python, statuses = sys.executable, {}
    bench = [python, "benchmarks/bench_gpu.py"] + ["--dry-run"] * options.dry_run
    out = ["--out", str(Path(options.out).absolute())] if options.out else []
    plain = {name: value for name, value in environment.items() if name != "TRITON_INTERPRET"}

    def left() -> float:
        return options.total - (time.monotonic() - began)

    few = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    # What there is of CUDA for this machine's chip alone.
    own = {"RVAE_FAST_NATIVE": "1", "RVAE_FAST_CUDA_ARCHITECTURES": "native", "MAX_JOBS": "3"}
    beside = [Beside("compile ahead", [*bench, "--compile-ahead", str(COMPILERS)], {**plain, **few})]
    native = [python, "setup.py", "-q", "build_ext", "--build-lib", "build/gpu/native"]
    if not missing(dict.fromkeys(("cmake", "ninja"), "")):
        beside += [Beside("native build", native, {**plain, **own})]
    try:
        # A dry run's share of a longer time is larger: the interpreter is slow.
        until = time.monotonic() + min(max(TESTS, options.total / 2) if options.dry_run else TESTS, left() - FEWEST)
        if not options.no_tests:
            tests = [python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "tests/gpu"]
            if not options.dry_run and not missing({"xdist": ""}):
                testers = max(1, min(TESTERS, (os.cpu_count() or 1) // 2))
                tests += ["-n", str(testers), "--dist", "worksteal", "--max-worker-restart", "20"]
            tests += ["-k", options.tests] * bool(options.tests)
            log = Path(options.out or SCRATCH).absolute() / "gpu-tests.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.unlink(missing_ok=True)
            each = {**environment, "RVAE_FAST_GPU_TESTS_LOG": str(log)}
            statuses["tests"] = run("tests", tests, until - time.monotonic(), each)
        beside[0].wait(until - time.monotonic())
    finally:
        for command in beside:
            command.stop()
    if left() < FEWEST:
        print("no time left for the benchmarks")
        return 1
    bench += ["--budget", f"{left():.0f}", *out] + ["--only", options.only] * bool(options.only)
    statuses["benchmarks"] = run("benchmarks", bench, left() + 15.0, plain)
    failed = [name for name, status in statuses.items() if status != 0]
    print(f"\n{'failed: ' + ', '.join(failed) if failed else 'all passed'}; {time.monotonic() - began:.0f} s in all")
    return 1 if failed else 0


if __name__ == "__main__":
    # As an interruption: what runs beside is ended, and the link is gone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
