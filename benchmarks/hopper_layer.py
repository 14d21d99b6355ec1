"""Time the CUDA C++ layer of ``kernels/hopper`` on a Hopper GPU, and what is left of its time without its parts.

``python benchmarks/hopper_layer.py`` runs every shape in a process of its own with a time limit, so that an illegal
access or a deadlock in one leaves the others alone. ``--compile`` only compiles what is timed (no GPU), into
``build/hopper`` where later runs find it. Whether results are right is for ``tests/gpu/test_hopper.py``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("RVAE_FAST_HOPPER_CACHE", str(ROOT / "build" / "hopper"))

import torch  # noqa: E402

from rvae_fast.kernels import hopper  # noqa: E402
from rvae_fast.kernels.hopper import build  # noqa: E402
from rvae_fast.kernels.tuning import time_on_gpu  # noqa: E402

SHAPES = ((65536, 512), (65536, 256), (65536, 128), (8192, 512), (1024, 512))
#: Variants that are timed: CTAs of a cluster and further options.
VARIANTS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (2, ()), (1, ()), (2, ("-DNO_PREFETCH",)), (2, ("-DPIECE=2",)),
)  # fmt: skip
#: What is left out, of the first shape, to see what the rest takes: see WITHOUT in layout.cuh.
PARTS = {
    "products": 1, "inputs": 2, "inputs, prologue": 6, "epilogue": 8, "weights": 16, "products, weights": 17,
    "all but inputs": 29,
}  # fmt: skip
#: Multiprocessors of an H100 and an H200: what --compile compiles for.
MULTIPROCESSORS = 132
SECONDS = 16.0


def case(rows: int, width: int) -> dict[str, Any]:
    device = torch.device("cuda", 0)
    return {
        "x": torch.randn(rows, width, device=device).bfloat16(),
        "weight": (torch.randn(width, width, device=device) / width**0.5).bfloat16(),
        "bias": torch.randn(width, device=device),
        "norm": torch.rand(5, width, device=device) + 0.5,
        "residual": torch.randn(rows, width, device=device).bfloat16(),
    }


def time_shape(rows: int, width: int) -> None:
    # Launches of a graph work on several sets of tensors, as the layers of a stack do.
    cases = [case(rows, width) for _ in range(3)]
    weight, source = cases[0]["weight"], cases[0]["x"]
    packed = hopper.pack_weight(weight)
    turn = [0]

    def layer(**changes: Any) -> float:
        def run() -> None:
            turn[0] = (turn[0] + 1) % len(cases)
            hopper.hopper_forward(**{**cases[turn[0]], "activation": "leaky_relu", "packed": packed, **changes})

        return time_on_gpu(run) * 1e6

    text = []
    for i, (cluster, extra) in enumerate(VARIANTS):
        options: dict[str, Any] = {"cluster": cluster, "extra": extra}
        name = f"cluster {cluster}" + "".join(e.replace("-D", " ") for e in extra)
        text.append(f"{name} {layer(**options):.1f}, no residual {layer(**options, residual=None):.1f}")
        if i == 0:
            text.append(f"no moments either {layer(**options, residual=None, moments=False):.1f}")
    out, bias = torch.empty_like(source), torch.zeros(width, device=source.device, dtype=torch.bfloat16)
    text.append(f"addmm {time_on_gpu(lambda: torch.addmm(bias, source, weight.t(), out=out)) * 1e6:.1f}")
    text.append(f"pack {time_on_gpu(lambda: hopper.pack_weight(weight, packed)) * 1e6:.1f}")
    text.append(f"copy {time_on_gpu(lambda: out.copy_(source)) * 1e6:.1f}")
    print(f"{rows} x {width}, us: " + "; ".join(text))
    if (rows, width) == SHAPES[0]:
        rest = [f"{name} {layer(extra=(f'-DWITHOUT={number}',)):.1f}" for name, number in PARTS.items()]
        print(f"{rows} x {width} without, us: " + "; ".join(rest))


def compile_all() -> None:
    began = time.monotonic()
    wanted: set[tuple[str, tuple[str, ...]]] = {("pack.cu", ())}
    for rows, width in SHAPES:
        split = hopper.split_of(rows, width, MULTIPROCESSORS)
        extras = [*VARIANTS, *((hopper.CLUSTER, (f"-DWITHOUT={n}",)) for n in PARTS.values() if rows == SHAPES[0][0])]
        for cluster, extra in extras:
            wanted.add(("layer.cu", hopper.defines("leaky_relu", width, width, cluster, split, extra)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda one: build.compiled(*one), sorted(wanted)))
    print(f"{len(wanted)} kernels after {time.monotonic() - began:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="only compile")
    parser.add_argument("--shape", nargs=2, type=int, metavar=("ROWS", "WIDTH"), help="time this one, in this process")
    arguments = parser.parse_args()
    if arguments.shape:
        time_shape(*arguments.shape)
        return 0
    compile_all()
    failed = 0
    for rows, width in () if arguments.compile else SHAPES:
        command = [sys.executable, __file__, "--shape", str(rows), str(width)]
        try:
            failed += subprocess.run(command, timeout=SECONDS, check=False).returncode != 0
        except subprocess.TimeoutExpired:
            failed += 1
            print(f"{rows} x {width}: not done after {SECONDS:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
