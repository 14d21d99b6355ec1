"""Small stacks on a GPU: values of the ways in which they can be launched against fp64, and the time of each by graph.

``python benchmarks/launch_check.py`` compiles in several processes first, checks values, then times; each part stands
for itself, and none is begun after ``--seconds``. ``--dry`` checks values on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import rvae_fast
from rvae_fast import ResidualStack
from rvae_fast.kernels import configurations, launch, residual_stack, residual_stack_backward
from rvae_fast.kernels.configurations import TileConfig
from rvae_fast.kernels.residual_stack import StackOptions, stack_forward
from rvae_fast.kernels.residual_stack_backward import stack_backward

SHAPES = ((1024, 128), (1000, 96), (1024, 256), (8192, 128))
DTYPES = {"bf16": torch.bfloat16, "fp32": None}
ORDERS = ("pre", "post")
BLOCKS = (2, 10, 50)
#: What is checked by value without ``--all``: a wide or large stack in fp32 runs by the library's products.
CASES = (
    *itertools.product(SHAPES, ("bf16",), ORDERS),
    *itertools.product(SHAPES[:2], ("fp32",), ORDERS),
)
TIMED = ((1024, 128), (8192, 128))
#: What each way of launching has: statistics merged by their consumer, weights' gradients in groups, launches chained,
#: tiles for tiny shapes.
WAYS = {
    "old": (False, False, False, False),
    "merged": (True, False, False, False),
    "grouped": (True, True, False, False),
    "chained": (True, True, True, False),
    "new": (True, True, True, True),
    "new unchained": (True, True, False, True),
}
#: Tiles for 1024 x 128: of the forward, of the backward.
SWEEP = (
    ((32, 64, 128, 8, 2), (32, 64, 128, 8, 2)),
    ((32, 32, 128, 4, 2), (32, 32, 128, 4, 2)),
    ((64, 32, 128, 8, 2), (64, 32, 128, 8, 2)),
    ((64, 64, 128, 8, 2), (64, 64, 128, 8, 2)),
    ((32, 128, 128, 8, 2), (32, 128, 128, 8, 2)),
    ((32, 64, 64, 4, 2), (32, 64, 64, 4, 2)),
)
_LIMITS = (configurations.DEFERRED_TILES, configurations.GROUPED_ROWS)
_CHAINS, _CANDIDATES, _CHOOSE = launch.chains, configurations.candidates, configurations.choose


def forget() -> None:
    """Record and choose anew."""
    configurations._choose.cache_clear()
    residual_stack._forward_tape.cache_clear()
    residual_stack_backward._backward_tape.cache_clear()


@contextmanager
def launched(way: str, tiles: dict[str, tuple[int, ...]] | None = None) -> Iterator[None]:
    """A way of launching, with tiles given for some of the kernels."""
    merged, grouped, chained, tiny = WAYS[way]

    def candidates(*arguments: Any) -> tuple[TileConfig, ...]:
        found = _CANDIDATES(*arguments)
        return found if tiny else tuple(c for c in found if c.block_m >= 64)

    def choose(kernel: str, *arguments: Any) -> TileConfig:
        return TileConfig(*tiles[kernel]) if tiles and kernel in tiles else _CHOOSE(kernel, *arguments)

    configurations.DEFERRED_TILES = _LIMITS[0] if merged else 0
    configurations.GROUPED_ROWS = _LIMITS[1] if grouped else 0
    launch.chains = _CHAINS if chained else lambda device: False  # type: ignore[assignment]
    configurations.candidates, configurations.choose = candidates, choose
    forget()
    try:
        yield
    finally:
        configurations.DEFERRED_TILES, configurations.GROUPED_ROWS = _LIMITS
        launch.chains, configurations.candidates, configurations.choose = _CHAINS, _CANDIDATES, _CHOOSE
        forget()


# --- values ---


def make(width: int, blocks: int, order: str, device: torch.device) -> ResidualStack:
    """A stack whose norms have weights and state worth the name."""
    torch.manual_seed(blocks)
    module = ResidualStack(width, blocks, order=order, activation="leaky_relu")
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point() and "linears" not in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return module.to(device)


def step(
    state: ResidualStack, x: Tensor, grad: Tensor, backend: str, half: torch.dtype | None, double: bool = False
) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one training step of a copy, each kind in one vector."""
    import copy

    module = copy.deepcopy(state)
    if double:
        module, x, grad = module.double(), x.double(), grad.double()
    x = x.detach().clone().requires_grad_()
    with rvae_fast.backend(backend), torch.autocast(x.device.type, dtype=half, enabled=half is not None):
        y = module(x)
    named = dict(module.named_parameters())
    grads = torch.autograd.grad(y, [x, *named.values()], grad.to(y.dtype))
    found: dict[str, list[Tensor]] = {"y": [y.detach()], "x": [grads[0]]}
    for name, g in zip(named, grads[1:], strict=True):
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        found.setdefault(kind, []).append(g)
    for name, tensor in module.named_buffers():
        if tensor.is_floating_point():
            found.setdefault(name.rsplit(".", 1)[1], []).append(tensor)
    return {kind: torch.cat([t.double().flatten() for t in tensors]) for kind, tensors in found.items()}


def worst(values: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error (root mean square) and the kind of tensor that has it; absolute where all is zero."""
    found = []
    for kind, value in exact.items():
        size = value.square().mean().sqrt().item()
        error = (values[kind] - value).square().mean().sqrt().item()
        found.append((error / size if size > 1e-9 else error, kind))
    return max(found)


def check(shape: tuple[int, int], dtype: str, order: str, depths: tuple[int, ...], device: torch.device) -> str:
    """One line on the values of new, old and PyTorch, for stacks of each depth."""
    half = DTYPES[dtype]
    said = [f"{shape[0]}x{shape[1]} {dtype} {order}"]
    for blocks in depths:
        module = make(shape[1], blocks, order, device)
        x, grad = (torch.randn(shape, device=device) for _ in range(2))
        exact = step(module, x, grad, "reference", None, double=True)
        theirs = worst(step(module, x, grad, "reference", half), exact)
        with launched("new"):
            new, again = (step(module, x, grad, "triton", half) for _ in range(2))
        with launched("old"):
            old = worst(step(module, x, grad, "triton", half), exact)
        ours = worst(new, exact)
        same = all(torch.equal(value, again[kind]) for kind, value in new.items())
        right = same and ours[0] <= 2 * max(theirs[0], old[0]) + 1e-6
        verdict = "ok" if right else f"WRONG (repeats: {same})"
        said.append(f"b{blocks} {verdict} {ours[0]:.1e} {ours[1]} (old {old[0]:.1e}, torch {theirs[0]:.1e})")
    return " | ".join(said)


# --- times ---


def microseconds(function: Callable[[], Any], replays: int = 7) -> float:
    """Median microseconds of a call, in a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])


def workload(shape: tuple[int, int], blocks: int, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward of a stack of bf16 products on fp32 rows, order "pre", as training does it."""
    width = shape[1]
    depth = 2 * blocks

    def vectors(start: float) -> list[Tensor]:
        return [torch.full((width,), start, device=device) for _ in range(depth)]

    x, grad = (torch.randn(shape, device=device) for _ in range(2))
    weights = [torch.randn(width, width, device=device) / width**0.5 / 8 for _ in range(depth)]
    lists = [weights, vectors(0.0), vectors(1.0), vectors(0.0), vectors(0.0), vectors(1.0)]
    options = StackOptions(2, "pre", "leaky_relu", 0.01, True, torch.bfloat16)
    _, kept = stack_forward(x, *lists, 1e-5, options)
    return (
        lambda: stack_forward(x, *lists, 1e-5, options, momentum=[0.1] * depth),
        lambda: stack_backward(grad, x, weights, kept, options),
    )


def timed(shape: tuple[int, int], way: str, device: torch.device, tiles: Any = None, blocks: int = 50) -> str:
    """One line: microseconds of forward and backward, and launches."""
    with launched(way, tiles):
        counts: list[int] = []
        play = launch.Tape.play

        def counting(tape: launch.Tape, values: Any) -> None:
            counts.append(tape.launches)
            play(tape, values)

        forward, backward = workload(shape, blocks, device)
        launch.Tape.play = counting  # type: ignore[method-assign]
        try:
            forward(), backward()
        finally:
            launch.Tape.play = play  # type: ignore[method-assign]
        a, b = microseconds(forward), microseconds(backward)
    named = way if tiles is None else " ".join(str(list(t)) for t in tiles.values())
    return f"{shape[0]}x{shape[1]} {named}: forward {a:.0f} + backward {b:.0f} = {a + b:.0f} us, launches {counts}"


# --- all of it ---


def sweeps() -> list[dict[str, tuple[int, ...]]]:
    return [{"forward": f, "backward": b} for f, b in SWEEP]


def compile_share(share: int, of: int, cases: Iterable[tuple[tuple[int, int], str, str]], device: torch.device) -> None:
    """What this process is to compile: each thing that will run, at two blocks."""
    todo: list[Callable[[], Any]] = []
    todo += [lambda s=s, w=w: timed(s, w, device, blocks=2) for s, w in itertools.product(TIMED, WAYS)]
    for case, way in itertools.product(cases, ("new", "old")):
        todo.append(lambda case=case, way=way: _run_once(*case, way, device))
    todo += [lambda t=t: timed(TIMED[0], "new", device, t, blocks=2) for t in sweeps()]
    for task in todo[share::of]:
        try:
            task()
        except Exception as error:
            print(f"compiling: {type(error).__name__}: {str(error)[:300]}", flush=True)


def _run_once(shape: tuple[int, int], dtype: str, order: str, way: str, device: torch.device) -> None:
    module = make(shape[1], 2, order, device)
    x = torch.randn(shape, device=device)
    with launched(way):
        step(module, x, x, "triton", DTYPES[dtype])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=35.0, help="begin nothing after so many")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile")
    parser.add_argument("--all", action="store_true", help="check every shape in every dtype")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help="on the CPU, small")
    arguments = parser.parse_args()
    begun = time.monotonic()
    device = torch.device("cpu") if arguments.dry else torch.device("cuda", torch.cuda.current_device())
    cases = tuple(itertools.product(SHAPES, DTYPES, ORDERS)) if arguments.all else CASES
    if arguments.share:
        compile_share(*arguments.share, cases, device)
        return
    todo: list[Callable[[], str]] = []
    if arguments.dry:
        for order in ORDERS:
            todo.append(lambda order=order: check((70, 20), "fp32", order, (1, 2), device))
    else:
        count = arguments.processes
        command = [sys.executable, "-W", "ignore", os.path.abspath(__file__), *["--all"][: arguments.all], "--share"]
        workers = [subprocess.Popen([*command, str(i), str(count)]) for i in range(count)]
        for worker in workers:
            try:
                worker.wait(max(0.1, begun + 0.75 * arguments.seconds - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()  # what it has not compiled is compiled below
                print("a process that compiles has been stopped", flush=True)
        print(f"compiled in {time.monotonic() - begun:.0f} s, on {torch.cuda.get_device_name(device)}", flush=True)
        first = [lambda s=s, w=w: timed(s, w, device) for s, w in itertools.product(TIMED[:1], ("old", "new"))]
        values = [lambda c=c: check(*c, BLOCKS, device) for c in cases]
        others = [c for c in itertools.product(TIMED, WAYS) if c[0] != TIMED[0] or c[1] not in ("old", "new")]
        rest = [lambda c=c: timed(*c, device) for c in others]
        todo = [*first, *values, *rest, *(lambda t=t: timed(TIMED[0], "new", device, t) for t in sweeps())]
    for task in todo:
        if time.monotonic() - begun > arguments.seconds:
            print("out of time: the rest is left out", flush=True)
            break
        try:
            print(task(), flush=True)
        except Exception as error:
            print(f"failed: {type(error).__name__}: {str(error)[:400]}", flush=True)
    print(f"{time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
