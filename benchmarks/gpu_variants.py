"""The variants of a cell of the GPU benchmark, made ready: ours, eager and compiled, each doing the same work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_cells import CALLABLE, COMPILED, LATENT, OURS, Cell, Job, model
from torch import Tensor, nn

from rvae_fast import ResidualStack, _backend
from rvae_fast.ops.decoder_error import decoder_error
from rvae_fast.ops.reconstruction_kld import reconstruction_kld


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
        if variant == CALLABLE and device.type == "cuda":
            # As docs/notes/performance.md has it; the casts are in the graphs.
            with torch.autocast("cuda", torch.bfloat16, enabled=cell.dtype == "bf16", cache_enabled=False):
                run = torch.cuda.make_graphed_callables(stack, (x,))

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
    if cell.workload.startswith("loss"):
        return _loss(cell, variant, device, normal)
    raise ValueError(f"no workload {cell.workload!r}")


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


def _loss(cell: Cell, variant: str, device: torch.device, normal: Any) -> Prepared:
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
