"""Every tile configuration that can be chosen, compiled for its chip without a GPU: spills, shared memory, products.

GELU needs the most registers of the activations, so it stands for them here; ``RVAE_FAST_TEST_KERNELS=full`` compiles
LeakyReLU as well, fp32 streams beside half-precision products, and every way of merging statistics on every chip.
Compilations are kept in a cache folder, so only the first run after a change takes long.
"""

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

# In a process of its own: the cache folder is chosen before Triton is imported, and nothing stays in this one.
SCRIPT = """
import json, os, sys
from rvae_fast.kernels import resources
full = os.environ.get("RVAE_FAST_TEST_KERNELS") == "full"
def run():
    activations, wide = (("gelu", "leaky_relu"), (False, True)) if full else (("gelu",), (False,))
    todo = resources.cases((80, 90, 100), activations, wide, thorough=full)
    found = resources.compile_cases(todo, min(os.cpu_count() or 1, 4))
    rows = [{**c._asdict(), "config": list(c.config), **vars(r)} for c, r in zip(todo, found)]
    passes = [resources.compile_passes(chip, columns) for chip in (80, 90, 100) for columns in (None, 1)]
    passes = [{name: vars(r) for name, r in p.items()} for p in passes]
    limits = {str(k): v for k, v in resources.SHARED_MEMORY_LIMIT.items()}
    print(json.dumps({"rows": rows, "limits": limits, "passes": passes}))
if __name__ == "__main__":
    run()
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install rvae-fast[triton])")
    if platform.system() != "Linux":
        pytest.skip("Triton brings ptxas on Linux only")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rvae_fast" / "triton"
    cache.mkdir(parents=True, exist_ok=True)
    script = tmp_path_factory.mktemp("resources") / "compile.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", str(script)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wrong(rows: list[dict[str, Any]], test: Any) -> list[dict[str, Any]]:
    return [row for row in rows if not test(row)]


def test_every_kernel_and_chip_is_there(compiled: dict[str, Any]) -> None:
    combinations = {(row["kernel"], row["arithmetic"], row["capability"]) for row in compiled["rows"]}
    assert len(combinations) == 3 * 3 * 3


def test_no_candidate_is_left_out_on_these_chips(compiled: dict[str, Any]) -> None:
    from rvae_fast.kernels import configurations

    chosen = {(row["kernel"], row["arithmetic"], row["capability"], *row["config"]) for row in compiled["rows"]}
    for kernel in configurations.KERNELS:
        for arithmetic in configurations.ARITHMETICS:
            for chip in (80, 90, 100):
                for config in configurations.candidates(kernel, arithmetic, chip):
                    assert (kernel, arithmetic, chip, *config) in chosen


def test_no_register_spills(compiled: dict[str, Any]) -> None:
    assert not wrong(compiled["rows"], lambda row: row["stack"] == 0 and row["registers"] <= 255)


def test_kernels_without_a_product_compile_without_spills(compiled: dict[str, Any]) -> None:
    assert len(compiled["passes"]) == 6
    for passes in compiled["passes"]:
        assert len(passes) == 5 * 2 + 2 * 3 + 2
        assert not {name: r for name, r in passes.items() if r["stack"] or r["shared"] > 48 * 1024}


def test_shared_memory_is_within_the_chip(compiled: dict[str, Any]) -> None:
    assert not wrong(compiled["rows"], lambda row: row["shared"] <= compiled["limits"][str(row["capability"])])


def test_shared_memory_is_within_what_the_choice_reckons_with(compiled: dict[str, Any]) -> None:
    """``candidates`` leaves out, by this bound, what a chip with less shared memory cannot run."""
    from rvae_fast.kernels.configurations import TileConfig, shared_memory_bound

    def fits(row: dict[str, Any]) -> bool:
        return row["shared"] <= shared_memory_bound(row["kernel"], row["arithmetic"], TileConfig(*row["config"]))

    assert not wrong(compiled["rows"], fits)


@pytest.mark.parametrize(("chip", "instruction"), [(80, "mma"), (90, "wgmma"), (100, "tcgen05")])
def test_products_run_on_tensor_cores(compiled: dict[str, Any], chip: int, instruction: str) -> None:
    rows = [row for row in compiled["rows"] if row["capability"] == chip and row["arithmetic"] != "ieee"]
    assert rows
    # The instructions of the later chips take 64 rows and more.
    assert not wrong(rows, lambda row: row["tensor_core"] == (instruction if row["config"][0] >= 64 else "mma"))
