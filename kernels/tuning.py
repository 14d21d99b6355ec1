"""Measuring which tiles and which strategy suit a shape best; ``python -m rvae_fast.kernels.tuning`` fills a table.

Everything is measured on tensors made here: no argument of a user's, and no running statistic, is ever touched. What is
found goes into the tables of ``tile_table.py``. The candidates are those of ``configurations.py``, all of which compile
without spills; for the weight gradient each with the heuristic's number of splits, half of it and twice it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import configurations, launch, tile_table
from .configurations import TileConfig
from .layer_backward import layer_backward
from .layer_forward import layer_forward
from .tile_table import Chip, Choice
from .weight_gradient import weight_gradient

#: Calls a function several times and returns the time of one, in any unit.
Timer = Callable[[Callable[[], Any]], float]

#: The shapes of the shipped table.
ROWS, WIDTHS = (1024, 8192, 65536), (128, 256, 512, 1024, 2048)
#: Units of two layers by which strategies are compared.
UNITS = 3
#: Forward and backward with statistics of the batch, or forward with running ones.
KINDS = ("layer", "eval")
_DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
_SLOPE = 0.01


def time_on_gpu(function: Callable[[], Any], launches: int | None = None, replays: int = 5) -> float:
    """Median seconds of a call, by replays of a CUDA graph of several, so that a slow host does not count.

    Large tensors do not stay in the second-level cache from one call to the next, and small ones do: as in a stack.
    """
    function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    if launches is None:
        launches = 8 if start.elapsed_time(end) < 1.0 else 2
    graph = torch.cuda.CUDAGraph()
    # Other threads (that pin the memory of batches, that watch over a process group) may ask CUDA what they like.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(launches):
            function()
    graph.replay()
    times = []
    for _ in range(replays):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / launches)
    return statistics.median(times)


def _options(kernel: str, among: Sequence[TileConfig], chip: Chip, m: int, n: int, k: int) -> list[TileConfig]:
    if kernel != "weight":
        return [c for c in among if c.block_n <= max(n, among[-1].block_n)]
    found = []
    for config in among:
        splits = configurations.heuristic(kernel, (config,), chip.multiprocessors, m, n, k).splits
        found += [config._replace(splits=s) for s in sorted({max(1, splits // 2), splits, 2 * splits})]
    return found


def _workload(
    kernel: str, dtype: torch.dtype, device: torch.device, m: int, n: int, k: int
) -> Callable[[TileConfig], Any]:
    """A launch of the kernel, in the variant that order "pre" runs most, on tensors of its own."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    def norm(features: int) -> Tensor:
        return torch.ones((5, features), dtype=torch.float32, device=device)

    act: dict[str, Any] = {"activation": "leaky_relu", "negative_slope": _SLOPE}
    if kernel == "forward":
        x, weight, residual, bias = draw(m, k), draw(n, k), draw(m, n), draw(n)
        out, scales = torch.empty_like(residual), norm(k)
        return lambda config: layer_forward(
            x, weight, bias, norm=scales, residual=residual, out=out, config=config, **act
        )
    if kernel == "backward":
        g, y, weight, x = draw(m, k), draw(m, k), draw(k, n), draw(m, n)
        out, coefficients, scales = torch.empty_like(x), norm(k)[:4], norm(n)
        return lambda config: layer_backward(
            g, weight, y=y, norm_grad=coefficients, x=x, norm=scales, out=out, config=config, **act
        )
    grad_y, x, total = draw(k, m), draw(k, n), torch.empty((m, n), dtype=torch.float32, device=device)
    scales = norm(n)
    return lambda config: weight_gradient(grad_y, x, norm=scales, dtype=dtype, out=total, config=config, **act)


def fastest(options: Iterable[Any], run: Callable[[Any], Any], timer: Timer) -> Any:
    """The option with the least time; of equals the first."""
    return min(options, key=lambda option: timer(lambda: run(option)))


def tune(
    kernel: str,
    arithmetic: str,
    device: torch.device,
    m: int,
    n: int,
    k: int,
    *,
    timer: Timer = time_on_gpu,
    chip: Chip | None = None,
) -> TileConfig:
    """Measure every candidate of a kernel for a shape, keep the quickest in this machine's table, and return it."""
    chip = tile_table.chip_of(device) if chip is None else chip
    among = configurations.candidates(kernel, arithmetic, chip.capability, chip.shared_memory)
    with launch.paused(), torch.no_grad(), launch.on_device(device):
        run = _workload(kernel, _DTYPES[arithmetic], device, m, n, k)
        best = fastest(_options(kernel, among, chip, m, n, k), run, timer)
    tile_table.remember(chip, {tile_table.key(kernel, arithmetic, m, n, k): list(best)})
    return best


def tune_strategy(
    kind: str,
    arithmetic: str,
    device: torch.device,
    rows: int,
    width: int,
    *,
    timer: Timer = time_on_gpu,
    chip: Chip | None = None,
) -> str:
    """Measure a short stack of a kind (:data:`KINDS`) by each strategy; keep and return the quickest."""
    from .residual_stack import StackOptions, hopper_why_not, stack_forward
    from .residual_stack_backward import stack_backward

    chip = tile_table.chip_of(device) if chip is None else chip
    dtype = _DTYPES[arithmetic]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    options = StackOptions(2, "pre", "leaky_relu", _SLOPE, kind == "layer", dtype)
    x, grad = draw(rows, width), draw(rows, width)
    weights = [draw(width, width) / width**0.5 for _ in range(2 * UNITS)]
    vectors = [[draw(width) for _ in weights] for _ in range(5)]
    vectors[4] = [v.square() for v in vectors[4]]

    def run(strategy: str) -> None:
        biases, gammas, betas, means, variances = vectors
        _, kept = stack_forward(
            x, weights, biases, gammas, betas, means, variances, 1e-5, options, keep=kind == "layer", strategy=strategy
        )
        if kind == "layer":
            stack_backward(grad, x, weights, kept, options, strategy=strategy)

    with launch.paused(), torch.no_grad(), launch.on_device(device):
        covered = hopper_why_not(options, x) is None
        among = [s for s in configurations.STRATEGIES if s != "hopper" or covered]
        best = str(fastest(among, run, timer))
    tile_table.remember(chip, {tile_table.key(kind, arithmetic, rows, width): best})
    return best


# --- filling a table ---

#: An H100 SXM, for a table by arithmetic.
H100 = Chip("NVIDIA H100 80GB HBM3", 90, 227 * 1024, 132)


def _shapes(kernel: str, rows: int, width: int) -> tuple[int, int, int]:
    return (width, width, rows) if kernel == "weight" else (rows, width, width)


def by_arithmetic(chip: Chip, arithmetics: Sequence[str] = ("half", "tf32")) -> dict[str, dict[str, Any]]:
    """Entries by the heuristic alone, none of them measured."""
    entries: dict[str, dict[str, Any]] = {}
    for arithmetic in arithmetics:
        for width in WIDTHS:
            for rows in ROWS:
                choice: Choice = configurations.default_strategy(arithmetic, rows, width)
                for kind in KINDS:
                    entries[tile_table.key(kind, arithmetic, rows, width)] = {"choice": choice, "measured": False}
                for kernel in configurations.KERNELS:
                    m, n, k = _shapes(kernel, rows, width)
                    among = configurations.candidates(kernel, arithmetic, chip.capability, chip.shared_memory)
                    config = configurations.heuristic(kernel, among, chip.multiprocessors, m, n, k)
                    name = tile_table.key(kernel, arithmetic, m, n, k)
                    entries[name] = {"choice": list(config), "measured": False}
    return entries


def by_measurement(
    device: torch.device, arithmetics: Sequence[str] = ("half", "tf32"), timer: Timer = time_on_gpu
) -> dict[str, dict[str, Any]]:
    """The same entries, measured on a device: tiles first, then, with these, the strategies."""
    chip = tile_table.chip_of(device)
    entries: dict[str, dict[str, Any]] = {}
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        for arithmetic in arithmetics:
            torch.backends.cuda.matmul.allow_tf32 = arithmetic == "tf32"
            for width in WIDTHS:
                for rows in ROWS:
                    for kernel in configurations.KERNELS:
                        m, n, k = _shapes(kernel, rows, width)
                        config = tune(kernel, arithmetic, device, m, n, k, timer=timer)
                        name = tile_table.key(kernel, arithmetic, m, n, k)
                        entries[name] = {"choice": list(config), "measured": True}
                    tile_table.forget()
                    for kind in KINDS:
                        choice = tune_strategy(kind, arithmetic, device, rows, width, timer=timer)
                        entries[tile_table.key(kind, arithmetic, rows, width)] = {"choice": choice, "measured": True}
                        print(f"{chip.name}: {kind}, {arithmetic}, {rows} rows of {width}: {choice}", flush=True)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    tile_table.forget()
    return entries


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a table: measured on this machine's GPU or, with ``--by-arithmetic``, an H100's without one."""
    parser = argparse.ArgumentParser(prog="python -m rvae_fast.kernels.tuning", description=main.__doc__)
    parser.add_argument("out", type=Path, help="the JSON file, such as kernels/tiles_hopper.json")
    parser.add_argument("--by-arithmetic", action="store_true", help="measure nothing; needs no GPU")
    options = parser.parse_args(arguments)
    if options.by_arithmetic:
        tile_table.write(options.out, H100.name, "none", by_arithmetic(H100))
        return
    if not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --by-arithmetic writes the table of an H100 without one")
    device = torch.device("cuda", torch.cuda.current_device())
    import triton

    tile_table.write(options.out, tile_table.chip_of(device).name, triton.__version__, by_measurement(device))


if __name__ == "__main__":
    main()
