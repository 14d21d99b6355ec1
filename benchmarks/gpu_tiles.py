"""Time the layer kernels with more tiles than can be chosen, beside the library's products and the pointwise passes.

``python benchmarks/gpu_tiles.py --out build/tiles.json`` on a GPU. This is where the lists in
``kernels/configurations.py`` come from; the table of a chip is filled from these lists by
``python -m rvae_fast.kernels.tuning``. Kernels are compiled by several processes first, then timed by one: launches of
a CUDA graph between two events, a median of replays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rvae_fast.kernels import batch_norm, configurations, norm_activation, tile_table, tuning
from rvae_fast.kernels.configurations import TileConfig
from rvae_fast.kernels.tuning import time_on_gpu

#: Rows and widths.
SHAPES = ((65536, 512), (65536, 128), (1024, 128), (8192, 2048), (8192, 512), (65536, 1024), (1024, 512))
#: block_m, block_n, warps; and with each of them block_k, stages.
TILES = {
    "forward": (
        (64, 256, 8), (64, 128, 8), (64, 128, 4), (64, 64, 4), (64, 32, 4), (128, 128, 8), (128, 128, 4), (128, 64, 4),
        (128, 64, 8), (128, 256, 8), (256, 128, 8), (256, 64, 8), (64, 512, 8), (32, 64, 4), (32, 128, 4), (16, 128, 4),
    ),
    "backward": (
        (64, 256, 8), (64, 128, 8), (64, 128, 4), (64, 64, 4), (64, 32, 4), (128, 128, 8), (128, 64, 4), (128, 64, 8),
        (128, 256, 8), (256, 64, 8), (32, 64, 4), (32, 128, 4), (16, 128, 4),
    ),
    "weight": (
        (128, 128, 8), (128, 128, 4), (64, 64, 4), (128, 64, 4), (64, 128, 4), (64, 256, 8), (128, 256, 8),
        (256, 128, 8), (64, 128, 8),
    ),
}  # fmt: skip
STEPS = ((64, 3), (64, 4), (32, 4), (64, 2), (128, 2))
#: Bytes of shared memory a block may use on sm_90.
SHARED = 227 * 1024


def options(kernel: str) -> list[TileConfig]:
    """Every tile that is tried; one split."""
    found = []
    for (m, n, warps), (k, stages) in itertools.product(TILES[kernel], STEPS):
        if stages * k * (m + n) * 2 <= SHARED:
            found.append(TileConfig(m, n, k, warps, stages))
    return found


def compile_share(kernels: Sequence[str], share: int, of: int) -> None:
    """Run each kernel once at a small size that is compiled as the large ones are."""
    device, rows, width = torch.device("cuda", 0), 2048, 512
    for kernel in kernels:
        run = tuning._workload(kernel, torch.bfloat16, device, *tuning._shapes(kernel, rows, width))
        for i, config in enumerate(options(kernel)):
            if i % of == share:
                try:
                    run(config)
                    torch.cuda.synchronize()
                except Exception as error:
                    print(f"{kernel} {list(config)}: {type(error).__name__}: {str(error)[:150]}", flush=True)


def others(rows: int, width: int, device: torch.device) -> dict[str, float]:
    """The library's products and the passes beside them: seconds, and bytes moved where that is what counts."""
    x, g, out = (torch.randn(rows, width, device=device).bfloat16() for _ in range(3))
    weight, bias = torch.randn(width, width, device=device).bfloat16(), torch.randn(width, device=device).bfloat16()
    norm = torch.ones(5, width, device=device)
    act: dict[str, Any] = {"activation": "leaky_relu"}
    moments = batch_norm.column_moments(x)
    _, sums = norm_activation.norm_activation_backward(g, x, norm, **act)
    small = torch.empty(width, width, device=device, dtype=torch.bfloat16)
    return {
        "cublas forward": time_on_gpu(lambda: torch.addmm(bias, x, weight.t(), out=out)),
        "cublas backward": time_on_gpu(lambda: torch.mm(g, weight, out=out)),
        "cublas weight": time_on_gpu(lambda: torch.mm(g.t(), x, out=small)),
        "norm_activation": time_on_gpu(lambda: norm_activation.norm_activation(x, norm, out=out, **act)),
        "norm_activation_backward": time_on_gpu(lambda: norm_activation.norm_activation_backward(g, x, norm, **act)),
        "norm_backward": time_on_gpu(lambda: norm_activation.norm_backward(g, x, norm[:4], skip_grad=g, out=out)),
        "column_moments": time_on_gpu(lambda: batch_norm.column_moments(x)),
        "column_moments + residual": time_on_gpu(lambda: batch_norm.column_moments(x, g, out)),
        "merge_moments": time_on_gpu(lambda: batch_norm.merge_moments(*moments, rows, bias, bias, 1e-5)),
        "merge_gradients": time_on_gpu(lambda: batch_norm.merge_gradients(sums, norm, rows, True)),
        "copy": time_on_gpu(lambda: out.copy_(x)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/tiles.json"))
    parser.add_argument("--seconds", type=float, default=90.0, help="when to stop")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 14))
    parser.add_argument("--kernels", nargs="+", default=list(TILES), choices=list(TILES))
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.share is not None:
        compile_share(arguments.kernels, arguments.share, arguments.processes)
        return 0
    began = time.monotonic()
    command = [sys.executable, __file__, "--processes", str(arguments.processes), "--kernels", *arguments.kernels]
    command.append("--share")
    compilers = [subprocess.Popen([*command, str(i)], start_new_session=True) for i in range(arguments.processes)]
    for process in compilers:
        try:
            process.wait(timeout=max(0.1, began + 0.7 * arguments.seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    device = torch.device("cuda", 0)
    chip = tile_table.chip_of(device)
    record: dict[str, Any] = {"chip": chip._asdict(), "torch": torch.__version__, "results": []}
    for rows, width in SHAPES:
        found: dict[str, Any] = {"rows": rows, "width": width, "others": others(rows, width, device), "tiles": []}
        record["results"].append(found)
        for kernel in arguments.kernels:
            m, n, k = tuning._shapes(kernel, rows, width)
            run = tuning._workload(kernel, torch.bfloat16, device, m, n, k)
            for config in tuning._options(kernel, options(kernel), chip, m, n, k):
                if time.monotonic() - began > arguments.seconds:
                    break
                try:
                    took = time_on_gpu(lambda run=run, config=config: run(config))
                except Exception as error:
                    found["tiles"].append([kernel, list(config), f"{type(error).__name__}: {str(error)[:100]}"])
                    continue
                found["tiles"].append([kernel, list(config), took])
        arguments.out.write_text(json.dumps(record))
        print(f"-- {rows} rows of {width}; us: " + ", ".join(f"{n} {t * 1e6:.1f}" for n, t in found["others"].items()))
        for kernel in arguments.kernels:
            best = sorted((t for t in found["tiles"] if t[0] == kernel and isinstance(t[2], float)), key=lambda t: t[2])
            among = configurations.candidates(kernel, "half", chip.capability, chip.shared_memory)
            own = [t for t in best if TileConfig(*t[1])._replace(splits=1) in among]
            print(f"   {kernel}: " + "; ".join(f"{t[1]} {t[2] * 1e6:.1f}" for t in best[:4] + own[:1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
