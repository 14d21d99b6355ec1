"""The GPU's test suite, ``tests/gpu``, dry: what a CPU can take of it runs in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import why_not


def test_the_gpu_suite_runs_dry() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    root = Path(__file__).parents[2]
    # One likelihood of three, one dtype of two: tests/kernels/interpreted has them all.
    subset = "not absolute and not bernoulli and not fp16"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", subset, "tests/gpu"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "RVAE_FAST_GPU_TESTS_ON_CPU": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("RVAE_FAST_BACKEND", None)
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 20
