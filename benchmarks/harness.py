"""What every benchmark here shares: how a call is timed, how implementations are compared, what is written down.

* Implementations are **interleaved** in one process: each round times every one of them once, in a shuffled order, so
that
  whatever else the machine does falls on all alike. The figure is the median over rounds; a ratio is the median of the
  rounds' own ratios.
* Inputs **rotate** over more buffers than the last-level cache holds, so that no call finds its inputs in the cache. (A
  benchmark may ask for the opposite, one set of inputs and several untimed calls, and says so in its case.)
  Each timed call follows an untimed one of the same implementation: caches and allocator are as that implementation
  leaves them, and none pays for writing back what another one wrote.
* A memory-bound call has a **floor**: the bytes it cannot avoid moving, over the bandwidth of a plain copy, measured in
  the same process the same way. ``share`` is floor / time.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Variant:
    """One implementation: ``run(inputs)`` is the timed call."""

    name: str
    run: Callable[[Any], Any]


@dataclass
class Timing:
    """Seconds of one implementation over all rounds."""

    name: str
    median: float
    low: float  # lower quartile
    high: float  # upper quartile
    share: float | None = None  # of the floor, where there is one
    speedup: float | None = None  # of the subject over this one: median of the rounds' ratios


@dataclass
class Comparison:
    """The subject (the first variant) against the others."""

    benchmark: str
    case: dict[str, Any]
    timings: list[Timing]
    rounds: int
    floor_bytes: int | None = None
    copy_bandwidth: float | None = None  # bytes per second, bytes read plus bytes written
    notes: dict[str, Any] = field(default_factory=dict)

    def timing(self, name: str) -> Timing:
        return next(t for t in self.timings if t.name == name)


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache between the device's cores and its memory (64 MiB where it cannot be read)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes, default=64 << 20)


def rotation(make: Callable[[int], Any], bytes_each: int, device: torch.device) -> list[Any]:
    """Make enough sets of inputs (``make(seed)``) that one round over them passes four times the last-level cache."""
    count = max(2, -(-4 * last_level_cache(device) // bytes_each))
    return [make(seed) for seed in range(min(count, 64))]


def seconds(run: Callable[[Any], Any], inputs: Any, device: torch.device) -> float:
    """Time one call; on a GPU by events, so that the host's work does not count unless it is what takes long."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run(inputs)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3
    start = time.perf_counter()
    run(inputs)
    return time.perf_counter() - start


def interleave(
    variants: Sequence[Variant], inputs: Sequence[Any], rounds: int, device: torch.device, untimed: int = 1
) -> list[list[float]]:
    """Seconds of each variant in each round, each call on the next inputs, after ``untimed`` of its own."""
    supply = itertools.cycle(inputs)
    for variant in variants:
        for _ in range(3):
            seconds(variant.run, next(supply), device)
    times: list[list[float]] = [[] for _ in variants]
    order = list(range(len(variants)))
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for k in order:
            for _ in range(untimed):
                seconds(variants[k].run, next(supply), device)
            times[k].append(seconds(variants[k].run, next(supply), device))
    return times


def copy_variant(name: str = "copy") -> Variant:
    """The yardstick: ``destination.copy_(source)`` of large tensors."""
    return Variant(name, lambda pair: pair[1].copy_(pair[0]))


def compare(
    benchmark: str,
    case: dict[str, Any],
    variants: Sequence[Variant],
    inputs: Sequence[Any],
    rounds: int,
    device: torch.device,
    floor_bytes: int | None = None,
    copied: int = 1 << 26,
    untimed: int = 1,
) -> Comparison:
    """Time the variants against each other; with ``floor_bytes``, against a copy of ``copied`` bytes as well."""
    pairs = [tuple(torch.empty(copied // 4, device=device).fill_(1.0) for _ in range(2)) for _ in inputs[:2]]
    copies = itertools.cycle(pairs)
    copy = copy_variant()
    timed = list(variants)
    if floor_bytes is not None:
        timed.append(Variant("copy", lambda _: copy.run(next(copies))))
    times = interleave(timed, inputs, rounds, device, untimed)

    bandwidth = None
    if floor_bytes is not None:
        bandwidth = 2 * copied / statistics.median(times.pop())
    timings = []
    for variant, own in zip(variants, times, strict=True):
        quartiles = statistics.quantiles(own, n=4)
        timing = Timing(variant.name, statistics.median(own), quartiles[0], quartiles[2])
        timing.speedup = statistics.median(other / subject for other, subject in zip(own, times[0], strict=True))
        if floor_bytes is not None and bandwidth is not None:
            timing.share = floor_bytes / bandwidth / timing.median
        timings.append(timing)
    return Comparison(benchmark, case, timings, rounds, floor_bytes, bandwidth)


def device_facts(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a figure: device, threads, versions, date."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(device),
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    keys = {key.strip(): value.strip() for key, value in facts.items()}
    return f"{keys.get('model name', platform.machine())} (family {keys.get('cpu family')}, model {keys.get('model')})"


def kind(device: torch.device) -> str:
    """``cuda``, ``cpu-amx`` or ``cpu``: bf16 is another matter where the CPU multiplies tiles, so both are kept."""
    has_amx = device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return "cpu-amx" if has_amx else device.type


def save(name: str, comparisons: Sequence[Comparison], device: torch.device) -> Path:
    """Write a suite's record to ``results/NAME-KIND.json``."""
    path = RESULTS / f"{name}-{kind(device)}.json"
    cases = [asdict(c) for c in comparisons]
    if path.exists():  # a suite may be run case by case: what was not run again stays, with the facts of its own run
        old = json.loads(path.read_text())
        again = [c["case"] for c in cases]
        cases = [{"device": old["device"], **c} for c in old["comparisons"] if c["case"] not in again] + cases
    record = {"suite": name, "device": device_facts(device), "comparisons": cases}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
