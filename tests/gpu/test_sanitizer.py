"""The kernels' smallest cases under NVIDIA's compute-sanitizer: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_errors(tool: str, cuda: torch.device) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SCRIPT]
    # Out of PyTorch's caching allocator, in which a read past a tensor's end is within a larger block.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    root = Path(__file__).parents[2]
    try:
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer --tool {tool} took more than 120 s here")
    log = done.stdout + done.stderr
    if done.returncode != 9 and done.returncode != 0 and "not supported" in log:
        pytest.skip(f"compute-sanitizer cannot run here: {log[-300:]}")
    assert done.returncode == 0, log[-4000:]
