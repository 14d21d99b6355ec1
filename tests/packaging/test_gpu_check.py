"""``make gpu`` without a GPU: what it says when something is missing, what it runs, and that time is shared out."""

from __future__ import annotations

import importlib.util
import subprocess
from typing import Any

import gpu_check
import pytest
import torch


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would run, each of which succeeds."""
    seen: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        assert options["timeout"] > 0
        seen.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
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
    own = gpu_check.subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        done = own(command, **options)
        if "tests/gpu" in command:
            raise subprocess.TimeoutExpired(command, 1)
        return done

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    assert gpu_check.main(["--dry-run", "--no-install"]) == 1
    assert [("bench_gpu.py" in " ".join(c)) for c in commands] == [False, True]
    assert "failed: tests" in capsys.readouterr().out


def test_stays_under_eight_minutes() -> None:
    assert gpu_check.TOTAL + 15 <= 480
