"""The kernels of the loss, the sampling and the last layer, compiled without a GPU: spills, shared memory, products."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHIPS = {80: "mma", 90: "wgmma", 100: "tcgen05"}

SCRIPT = """
import json
from rvae_fast.kernels import loss_resources, resources
found = {chip: {k: vars(r) for k, r in loss_resources.compile_losses(chip).items()} for chip in (80, 90, 100)}
print(json.dumps({"found": found, "limits": resources.SHARED_MEMORY_LIMIT}))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install rvae-fast[triton])")
    if platform.system() != "Linux":
        pytest.skip("Triton brings ptxas on Linux only")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rvae_fast" / "triton"
    cache.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("chip", CHIPS)
def test_no_spills_and_within_shared_memory(compiled: dict[str, Any], chip: int) -> None:
    found = compiled["found"][str(chip)]
    assert len(found) == 12
    limit = compiled["limits"][str(chip)]
    assert not {k: r for k, r in found.items() if r["stack"] or r["registers"] > 255 or r["shared"] > limit}


@pytest.mark.parametrize("chip", CHIPS)
def test_the_last_layer_runs_on_tensor_cores(compiled: dict[str, Any], chip: int) -> None:
    found = compiled["found"][str(chip)]
    assert found["decoder_error, half"]["tensor_core"] == CHIPS[chip]
    assert found["decoder_error, tf32"]["tensor_core"] == CHIPS[chip]
    assert found["decoder_error, ieee"]["tensor_core"] is None


@pytest.mark.parametrize("chip", CHIPS)
def test_passes_leave_room_for_several_programs(compiled: dict[str, Any], chip: int) -> None:
    """A pass at the memory's speed wants loads in flight: at 128 registers a thread four programs share a
    multiprocessor."""
    found = {k: r for k, r in compiled["found"][str(chip)].items() if not k.startswith("decoder")}
    assert not {k: r for k, r in found.items() if r["registers"] > 128}
