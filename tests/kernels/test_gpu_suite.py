"""The GPU's test suite, ``tests/gpu``, dry: what a CPU can take of it runs in Triton's interpreter; and its records."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from interpreter import why_not

ROOT = Path(__file__).parents[2]


def test_the_gpu_suite_runs_dry() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    # One likelihood of three, one dtype of two: tests/kernels/interpreted has them all.
    subset = "not absolute and not bernoulli and not fp16"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", subset, "tests/gpu"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "RVAE_FAST_GPU_TESTS_ON_CPU": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("RVAE_FAST_BACKEND", None)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 20


# --- what its conftest.py does with results ---


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``tests/gpu/conftest.py``, writing to a file of its own, in a process that is no worker of pytest-xdist."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    spec = importlib.util.spec_from_file_location("gpu_conftest", ROOT / "tests" / "gpu" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LOG", str(tmp_path / "log"))
    return module


def report(outcome: str, **more: Any) -> Any:
    facts = {"when": "call", "nodeid": "t.py::test", "duration": 0.5, "longreprtext": "why", "skipped": False}
    return SimpleNamespace(outcome=outcome, failed=outcome == "failed", **{**facts, **more})


def test_each_result_is_written_at_once(suite: Any, tmp_path: Path) -> None:
    suite.pytest_runtest_logreport(report("passed"))
    suite.pytest_runtest_logreport(report("passed", when="teardown"))
    suite.pytest_runtest_logreport(report("failed", when="setup"))
    assert (tmp_path / "log").read_text() == "passed t.py::test 0.5 s\nfailed t.py::test 0.5 s\nwhy\n"


def test_results_of_several_processes_are_written_once(suite: Any, tmp_path: Path) -> None:
    suite.pytest_runtest_logreport(report("passed", node=object()))
    suite.pytest_runtest_logreport(report("failed", node=object(), when="???"))  # of a process that crashed
    assert (tmp_path / "log").read_text() == "failed t.py::test 0.5 s\nwhy\n"


def test_a_lost_device_ends_the_process(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(suite.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(suite.torch.cuda, "synchronize", lambda: None)
    suite.pytest_runtest_logreport(report("failed"))  # the device is well: the next test runs

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(suite.torch.cuda, "synchronize", lost)
    suite.pytest_runtest_logreport(report("passed"))
    with pytest.raises(pytest.exit.Exception, match=r"lost .* since t.py::test: CUDA error: an illegal"):
        suite.pytest_runtest_logreport(report("failed"))
    ended: list[int] = []
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    monkeypatch.setattr(suite.os, "_exit", lambda status: (ended.append(status), pytest.exit("ended")))
    with pytest.raises(pytest.exit.Exception):
        suite.pytest_runtest_logreport(report("failed"))
    assert ended == [3]
