"""How a job of the GPU benchmark is run: compiled, captured, timed, its kernels and its memory counted."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from gpu_cells import Cell, Job
from gpu_variants import prepare

#: Seconds a variant is timed for, and the fewest and most repetitions.
TIMED, FEWEST, MOST = 0.6, 5, 200
#: Seconds to wait for memory that other processes hold, when compiling ahead beside them.
WAITS = (5.0, 15.0, 30.0)


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
    """Kernels of one step, by the profiler, which may slow every later launch of its process."""
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


def run_job(job: Job, device: torch.device, timed: float = TIMED) -> dict[str, Any]:
    """Measure one job; a plain dictionary, with ``"error"`` where it cannot run."""
    result: dict[str, Any] = {"cell": asdict(job.cell), "name": job.cell.name, "variant": job.variant}
    began = time.perf_counter()
    try:
        torch.compiler.reset()
        if job.cell.workload == "roofs":
            result |= {"roofs": _roofs(job.cell, device, timed)}
        elif job.counts:
            step = prepare(job, device).step
            step()
            result["kernels"] = _kernels(step, device)
        else:
            result |= _timed(job, device, timed)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    result["took"] = time.perf_counter() - began
    return result


def _timed(job: Job, device: torch.device, timed: float) -> dict[str, Any]:
    gc.collect()
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    ready = prepare(job, device)
    step = _captured(ready.step, device) if job.variant.endswith(" graph") else ready.step
    result: dict[str, Any] = _measure(step, device, timed)
    if job.cell.workload == "host overhead":
        result["host_seconds"] = _host(step, device)
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
        # What a graph's own pool keeps is not what a backward pass needs.
        if ready.forward is not None and job.variant in ("rvae_fast", "eager", "compile"):
            result["kept_bytes"] = _kept(ready.forward, device)
    return result


def compile_job(job: Job, device: torch.device) -> None:
    """Compile what a job runs, by running it once, so that the compiler's cache on disk has it.

    Other jobs and the tests run beside it: where they leave too little memory, it begins again when they may be done.
    """
    for wait in (*WAITS, None):
        try:
            prepare(job, device).step()
            break
        except torch.OutOfMemoryError:
            if wait is None:
                raise
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        time.sleep(wait)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
