"""The kernels' smallest cases under NVIDIA's compute-sanitizer: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = """
import torch, rvae_fast
from rvae_fast import RVAE, ResidualStack
torch.manual_seed(0)
with rvae_fast.backend("triton"):
    for order in ("pre", "post"):
        stack = ResidualStack(33, 2, layers=1, order=order).cuda()
        stack(torch.randn(37, 33, device="cuda")).square().sum().backward()
    net = RVAE(19, latent_features=3, widths=[17], blocks=[1]).cuda()
    net.loss(torch.rand(21, 19, device="cuda")).backward()
    net.anomaly_score(torch.rand(21, 19, device="cuda"), kld_weight=1.0)
torch.cuda.synchronize()
"""


#: Seconds that a tool may take; the kernels are compiled before it starts.
LIMIT = 70.0


def run(command: list[str], limit: float, log: Path, **options: Any) -> int | None:
    """The command's exit status, or None if it and all that it started were ended after ``limit`` seconds."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, **options)
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_a_tool_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    child = f"import time; time.sleep(2); open({str(tmp_path / 'late')!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run([sys.executable, "-c", parent], 1.0, tmp_path / "log") is None
    assert run([sys.executable, "-c", "import time; time.sleep(2)"], 60.0, tmp_path / "log") == 0
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_errors(tool: str, cuda: torch.device, tmp_path: Path) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    root, log = Path(__file__).parents[2], tmp_path / "log"
    script = [sys.executable, "-c", SCRIPT]
    status = run(script, 80.0, log, cwd=root)  # compiles, and must pass anyway
    if status is None:
        pytest.skip("the kernels took more than 80 s to compile here")
    assert status == 0, log.read_text()[-4000:]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":
        # Errors that CUDA's own calls return are PyTorch's business: it asks for functions that a driver may lack.
        command += ["--report-api-errors", "no"]
    # Out of PyTorch's caching allocator, in which a read past a tensor's end is within a larger block.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status = run([*command, *script], LIMIT, log, env=environment, cwd=root)
    found = log.read_text(errors="replace")
    if status is None:
        pytest.skip(f"compute-sanitizer --tool {tool} took more than {LIMIT:.0f} s here")
    if status not in (0, 9) and "not supported" in found:
        pytest.skip(f"compute-sanitizer cannot run here: {found[-300:]}")
    assert status == 0, found[-4000:]
