"""Start the tests in ``interpreted/``: each file in a process of its own, with kernels interpreted on the CPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


def why_not() -> str | None:
    """The reason the interpreter cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install rvae-fast[triton])"
    version = importlib.metadata.version("triton")
    triton_release, numpy_release = (tuple(map(int, re.findall(r"\d+", v)[:2])) for v in (version, np.__version__))
    if triton_release < (3, 9) and numpy_release >= (2, 4):
        return f"Triton {version} cannot interpret loops to run-time bounds with NumPy {np.__version__}; Triton 3.9 can"
    return None


def test_there_are_interpreted_tests() -> None:
    assert FILES


@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(file: str) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("RVAE_FAST_BACKEND", None)
    done = subprocess.run(command, env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout, done.stdout
