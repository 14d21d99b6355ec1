"""``make gpu`` without a GPU: what it says when something is missing, what it runs, and that time is shared out."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that would run, each of which succeeds; those beside the tests have a word before them."""
    seen: list[list[str]] = []

    def run(title: str, command: list[str], limit: float, environment: dict[str, str]) -> int:
        assert limit > 0
        seen.append(command)
        return 0

    class Beside:
        def __init__(self, title: str, command: list[str], environment: dict[str, str]) -> None:
            seen.append(["beside", *command])

        def wait(self, limit: float) -> None:
            assert limit <= gpu_check.TOTAL / 2

        def stop(self) -> None:
            seen.append(["stop"])

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "Beside", Beside)
    monkeypatch.setattr(gpu_check, "SCRATCH", tmp_path)
    monkeypatch.setattr(gpu_check, "installed", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return seen


def test_names_what_is_missing(commands: list[list[str]], monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("triton", "cmake") else object())
    assert gpu_check.main([]) == 2
    assert "missing: triton (the kernels" in capsys.readouterr().out
    assert not commands


def test_needs_a_gpu(commands: list[list[str]], monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "there is no GPU that torch can use" in capsys.readouterr().out
    assert not commands


def test_installs_tests_and_measures_without_network(commands: list[list[str]], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_check.main([]) == 0
    install, ahead, native, tests, *stops, bench = commands
    assert stops == [["stop"]] * 2, "something runs beside the measurements"
    assert "--compile-ahead" in ahead
    assert native[0] == "beside"
    assert "build_ext" in native
    assert {"--no-index", "--no-build-isolation", "--no-deps"} <= set(install)
    assert "tests/gpu" in tests
    assert "benchmarks/bench_gpu.py" in bench
    assert 200 < float(bench[bench.index("--budget") + 1]) <= gpu_check.TOTAL


def test_tests_and_cells_are_chosen_apart(commands: list[list[str]], monkeypatch: Any) -> None:
    """A cell's name is no expression of pytest's, and pytest fails where no test is left."""
    cell = "train, W = 128, B = 1024, 50 blocks: rvae_fast$"
    assert gpu_check.main(["--dry-run", "--no-install", "--tests", "hopper", "--only", cell]) == 0
    tests, bench = commands[2], commands[-1]
    assert tests[tests.index("-k") + 1] == "hopper"
    assert bench[bench.index("--only") + 1] == cell
    assert cell not in tests


def test_a_failure_fails_the_whole_and_still_measures(commands: list[list[str]], monkeypatch: Any, capsys: Any) -> None:
    own = gpu_check.run

    def run(title: str, *rest: Any) -> int:
        own(title, *rest)
        return 124 if title == "tests" else 0

    monkeypatch.setattr(gpu_check, "run", run)
    assert gpu_check.main(["--dry-run", "--no-install"]) == 1
    assert ["tests/gpu" in commands[2], "benchmarks/bench_gpu.py" in commands[-1]] == [True, True]
    assert "failed: tests" in capsys.readouterr().out


def test_installs_without_compiling(commands: list[list[str]], monkeypatch: Any) -> None:
    """The native module's compilation must not take the time of what needs a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    natives = []

    def run(title: str, command: list[str], limit: float, environment: dict[str, str]) -> int:
        natives.append((title, environment.get("RVAE_FAST_NATIVE")))
        return 0

    monkeypatch.setattr(gpu_check, "run", run)
    assert gpu_check.main([]) == 0
    assert natives[0] == ("install", "0")


def test_goes_on_where_nothing_can_be_installed(commands: list[list[str]], monkeypatch: Any, tmp_path: Path) -> None:
    """By a link to the kernels that is gone afterwards, and a path on which commands find both."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    for folder in ("rvae_fast", "kernels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    found = []

    def run(title: str, command: list[str], limit: float, environment: dict[str, str]) -> int:
        if title != "install":
            probe = "import rvae_fast.kernels as k; print(k.__file__)"
            done = subprocess.run(
                [sys.executable, "-c", probe], env=environment, cwd="/", capture_output=True, text=True
            )
            found.append((title, done.stdout.strip()))
        return int(title == "install")

    monkeypatch.setattr(gpu_check, "run", run)
    assert gpu_check.main([]) == 0
    expected = str(tmp_path / "rvae_fast" / "kernels" / "__init__.py")
    assert found == [("tests", expected), ("benchmarks", expected)]
    assert not (tmp_path / "rvae_fast" / "kernels").exists()


def test_an_installation_of_this_tree_stays(commands: list[list[str]], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "installed", lambda: True)
    assert gpu_check.main([]) == 0
    assert not [command for command in commands if "pip" in command]


def test_knows_an_installation_of_this_tree() -> None:
    import rvae_fast.kernels

    files = [rvae_fast.__file__, rvae_fast.kernels.__file__]
    assert gpu_check.installed() == all(Path(str(f)).resolve().is_relative_to(gpu_check.ROOT) for f in files)


def test_has_caches_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    found = gpu_check.settings(False)
    for name in ("HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert Path(found[name]).is_relative_to(gpu_check.ROOT / "build")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert gpu_check.settings(False)["TRITON_CACHE_DIR"] == "/elsewhere"


def test_what_runs_beside_is_ended_and_reported(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(gpu_check, "SCRATCH", gpu_check.ROOT / "build" / tmp_path.name)
    late = tmp_path / "late"
    sleeper = f"import time; print('begun', flush=True); time.sleep(3); open({str(late)!r}, 'w')"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    slow = gpu_check.Beside("slow one", [sys.executable, "-c", script], dict(os.environ))
    quick = gpu_check.Beside("quick", [sys.executable, "-c", "print(6 * 7)"], dict(os.environ))
    quick.wait(60.0)
    slow.wait(0.5)
    slow.stop()
    quick.stop()
    said = capsys.readouterr().out
    assert "slow one: not finished" in said
    assert "quick: done" in said
    assert "42" in said
    time.sleep(3.5)
    assert not late.exists()
    shutil.rmtree(gpu_check.SCRATCH)


def test_what_runs_out_of_time_ends_with_all_that_it_started(tmp_path: Path) -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    child = f"import time; time.sleep(4); open({str(tmp_path / 'late')!r}, 'w')"
    began = time.monotonic()
    assert gpu_check.run("slow", [sys.executable, "-c", script, child], 1.0, dict(os.environ)) == 124
    time.sleep(max(0.0, 6.0 - (time.monotonic() - began)))
    assert not (tmp_path / "late").exists()
    assert gpu_check.run("quick", [sys.executable, "-c", "raise SystemExit(3)"], 60.0, dict(os.environ)) == 3


def test_stays_under_eight_minutes() -> None:
    assert gpu_check.TOTAL + 15 <= 480
