"""The cells of the GPU benchmark: what is measured, by which variants, in which order; and how one is run.

A *cell* is a workload at a size; a *variant* is an implementation of it; a *job* is one of each. Jobs are ordered so
that whenever the time runs out, what was measured is what mattered most.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import gpu_floor
import torch
from gpu_floor import Work
from torch import Tensor, nn

from rvae_fast import RVAE, ResidualStack, _backend
from rvae_fast.ops.decoder_error import decoder_error
from rvae_fast.ops.reconstruction_kld import reconstruction_kld

LATENT = 20
OURS = ("rvae_fast", "rvae_fast graph")
EAGER = ("eager", "eager graph")
COMPILED = ("compile", "compile reduce-overhead", "compile max-autotune")
VARIANTS = (*OURS, *EAGER, *COMPILED)
#: Seconds that a job of a variant may take, most of it compiling: what has been compiled ahead takes far less.
LIMITS = {"compile": 110.0, "compile reduce-overhead": 110.0, "compile max-autotune": 180.0}
DEFAULT_LIMIT = 60.0
#: Seconds a variant is timed for, and the fewest and most repetitions.
TIMED, FEWEST, MOST = 0.6, 5, 200


@dataclass(frozen=True)
class Cell:
    """A workload at a size.

    ``blocks`` are residual blocks of two layers; of a network half of them are in the encoder, half in the decoder.
    """

    workload: str
    width: int
    batch: int
    blocks: int = 0
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        depth = f", {self.blocks} blocks" if self.blocks else ""
        return f"{self.workload}, W = {self.width}, B = {self.batch}{depth}, {self.dtype}"

    @property
    def features(self) -> int:
        """Columns of the table: few for a narrow network, an image's for a wide one."""
        return 40 if self.width <= 128 else 784


@dataclass(frozen=True)
class Job:
    cell: Cell
    variant: str

    @property
    def limit(self) -> float:
        return LIMITS.get(self.variant, DEFAULT_LIMIT)


ROOFS = Cell("roofs", 8192, 1 << 29)
KEY = (
    Cell("train", 512, 65536, 50),
    Cell("train", 128, 1024, 50),
    Cell("stage forward", 512, 65536, 50),
    Cell("loss forward", 784, 65536),
    Cell("loss forward+backward", 784, 65536),
    Cell("train", 2048, 8192, 10),
    Cell("score", 512, 65536, 50),
    Cell("last layer with error", 2048, 65536),
    Cell("host overhead", 128, 32, 50),
)
GRID = tuple(
    Cell("train", width, batch, blocks)
    for blocks in (50, 10, 100)
    for width in (512, 128, 1024, 2048)
    for batch in (8192, 1024, 65536)
)


def jobs() -> list[Job]:
    """Every job, in order: the roofs; the key cells by us and eagerly, the host's share before any profiler has run;
    the rivals that the key cells are held against, quickest to compile first; their other rivals; then the grid."""
    order = [Job(ROOFS, "rvae_fast")]
    order += [
        Job(cell, variant) for cell in (KEY[8], *KEY[:8]) for variant in ("rvae_fast", "eager", "rvae_fast graph")
    ]
    order += [Job(KEY[i], "compile") for i in (3, 4, 7)]
    order += [Job(KEY[1], "eager graph"), Job(KEY[1], "compile reduce-overhead")]
    order += [Job(KEY[i], "compile") for i in (0, 5, 2)]
    order += [Job(KEY[i], "compile reduce-overhead") for i in (5, 0, 2)]
    order += [Job(KEY[i], "compile max-autotune") for i in (5, 1, 0)]
    order += [Job(cell, "compile") for cell in KEY]
    order += [Job(cell, variant) for cell in KEY for variant in ("compile reduce-overhead", "eager graph")]
    order += [Job(cell, "compile max-autotune") for cell in KEY]
    order += [Job(replace(cell, dtype="fp32"), v) for cell in KEY[3:5] for v in ("rvae_fast", "eager", "compile")]
    grid = [cell for cell in GRID if cell not in KEY]
    order += [Job(cell, variant) for cell in grid for variant in ("rvae_fast", "rvae_fast graph", "eager")]
    order += [Job(cell, v) for cell in grid for v in COMPILED]
    return [job for job in dict.fromkeys(order) if job.cell.workload != "host overhead" or "graph" not in job.variant]


def compilations() -> list[int]:
    """Numbers of the jobs that are worth compiling ahead, longest wait first: deep networks' rivals.

    Not max-autotune, which chooses by timing: beside other work it would choose badly.
    """
    among = ("compile", "compile reduce-overhead")
    return [n for n, job in enumerate(jobs()) if job.variant in among and job.cell in KEY and job.cell.blocks][:10]


def shrink(cell: Cell) -> Cell:
    """The same cell for a dry run."""
    size = 64 if cell.workload == "roofs" else 12
    return replace(cell, width=size if cell.width > 128 else 8, batch=min(cell.batch, 24), blocks=min(cell.blocks, 2))


# --- a cell's work ---


def model(cell: Cell, device: torch.device) -> RVAE:
    """The network of a cell, its norms and weights as training leaves them."""
    torch.manual_seed(0)
    net = RVAE(cell.features, LATENT, widths=[cell.width], blocks=[cell.blocks // 2], init="default")
    return net.to(device)


def passes(cell: Cell) -> list[Work]:
    """The work of a cell that no implementation avoids."""
    size = 2 if cell.dtype == "bf16" else 4
    width, rows = cell.width, cell.batch
    if cell.workload == "host overhead":
        return []
    if cell.workload.startswith("loss"):
        return gpu_floor.loss(rows, width, LATENT, size, backward="backward" in cell.workload)
    if cell.workload == "last layer with error":
        inner = width // 4
        return [Work(2.0 * rows * inner * width, size * (rows * inner + inner * width) + 4.0 * rows * width)]
    block = [(width, width)] * 2
    if cell.workload == "stage forward":
        work = [w for shape in block * cell.blocks for w in gpu_floor.linear(rows, *shape, size, training=False)]
        return [*work, *(Work(0.0, float(size * rows * width)) for _ in range(cell.blocks))]
    half = block * (cell.blocks // 2)
    shapes = [(cell.features, width), *half, (width, 2 * LATENT), (LATENT, width), *half, (width, cell.features)]
    units = [width] * (cell.blocks // 2 * 2)
    return gpu_floor.network(shapes, units, rows, cell.features, size, training=cell.workload == "train")


# --- running a job ---


@dataclass
class Prepared:
    """A variant made ready: ``step`` is what is timed; ``forward`` keeps what a backward pass would need."""

    step: Callable[[], Any]
    forward: Callable[[], Any] | None = None


def _compiled(function: Any, variant: str, device: torch.device) -> Any:
    if device.type != "cuda":  # a dry run: the tracing, not the code generator
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    mode = variant.removeprefix("compile").strip() or None
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def _begin_step(variant: str) -> None:
    """Tell the compiler's CUDA graphs that nobody waits for what the step before left.

    After a forward pass whose backward never comes they would otherwise record a new graph at every call.
    """
    if "reduce-overhead" in variant or "max-autotune" in variant:
        torch.compiler.cudagraph_mark_step_begin()


def _context(variant: str, cell: Cell, device: torch.device) -> Callable[[], Any]:
    # "auto", so that on a GPU without Triton the record says what users would get there.
    backend = "auto" if variant in OURS else "reference"

    @contextlib.contextmanager
    def enter() -> Any:
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=cell.dtype == "bf16")
        with _backend.backend(backend), autocast:
            yield

    return enter


def prepare(job: Job, device: torch.device) -> Prepared:
    """Build the variant of a cell on a device (not captured yet)."""
    cell, variant = job.cell, job.variant
    context = _context(variant, cell, device)
    compiles = variant in COMPILED
    g = torch.Generator(device).manual_seed(1)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device, generator=g).to(dtype)

    if cell.workload == "train":
        return _train(cell, variant, device, context, normal(cell.batch, cell.features))
    if cell.workload in ("stage forward", "host overhead"):
        stack: Any = ResidualStack(cell.width, cell.blocks).to(device)
        run = _compiled(stack, variant, device) if compiles else stack
        x = normal(cell.batch, cell.width, dtype=torch.bfloat16 if cell.dtype == "bf16" else torch.float32)

        def stage() -> Any:
            _begin_step(variant)
            with context():
                return run(x)

        return Prepared(stage, stage)
    if cell.workload == "score":
        net = model(cell, device).eval()
        rows = normal(cell.batch, cell.features)

        def plain(x: Tensor) -> Tensor:
            return net.loss_terms(x)[0]

        score = net.anomaly_score if variant in OURS else _compiled(plain, variant, device) if compiles else plain

        def run_score() -> Any:
            with torch.no_grad(), context():
                return score(rows)

        return Prepared(run_score)
    if cell.workload == "last layer with error":
        inner = cell.width // 4
        dtype = torch.bfloat16 if cell.dtype == "bf16" else torch.float32
        h, weight = normal(cell.batch, inner, dtype=dtype), normal(cell.width, inner, dtype=dtype) / inner**0.5
        x, bias = normal(cell.batch, cell.width), normal(cell.width)

        def two_steps(h: Tensor, x: Tensor) -> Tensor:
            return (nn.functional.linear(h, weight, bias.to(h.dtype)).float() - x).square().sum(1)

        own: Any = lambda h, x: decoder_error(h, weight, bias, x)  # noqa: E731
        last = own if variant in OURS else _compiled(two_steps, variant, device) if compiles else two_steps

        def run_last() -> Any:
            with torch.no_grad(), context():
                return last(h, x)

        return Prepared(run_last)
    return _loss(cell, variant, device, context, normal)


def _train(cell: Cell, variant: str, device: torch.device, context: Any, x: Tensor) -> Prepared:
    net = model(cell, device).train()
    loss: Any = _compiled(net.loss, variant, device) if variant in COMPILED else net.loss
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True, capturable=cuda)

    def forward() -> Any:
        _begin_step(variant)
        with context():
            return loss(x)

    def step() -> None:
        forward().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return Prepared(step, forward)


def _loss(cell: Cell, variant: str, device: torch.device, context: Any, normal: Any) -> Prepared:
    backward = "backward" in cell.workload
    dtype = torch.bfloat16 if cell.dtype == "bf16" else torch.float32

    def by_hand(x: Tensor, x_hat: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        error = (x_hat.float() - x.float()).square().sum(1)
        return error, -0.5 * (1 + logvar.float() - mu.float().square() - logvar.float().exp()).sum(1)

    rows, width = cell.batch, cell.width
    # Several sets, so that no call finds its inputs in the second-level cache.
    sets = [[normal(rows, n, dtype=dtype) for n in (width, width, LATENT, LATENT)] for _ in range(3)]
    for tensors in sets:
        for t in tensors[1:]:
            t.requires_grad_(backward)
    run: Any = reconstruction_kld if variant in OURS else by_hand
    run = _compiled(run, variant, device) if variant in COMPILED else run
    turn = iter(range(1 << 62))

    def step() -> Any:
        _begin_step(variant)
        inputs = sets[next(turn) % len(sets)]
        with _backend.backend("auto" if variant in OURS else "reference"):
            error, kld = run(*inputs)
        return torch.autograd.grad((error + kld).mean(), inputs[1:]) if backward else error

    return Prepared(step)


def _captured(step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    if device.type != "cuda":
        return step  # a dry run's stand-in
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _seconds(step: Callable[[], Any], repetitions: int, device: torch.device) -> list[float]:
    """Each repetition by itself: by events on a GPU, where the host runs ahead."""
    if device.type != "cuda":
        times = []
        for _ in range(repetitions):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) * 1e-3 for a, b in pairwise(events)]


def _measure(step: Callable[[], Any], device: torch.device, timed: float) -> dict[str, float]:
    for _ in range(3):
        step()
    once = statistics.median(_seconds(step, 3, device))
    repetitions = int(min(MOST, max(FEWEST, timed / 2 / max(once, 1e-7))))
    runs = [_seconds(step, repetitions, device) for _ in range(2)]
    low, median, high = statistics.quantiles([t for run in runs for t in run], n=4)
    one, two = (statistics.median(run) for run in runs)
    return {"seconds": median, "low": low, "high": high, "spread": abs(one - two) / median}


def _kernels(step: Callable[[], Any], device: torch.device) -> int | None:
    """Kernels of one step, by the profiler."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize(device)
    return sum(1 for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA)


def _kept(forward: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that are still there after a forward pass in training."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    out = forward()
    torch.cuda.synchronize(device)
    kept = torch.cuda.memory_allocated(device) - before
    del out
    return kept


def _roofs(cell: Cell, device: torch.device, timed: float) -> dict[str, Any]:
    """Bytes a second of a large copy (read plus written), and operations a second of large products."""
    pair = torch.randn(2, cell.batch, device=device, dtype=torch.bfloat16)
    copy = _measure(lambda: pair[1].copy_(pair[0]), device, timed)
    found: dict[str, Any] = {"copy": 2 * 2 * cell.batch / copy["seconds"]}
    n, before = cell.width, torch.backends.cuda.matmul.allow_tf32
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32), ("fp32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = torch.randn(2, n, n, device=device, dtype=dtype)
        found[name] = 2.0 * n**3 / _measure(lambda a=a, b=b: a @ b, device, timed)["seconds"]
    torch.backends.cuda.matmul.allow_tf32 = before
    return found


def _host(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds that the host is busy with one call, the device being far behind or idle."""
    times = []
    for _ in range(30):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def run_job(
    job: Job, device: torch.device, timed: float = TIMED, report: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Measure one job; a plain dictionary, with ``"error"`` where it cannot run.

    ``report`` is given what has been timed before a profiler counts kernels, which may end the process.
    """
    result: dict[str, Any] = {"cell": asdict(job.cell), "name": job.cell.name, "variant": job.variant}
    began = time.perf_counter()
    try:
        torch.compiler.reset()
        if job.cell.workload == "roofs":
            result |= {"roofs": _roofs(job.cell, device, timed)}
        else:
            gc.collect()
            before = 0
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            ready = prepare(job, device)
            step = _captured(ready.step, device) if job.variant.endswith(" graph") else ready.step
            result |= _measure(step, device, timed)
            if job.cell.workload == "host overhead":
                result["host_seconds"] = _host(step, device)
            if device.type == "cuda":
                result["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
                # What a graph's own pool keeps is not what a backward pass needs.
                if ready.forward is not None and job.variant in ("rvae_fast", "eager", "compile"):
                    result["kept_bytes"] = _kept(ready.forward, device)
            if report is not None:
                report({**result, "took": time.perf_counter() - began})
            result["kernels"] = _kernels(step, device)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    result["took"] = time.perf_counter() - began
    return result


def compile_job(job: Job, device: torch.device) -> None:
    """Compile what a job runs, by running it once, so that the compiler's cache on disk has it."""
    prepare(job, device).step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
