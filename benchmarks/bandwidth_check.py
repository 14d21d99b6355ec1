"""The passes that move whole tensors: right values, and time beside the memory's own, with several tiles each.

``python benchmarks/bandwidth_check.py --out build/bandwidth.json`` on a GPU. Kernels are compiled by several processes
first, then checked against plain PyTorch in fp64 and timed by one: launches of a CUDA graph between two events, a
median of replays. ``old`` are the passes in ``earlier/``, ``own`` is what a launcher chooses by itself.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from earlier import batch_norm as old_batch_norm
from earlier import norm_activation as old_norm_activation
from earlier import reconstruction_kld as old_loss
from torch import Tensor

from rvae_fast import reference
from rvae_fast.kernels import batch_norm, decoder_error, norm_activation, passes, plain_layer, reconstruction_kld
from rvae_fast.kernels.configurations import TileConfig
from rvae_fast.kernels.passes import Walk

DEVICE = "cuda"
ACT: dict[str, Any] = {"activation": "leaky_relu"}
#: Rows and widths, most important first.
SHAPES = ((65536, 512), (65536, 1024), (8192, 2048), (65536, 128), (1024, 128))
#: Rows of a step, columns, warps, stages of the passes with column sums; with each of them rows of a tile.
REDUCED = (
    (4, 512, 4, 1), (8, 256, 4, 1), (2, 512, 4, 4), (4, 512, 4, 3), (4, 512, 8, 4), (4, 256, 4, 4), (8, 256, 4, 3),
    (8, 256, 8, 4), (16, 128, 4, 3), (8, 128, 4, 4), (2, 1024, 8, 4),
)  # fmt: skip
REDUCED_ROWS = (32, 64, 128)
#: The same of those without, with tiles of one step or more.
POINTWISE = (
    (8, 512, 4, 1), (4, 512, 4, 1), (2, 512, 4, 1), (8, 512, 8, 1), (16, 256, 4, 1), (8, 256, 4, 1), (4, 1024, 4, 1),
    (4, 1024, 8, 1), (16, 128, 4, 1), (32, 128, 4, 1), (2, 512, 4, 4), (4, 512, 4, 3), (4, 512, 8, 4), (8, 256, 4, 3),
    (4, 256, 4, 4), (16, 128, 4, 3), (8, 128, 4, 4),
)  # fmt: skip
POINTWISE_ROWS = (32, 128)
FEATURES, LATENT, LOSS_ROWS = 784, 20, 65536
CHECK_ROWS, ODD = 5008, (5003, 1001)
LOSS = (
    Walk(1, 1, 1024, 4, 1), Walk(2, 2, 1024, 4, 1), Walk(4, 4, 1024, 4, 1), Walk(8, 8, 1024, 8, 1),
    Walk(8, 2, 1024, 4, 3),
    Walk(16, 2, 1024, 4, 3), Walk(32, 2, 1024, 4, 3), Walk(16, 2, 1024, 4, 4), Walk(8, 1, 1024, 4, 4),
    Walk(16, 1, 1024, 4, 4), Walk(16, 1, 1024, 4, 6), Walk(16, 4, 1024, 4, 3), Walk(32, 4, 1024, 4, 3),
    Walk(32, 4, 1024, 8, 3), Walk(64, 4, 1024, 8, 3), Walk(64, 8, 1024, 8, 3), Walk(64, 2, 1024, 4, 3),
)  # fmt: skip
#: Rows, inner width and features of the last layer with its error; its tiles, and whether x is loaded early.
LAST = (65536, 512, 2048)
LAST_TILES = (
    (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (64, 256, 64, 8, 3), (64, 128, 64, 4, 4),
    (128, 128, 64, 8, 4), (256, 128, 64, 8, 3),
)  # fmt: skip
LAST_EARLY = LAST_TILES[:3]
AT_ONCE = (2048, 4096, 8192, 16384, 65536)
#: Passes, and how many tensors each reads and writes.
PASSES = {
    "norm_activation": 2,
    "norm_activation_backward": 3,
    "norm_backward + skip": 4,
    "column_moments": 1,
    "moments + residual": 3,
    "sums and h": 3,
    "norm_backward from grad": 3,
}
NEW = ("sums and h", "norm_backward from grad")
POINTWISE_PASSES = ("norm_activation", "norm_backward + skip", "norm_backward from grad")


def variants(name: str, width: int) -> list[Walk]:
    """The tiles that are tried for a pass."""
    pointwise = name in POINTWISE_PASSES
    found = []
    for m, n, warps, stages in POINTWISE if pointwise else REDUCED:
        if n > width or (n < 256 and width > 256):
            continue
        rows: tuple[int, ...] = (POINTWISE_ROWS if stages > 1 else (m,)) if pointwise else REDUCED_ROWS
        if name == "sums and h":  # much like norm_activation_backward
            rows = (64,)
        found += [Walk(r, m, n, warps, stages) for r in rows]
    return found


class Work:
    """Tensors of a shape, and the passes over them by name."""

    def __init__(self, rows: int, width: int) -> None:
        torch.manual_seed(rows + width)
        self.rows, self.width = rows, width
        self.x, self.g, self.skip, self.out = (torch.randn(rows, width, device=DEVICE).bfloat16() for _ in range(4))
        self.norm = torch.rand(5, width, device=DEVICE) + 0.5
        self.norm_grad = self.norm[[0, 3, 1, 2]]  # mean and scale are the norm's

    def bytes(self, name: str) -> int:
        return PASSES[name] * self.rows * self.width * 2

    def run(self, name: str, config: Walk | None = None, old: bool = False) -> Any:
        module, moments = (old_norm_activation, old_batch_norm) if old else (norm_activation, batch_norm)
        extra: dict[str, Any] = {} if old else {"config": config}
        if name == "norm_activation":
            return module.norm_activation(self.x, self.norm, out=self.out, **ACT, **extra)
        if name == "norm_activation_backward":
            return module.norm_activation_backward(self.g, self.x, self.norm, **ACT, **extra)
        if name == "norm_backward + skip":
            return module.norm_backward(self.g, self.x, self.norm[:4], skip_grad=self.skip, out=self.out, **extra)
        if name == "sums and h":
            return norm_activation.activation_sums(self.g, self.x, self.norm, h=self.out, **ACT, **extra)
        if name == "norm_backward from grad":
            return norm_activation.norm_backward(
                self.g, self.x, self.norm_grad, norm=self.norm, out=self.out, **ACT, **extra
            )
        if name == "column_moments":
            return moments.column_moments(self.x, **extra)
        return moments.column_moments(self.x, self.skip, self.out, **extra)

    @functools.cached_property
    def exact(self) -> dict[str, Tensor]:
        """What the pointwise passes should give, in fp64."""
        x, g, skip, norm = (t.double() for t in (self.x, self.g, self.skip, self.norm))
        mean, rstd, _, scale, shift = norm
        a = (x - mean) * scale + shift
        d = torch.where(a > 0, g, 0.01 * g)
        rounded = d.bfloat16().double()
        return {
            "h": torch.where(a > 0, a, 0.01 * a),
            "d": d,
            "sums": torch.stack([rounded.sum(0), (rounded * (x - mean) * rstd).sum(0)]),
            "grad_x": norm[1] * g - norm[2] - (x - mean) * norm[3] + skip,
        }

    def check(self, name: str, config: Walk | None) -> str:
        """Empty, or what is wrong."""
        self.out.fill_(float("nan"))
        found = self.run(name, config)
        exact = self.exact
        wrong = []

        def close(what: str, ours: Tensor, expected: Tensor, bound: float) -> None:
            error = float((ours.double() - expected).abs().max() / expected.abs().max())
            if not error <= bound:
                wrong.append(f"{what} {error:.1e}")

        if name == "norm_activation":
            close("h", found, exact["h"], 2**-7)
        elif name == "norm_activation_backward":
            d, sums = found
            close("d", d, exact["d"], 2**-7)
            close("sums", sums.sum(1), exact["sums"], 1e-3)
        elif name == "sums and h":
            close("h", self.out, exact["h"], 2**-7)
            close("sums", found.sum(1), exact["sums"], 1e-3)
        elif name == "norm_backward from grad":
            norm, x = self.norm.double(), self.x.double()
            expected = norm[3] * exact["d"] - norm[1] - (x - norm[0]) * norm[2]
            close("grad_x", found, expected, 2**-7)
        elif name == "norm_backward + skip":
            close("grad_x", found, exact["grad_x"], 2**-7)
        else:
            source = self.x.double()
            if name == "moments + residual":
                close("y", self.out, self.x.double() + self.skip.double(), 2**-7)
                source = self.out.double()
            norm = batch_norm.merge_moments(*found, self.rows, None, None, 1e-5)
            close("mean", norm[0], source.mean(0), 1e-5)
            close("variance", norm[2], source.var(0), 1e-5)
        return ", ".join(wrong)


class Loss:
    """Sets of inputs of the loss, larger together than a cache."""

    def __init__(self, rows: int, sets: int) -> None:
        torch.manual_seed(rows)
        self.rows = rows
        self.sets = [
            [
                *(torch.rand(rows, FEATURES, device=DEVICE).bfloat16() for _ in range(2)),
                *(torch.randn(rows, LATENT, device=DEVICE).bfloat16() for _ in range(2)),
            ]
            for _ in range(sets)
        ]
        self.grads = torch.rand(2, rows, device=DEVICE)
        self.turn = 0

    def run(self, backward: bool, config: Walk | None = None, old: bool = False, likelihood: str = "squared") -> Any:
        module = old_loss if old else reconstruction_kld
        extra: dict[str, Any] = {} if old else {"config": config}
        inputs = self.sets[self.turn % len(self.sets)]
        self.turn += 1
        if backward:
            needs = [False, True, True, True, False]
            return module.backward(*self.grads, *inputs, None, likelihood, "sum", needs, **extra)
        return module.forward(*inputs, None, likelihood, "sum", **extra)

    def bytes(self, backward: bool) -> int:
        per_row = (3 * FEATURES + 4 * LATENT) * 2 + 8 if backward else (2 * FEATURES + 2 * LATENT) * 2 + 8
        return self.rows * per_row

    def check(self, backward: bool, config: Walk | None) -> str:
        wrong = []
        for likelihood in reference.LIKELIHOODS if config is None else ("squared",):
            self.turn = 0
            found = self.run(backward, config, likelihood=likelihood)
            wide = [t.double() for t in self.sets[0]]
            if backward:
                needs = [False, True, True, True, False]
                grads = self.grads.double()
                exact = reference.reconstruction_kld_backward(*grads, *wide, None, likelihood, "sum", needs)
            else:
                exact = reference.reconstruction_kld(*wide, None, likelihood, "sum")
            for i, (ours, expected) in enumerate(zip(found, exact, strict=True)):
                error = float((ours.double() - expected).abs().max() / expected.abs().max())
                if not error <= (2**-7 if backward else 1e-5):
                    wrong.append(f"{likelihood} {i}: {error:.1e}")
        return ", ".join(wrong)


class LastLayer:
    """The last layer with its error."""

    def __init__(self, rows: int) -> None:
        torch.manual_seed(rows)
        _, inner, features = LAST
        self.h, self.x = (torch.randn(rows, n, device=DEVICE).bfloat16() for n in (inner, features))
        self.weight = (torch.randn(features, inner, device=DEVICE) / inner**0.5).bfloat16()
        self.bias = torch.randn(features, device=DEVICE).bfloat16()
        self.inputs = (self.h, self.weight, self.bias, self.x, None, "squared", "sum")

    def own(self, tile: tuple[int, ...] | None = None, early: bool = False) -> Tensor:
        config = None if tile is None else TileConfig(*tile)
        return decoder_error.decoder_error(*self.inputs, config=config, early=early)

    def by_product(self, at_once: int) -> Tensor:
        return decoder_error.product_error(*self.inputs, rows_at_once=at_once)

    def wrong(self, error: Tensor) -> float:
        """Largest relative error."""
        tensors = [t.double() for t in (self.h, self.weight, self.bias, self.x)]
        exact = reference.decoder_error(*tensors)
        return float(((error.double() - exact) / exact).abs().max())


def seconds(function: Callable[[], Any], launches: int = 9, replays: int = 5) -> float:
    """Median seconds of a call."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            function()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / launches)
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes a second of a large copy, read and written."""
    large, other = (torch.empty(1 << 28, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 4 * large.numel() / seconds(lambda: other.copy_(large), launches=4)


def host(function: Callable[[], Any], calls: int = 200) -> float:
    """Median seconds in which the host returns from a call, of five rounds."""
    rounds = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            function()
        rounds.append((time.perf_counter() - began) / calls)
    torch.cuda.synchronize()
    return statistics.median(rounds)


def compile_share(share: int, of: int) -> None:
    """Run each kernel once at a small size that is compiled as the large ones are."""
    work = {width: Work(2048, width) for width in (128, 512, 2048)}
    odd = Work(*ODD)
    jobs: list[Callable[[], Any]] = []
    seen = set()
    for width, w in work.items():
        for name in PASSES:
            for config in variants(name, width):
                if (name, config) not in seen:
                    seen.add((name, config))
                    jobs.append(functools.partial(w.run, name, config))
    for name in PASSES:
        for rows, width in SHAPES:
            own = passes.walk(name_of_walk(name), rows, width)
            if (name, own) not in seen:
                seen.add((name, own))
                jobs.append(functools.partial(work[128 if width == 128 else 512].run, name, own))
        if name not in NEW:
            jobs.append(functools.partial(work[512].run, name, None, True))
        jobs.append(functools.partial(odd.run, name))
    loss = Loss(2048, 1)
    for backward in (False, True):
        for config in {*LOSS, reconstruction_kld.loss_walk(LOSS_ROWS, FEATURES)}:
            jobs.append(functools.partial(loss.run, backward, config))
        jobs.append(functools.partial(loss.run, backward, None, True))
        for likelihood in ("bernoulli", "absolute"):
            jobs.append(functools.partial(loss.run, backward, None, False, likelihood))
    last = LastLayer(2048)
    jobs += [functools.partial(last.own, tile, False) for tile in LAST_TILES]
    jobs += [functools.partial(last.own, tile, True) for tile in LAST_EARLY]
    jobs.append(functools.partial(last.by_product, 2048))
    for job in jobs[share::of]:
        try:
            job()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{job.args}: {type(error).__name__}: {str(error)[:200]}", flush=True)


def name_of_walk(name: str) -> str:
    found = {"norm_backward + skip": "norm_backward", "norm_backward from grad": "norm_backward"}
    return {**found, "sums and h": "norm_activation_backward"}.get(name, name)


def label(config: Walk | None) -> str:
    return "own" if config is None else "/".join(str(v) for v in config)


class Report:
    def __init__(self, out: Path, rate: float) -> None:
        self.out, self.rate = out, rate
        self.record: dict[str, Any] = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy": rate, "results": []
        }  # fmt: skip

    def add(self, where: str, bytes_moved: int, times: dict[str, float | str], show: int = 5) -> None:
        self.record["results"].append({"where": where, "bytes": bytes_moved, "seconds": times})
        self.out.write_text(json.dumps(self.record))
        floor = bytes_moved / self.rate
        numbers = {k: v for k, v in times.items() if isinstance(v, float)}
        first = [k for k in ("old", "own") if k in numbers]
        best = sorted((k for k in numbers if k not in first), key=numbers.__getitem__)[:show]
        text = "; ".join(f"{k} {numbers[k] * 1e6:.1f} ({floor / numbers[k]:.0%})" for k in first + best)
        failed = [f"{k}: {v}" for k, v in times.items() if isinstance(v, str)]
        print(f"{where} [floor {floor * 1e6:.1f}]: {text}" + (f" FAILED {failed[:3]}" if failed else ""), flush=True)


def timed(function: Callable[[], Any]) -> float | str:
    try:
        return seconds(function)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"


def check_all() -> dict[str, str]:
    """What gives wrong values, by pass and tiles."""
    wrong = {}
    # Sizes that are compiled as the large ones; and, for what a launcher chooses, others.
    for rows, width in ((CHECK_ROWS, 512), (CHECK_ROWS, 128), ODD):
        work = Work(rows, width)
        for name in PASSES:
            for config in [None, *(variants(name, width) if rows == CHECK_ROWS else [])]:
                try:
                    found = work.check(name, config)
                except Exception as error:
                    found = f"{type(error).__name__}: {str(error)[:100]}"
                if found:
                    wrong[f"{name} {width} {label(config)}"] = found
    loss = Loss(CHECK_ROWS, 1)
    for backward in (False, True):
        for config in [None, *LOSS]:
            try:
                found = loss.check(backward, config)
            except Exception as error:
                found = f"{type(error).__name__}: {str(error)[:100]}"
            if found:
                wrong[f"loss {'backward' if backward else 'forward'} {label(config)}"] = found
    return wrong


def time_passes(report: Report, shape: Sequence[int], late: Callable[[], bool]) -> None:
    rows, width = shape
    work = Work(rows, width)
    for name in PASSES:
        times: dict[str, float | str] = {}
        if name not in NEW:
            times["old"] = timed(lambda name=name: work.run(name, old=True))
        times["own"] = timed(lambda name=name: work.run(name))
        for config in variants(name, width) if rows > 1024 else []:
            if late():
                break
            times[label(config)] = timed(lambda name=name, config=config: work.run(name, config))
        report.add(f"{name} {rows}x{width}", work.bytes(name), times)
    merges: dict[str, float | str] = {}
    moments, sums = work.run("column_moments"), work.run("norm_activation_backward")[1]
    old_moments, old_sums = work.run("column_moments", old=True), work.run("norm_activation_backward", old=True)[1]
    merges["moments own"] = timed(lambda: batch_norm.merge_moments(*moments, rows, None, None, 1e-5))
    merges["moments old"] = timed(lambda: old_batch_norm.merge_moments(*old_moments, rows, None, None, 1e-5))
    merges["gradients own"] = timed(lambda: batch_norm.merge_gradients(sums, work.norm, rows, True))
    merges["gradients old"] = timed(lambda: old_batch_norm.merge_gradients(old_sums, work.norm, rows, True))
    merges["copy"] = timed(lambda: work.out.copy_(work.x))
    report.add(f"merges {rows}x{width}", 2 * work.x.numel() * 2, merges)


def time_loss(report: Report, late: Callable[[], bool]) -> None:
    loss = Loss(LOSS_ROWS, 3)
    for backward in (False, True):
        times: dict[str, float | str] = {"old": timed(lambda backward=backward: loss.run(backward, old=True))}
        times["own"] = timed(lambda backward=backward: loss.run(backward))
        for config in LOSS:
            if late():
                break
            times[label(config)] = timed(lambda backward=backward, config=config: loss.run(backward, config))
        report.add(f"loss {'backward' if backward else 'forward'}", loss.bytes(backward), times)
        bernoulli = timed(lambda backward=backward: loss.run(backward, likelihood="bernoulli"))
        report.add(f"bernoulli {'backward' if backward else 'forward'}", loss.bytes(backward), {"own": bernoulli})


def time_last_layer(report: Report, late: Callable[[], bool]) -> None:
    small = LastLayer(4096)
    wrong = {"own": small.wrong(small.own()), "early": small.wrong(small.own(LAST_TILES[0], True))}
    wrong["product"] = small.wrong(small.by_product(2048))
    report.record["last layer, relative error"] = wrong
    print("last layer, relative error: " + ", ".join(f"{k} {v:.1e}" for k, v in wrong.items()), flush=True)
    last = LastLayer(LAST[0])
    times: dict[str, float | str] = {"own": timed(last.own)}
    for rows in AT_ONCE:
        times[f"product of {rows}"] = timed(lambda rows=rows: last.by_product(rows))
    for early, tiles in ((False, LAST_TILES), (True, LAST_EARLY)):
        for tile in tiles:
            if late():
                break
            text = "/".join(str(v) for v in tile) + (" early" if early else "")
            times[text] = timed(lambda tile=tile, early=early: last.own(tile, early))
    rows, inner, features = LAST
    report.add("last layer", 2 * (rows * inner + inner * features + rows * features) + 4 * rows, times, show=9)
    whole = torch.empty(rows, features, device=DEVICE, dtype=torch.bfloat16)
    product = timed(lambda: torch.addmm(last.bias, last.h, last.weight.t(), out=whole))
    report.add("its product alone", 2 * whole.numel(), {"cublas": product})


def time_weight_gradient(report: Report) -> None:
    """The library's product written in half precision and copied, or in fp32 at once."""
    for rows, width in SHAPES[:4]:
        work = Work(rows, width)
        total = torch.empty(width, width, device=DEVICE)
        half = torch.empty_like(total, dtype=torch.bfloat16)

        def before(work: Work = work, half: Tensor = half, total: Tensor = total) -> None:
            torch.mm(work.g.t(), work.x, out=half)
            total.copy_(half)

        times = {
            "product and copy": timed(before),
            "plain_weight_gradient": timed(
                lambda work=work, total=total: plain_layer.plain_weight_gradient(work.g, work.x, out=total)
            ),
        }
        exact = work.g.float().t() @ work.x.float()
        found = plain_layer.plain_weight_gradient(work.g, work.x)
        off = float((found - exact).abs().max() / exact.abs().max())
        report.add(f"weight gradient {rows}x{width} off {off:.1e}", 4 * rows * width, times)


def time_host(report: Report) -> None:
    """Where the time of the host goes in an eager call of the loss."""
    from rvae_fast.ops.reconstruction_kld import reconstruction_kld as function

    loss = Loss(256, 1)
    x, x_hat, mu, logvar = loss.sets[0]
    leaves = [t.clone().requires_grad_() for t in (x_hat, mu, logvar)]
    ones = torch.ones(256, device=DEVICE)

    def both() -> None:
        error, kld = function(x, *leaves)
        torch.autograd.grad((error, kld), leaves, (ones, ones))

    def summed() -> None:
        error, kld = function(x, *leaves)
        torch.autograd.grad((error + kld).mean(), leaves)

    def accumulated() -> None:
        error, kld = function(x, *leaves)
        (error + kld).mean().backward()

    times: dict[str, float | str] = {}
    for what, run in {
        "forward": lambda: function(x, x_hat, mu, logvar),
        "forward, graph": lambda: function(x, *leaves),
        "forward+backward": both,
        "with mean": summed,
        "with .backward()": accumulated,
        "kernels.forward": lambda: loss.run(False),
        "kernels.backward": lambda: loss.run(True),
        "old kernels.forward": lambda: loss.run(False, old=True),
        "old kernels.backward": lambda: loss.run(True, old=True),
        "three empties": lambda: [torch.empty_like(t) for t in leaves],
    }.items():
        run()
        times[what] = host(run)
    report.record["host"] = times
    print("host, us: " + ", ".join(f"{k} {v * 1e6:.0f}" for k, v in times.items() if isinstance(v, float)), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bandwidth.json"))
    parser.add_argument("--seconds", type=float, default=50.0, help="when to stop")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 14))
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.share is not None:
        compile_share(arguments.share, arguments.processes)
        return 0
    began = time.monotonic()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--processes", str(arguments.processes), "--share"]
    compilers = [subprocess.Popen([*command, str(i)]) for i in range(arguments.processes)]
    for process in compilers:
        try:
            process.wait(timeout=max(0.1, began + 0.6 * arguments.seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    report = Report(arguments.out, copy_rate())
    torch.cuda.empty_cache()
    print(f"{report.record['device']}, torch {torch.__version__}; copy {report.rate / 1e12:.2f} TB/s", flush=True)

    def late() -> bool:
        return time.monotonic() - began > arguments.seconds

    def values() -> None:
        report.record["wrong"] = wrong = check_all()
        print(
            f"values: {len(wrong)} wrong {dict(list(wrong.items())[:6])} at {time.monotonic() - began:.0f} s",
            flush=True,
        )

    parts: list[Callable[[], None]] = [
        lambda: time_passes(report, SHAPES[0], late), lambda: time_loss(report, late), values,
        lambda: time_host(report), lambda: time_last_layer(report, late), lambda: time_weight_gradient(report),
        *(lambda s=s: time_passes(report, s, late) for s in SHAPES[1:]),
    ]  # fmt: skip
    for part in parts:
        try:
            part()
        except Exception:
            print(traceback.format_exc()[-600:], flush=True)
    report.record["took"] = time.monotonic() - began
    arguments.out.write_text(json.dumps(report.record))
    print(f"took {report.record['took']:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
