"""``make gpu`` without a GPU: what it says when something is missing, what it runs, and that time is shared out."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would run, each of which succeeds."""
    seen: list[list[str]] = []

    def run(title: str, command: list[str], limit: float, environment: dict[str, str]) -> int:
        assert limit > 0
        seen.append(command)
        return 0

    monkeypatch.setattr(gpu_check, "run", run)
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
    install, tests, bench = commands
    assert {"--no-index", "--no-build-isolation", "--no-deps"} <= set(install)
    assert "tests/gpu" in tests
    assert "benchmarks/bench_gpu.py" in bench
    assert 200 < float(bench[bench.index("--budget") + 1]) <= gpu_check.TOTAL


def test_a_failure_fails_the_whole_and_still_measures(commands: list[list[str]], monkeypatch: Any, capsys: Any) -> None:
    own = gpu_check.run

    def run(title: str, *rest: Any) -> int:
        own(title, *rest)
        return 124 if title == "tests" else 0

    monkeypatch.setattr(gpu_check, "run", run)
    assert gpu_check.main(["--dry-run", "--no-install"]) == 1
    assert [("bench_gpu.py" in " ".join(c)) for c in commands] == [False, True]
    assert "failed: tests" in capsys.readouterr().out


def test_without_a_native_module_where_it_cannot_be_built(commands: list[list[str]], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    natives = []

    def run(title: str, command: list[str], limit: float, environment: dict[str, str]) -> int:
        natives.append((title, environment.get("RVAE_FAST_NATIVE")))
        return 1 if title == "install" else 0

    monkeypatch.setattr(gpu_check, "run", run)
    assert gpu_check.main([]) == 0
    assert ("install again", "0") in natives


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
