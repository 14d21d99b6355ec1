"""Check and time the CUDA C++ layer kernels of ``kernels/hopper`` on a Hopper GPU, in about a minute.

``python benchmarks/hopper_check.py`` runs every step in a process of its own with a time limit, so that an illegal
access or a deadlock in one leaves the others alone; the correctness steps side by side, then the timings one by one.
``--compile`` only compiles what the steps need (no GPU), into ``build/hopper`` where later runs find it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("RVAE_FAST_HOPPER_CACHE", str(ROOT / "build" / "hopper"))

import torch  # noqa: E402

from rvae_fast.kernels import hopper  # noqa: E402
from rvae_fast.kernels.hopper import build  # noqa: E402
from rvae_fast.kernels.tuning import time_on_gpu  # noqa: E402

DEVICE = torch.device("cuda", 0)
CHECKED = ("-DHOPPER_CHECK",)
#: What the correctness steps run: (rows, sum, columns), activation.
SHAPES = (
    ((128, 128, 128), "identity"), ((1, 128, 128), "relu"), ((37, 256, 256), "leaky_relu"),
    ((999, 128, 128), "silu"), ((999, 512, 512), "leaky_relu"), ((4096, 256, 256), "silu"),
    ((4096, 512, 512), "relu"), ((4096, 384, 384), "gelu"), ((40001, 512, 512), "elu"),
    ((40000, 128, 128), "tanh"), ((40001, 256, 256), "leaky_relu"), ((300, 256, 512), "relu"),
    ((8100, 512, 512), "leaky_relu"), ((9001, 256, 512), "relu"),
)  # fmt: skip
TIMED = ((65536, 512), (65536, 256), (65536, 128), (8192, 512), (1024, 512))
#: Variants that are timed: CTAs of a cluster and further options.
VARIANTS: dict[str, tuple[tuple[int, tuple[str, ...]], ...]] = {
    "forward": ((2, ()), (1, ()), (2, ("-DNO_PREFETCH",)), (2, ("-DEARLY_EXTRA=0",))),
    "dgrad": ((2, ()), (1, ()), (2, ("-DNO_PREFETCH",)), (2, ("-DPIECE=2",))),
}


def say(*text: Any) -> None:
    print(*text, flush=True)


# --- what is computed, by PyTorch -------------------------------------------------------------------------------------


def activation(a: torch.Tensor, name: str) -> torch.Tensor:
    f = torch.nn.functional
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "identity": lambda v: v, "relu": f.relu, "leaky_relu": f.leaky_relu, "elu": f.elu, "silu": f.silu,
        "gelu": f.gelu, "tanh": torch.tanh,
    }  # fmt: skip
    return functions[name](a)


def random_norm(width: int) -> torch.Tensor:
    norm = torch.randn(5, width, device=DEVICE)
    norm[1] = norm[1].abs() + 0.5
    norm[3] = norm[3] * 0.3 + 1
    return norm


def forward_case(rows: int, inner: int, width: int) -> dict[str, Any]:
    torch.manual_seed(rows + inner)
    return {
        "x": torch.randn(rows, inner, device=DEVICE).bfloat16(),
        "weight": (torch.randn(width, inner, device=DEVICE) / inner**0.5).bfloat16(),
        "bias": torch.randn(width, device=DEVICE),
        "norm": random_norm(inner),
        "residual": torch.randn(rows, width, device=DEVICE).bfloat16(),
    }


def forward_reference(case: dict[str, Any], act: str) -> tuple[torch.Tensor, torch.Tensor]:
    """y before it is rounded, in fp64, and the size of the sum's terms."""
    norm = case["norm"]
    h = activation((case["x"].float() - norm[0]) * norm[3] + norm[4], act).bfloat16().double()
    y = h @ case["weight"].double().t()
    size = h.abs() @ case["weight"].double().abs().t()
    for name in ("bias", "residual"):
        if case[name] is not None:
            y = y + case[name].double()
    return y, size


def backward_case(rows: int, inner: int, width: int) -> dict[str, Any]:
    torch.manual_seed(rows + inner + 1)
    like = [torch.randn(rows, width, device=DEVICE).bfloat16() for _ in range(3)]
    norm_grad = torch.randn(4, width, device=DEVICE)
    return {
        "g": like[0], "y": like[1], "skip_grad": like[2], "norm_grad": norm_grad,
        "weight": (torch.randn(width, inner, device=DEVICE) / width**0.5).bfloat16(),
        "x": torch.randn(rows, inner, device=DEVICE).bfloat16(), "norm": random_norm(inner),
    }  # fmt: skip


def backward_reference(case: dict[str, Any], act: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_y in fp32, d before it is rounded, and the size of its sum's terms."""
    if case["y"] is None:
        grad_y = case["g"].float()
    else:
        mean, scale, b, c = case["norm_grad"]
        grad_y = scale * case["g"].float() - b - (case["y"].float() - mean) * c
        if case["skip_grad"] is not None:
            grad_y = grad_y + case["skip_grad"].float()
    used = grad_y.bfloat16().double()
    p = used @ case["weight"].double()
    norm = case["norm"].double()
    a = ((case["x"].double() - norm[0]) * norm[3] + norm[4]).requires_grad_()
    slope = torch.autograd.grad(activation(a, act).sum(), a)[0]
    size = (used.abs() @ case["weight"].double().abs()) * slope.abs()
    return grad_y, p * slope, torch.where(a.abs() < 1e-5, p.abs() * 2**10, size)  # beside a kink either slope may do


def off(got: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor | float, unit: float = 2**-8) -> str:
    """Largest error against what rounding allows (1 is the limit), and where."""
    error = (got.double() - wanted.double()).abs() / ((wanted.double().abs() + size * 0.5) * unit + 1e-6)
    error = torch.where(error.isnan(), torch.full_like(error, 1e9), error)
    worst = int(error.argmax())
    width = got.shape[-1]
    bad = (error > 1).flatten().nonzero().flatten()
    text = f"{float(error.max()):.3g}"
    if len(bad):
        at = [(int(i) // width, int(i) % width) for i in bad[:4]]
        value = (float(got.flatten()[worst]), float(wanted.flatten()[worst]))
        text += f" WRONG {len(bad)} of {error.numel()}, first at {at}, worst {divmod(worst, width)}: {value}"
    return text


def tile_moments(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parts = y.double().split(hopper.BLOCK_M)
    return (
        torch.stack([p.mean(0) for p in parts]),
        torch.stack([(p - p.mean(0)).square().sum(0) for p in parts]),
    )


# --- steps ------------------------------------------------------------------------------------------------------------


def packing(row: torch.Tensor) -> torch.Tensor:
    """Column of the result at position ``row`` of a packed block."""
    return (row & ~31) + 8 * ((row >> 1) & 3) + 2 * ((row >> 3) & 3) + (row & 1)


def packed_reference(weight: torch.Tensor) -> torch.Tensor:
    """``pack_weight`` by indexing, for ``weight[columns, sum]``."""
    columns, total = weight.shape
    row, piece = torch.arange(128), torch.arange(8)
    blocks = []
    for panel in range(columns // 128):
        for kc in range(total // 64):
            block = weight[panel * 128 :][packing(row)][:, kc * 64 : kc * 64 + 64].reshape(128, 8, 8)
            swizzled = torch.empty_like(block)
            swizzled[row[:, None], piece[None, :] ^ (row[:, None] & 7)] = block
            blocks.append(swizzled.flatten())
    return torch.cat(blocks)


def step_probe() -> None:
    """Packing, bulk copies, multicast, descriptors: with small whole numbers every product is exact."""
    weight = torch.randint(-4, 5, (2, 256, 128), device=DEVICE).float()
    for transpose in (False, True):
        got = hopper.pack_weight(weight, transpose).cpu()
        wanted = [packed_reference((w.t() if transpose else w).contiguous().bfloat16().cpu()) for w in weight]
        say(
            "probe: packing",
            "transposed" if transpose else "",
            "right" if torch.equal(got, torch.stack(wanted)) else "WRONG",
        )
    block = torch.randint(-4, 5, (128, 128), device=DEVICE).bfloat16()
    a = torch.randint(-4, 5, (64, 64), device=DEVICE).bfloat16()
    packed = hopper.pack_weight(block)
    wanted = (a.float() @ block[:, :64].float().t())[:, packing(torch.arange(128)).to(DEVICE)]
    # The upper half of the descriptors: as built, and others that are tried if that is wrong.
    kinds = (("as built", 64, 1, 1), ("LBO 0", 64, 0, 1), ("SBO 1", 1, 64, 1), ("SBO 128", 128, 1, 1), ("32", 64, 1, 2))
    for cluster in (1, 2):
        define = ("-DPROBE", *hopper.defines(0, "identity", 128, 128, cluster))
        run = build.kernel("layer.cu", "probe", define, 6 * hopper.BLOCK, 0)
        for name, sbo, lbo, layout in kinds:
            out = torch.full((64, 128), -999.0, device=DEVICE)
            copied = torch.zeros(cluster, 8192, device=DEVICE, dtype=torch.bfloat16)
            pointers = (ctypes.c_void_p(t.data_ptr()) for t in (a, packed, out, copied))
            run((cluster, 1), 128, *pointers, ctypes.c_ulonglong((layout << 62) | (sbo << 32) | (lbo << 16)))
            torch.cuda.synchronize()
            right = [torch.equal(c, packed[:8192]) for c in copied]
            wrong = int((out != wanted).sum())
            say(f"probe: cluster {cluster}, {name}: copies {right}, {wrong} products of 8192 wrong")
            if not wrong:
                break
            if name == "as built":
                say("  got     ", out[0, :12].tolist(), out[8, :4].tolist())
                say("  expected", wanted[0, :12].tolist(), wanted[8, :4].tolist())


def step_forward(cluster: int) -> None:
    for shape, act in SHAPES:
        began = time.monotonic()
        case = forward_case(*shape)
        if act == "gelu":
            case["bias"] = None
        if act == "silu":
            case["residual"] = None
        weight = case.pop("weight")
        y, moments = hopper.hopper_forward(**case, weight=weight, activation=act, cluster=cluster, extra=CHECKED)
        torch.cuda.synchronize()
        wanted, size = forward_reference({**case, "weight": weight}, act)
        text = [off(y, wanted, size)]
        for got, exact in zip(moments[:2], tile_moments(y), strict=True):
            text.append(off(got, exact, 1.0, 2e-5))
        again = hopper.hopper_forward(**case, weight=weight, activation=act, cluster=cluster, extra=CHECKED)
        same = torch.equal(again[0], y) and torch.equal(again[1][1], moments[1])
        say(f"forward cl{cluster} {shape} {act}: y {text[0]}; mean {text[1]}; m2 {text[2]}; repeats {same}"
            f" ({time.monotonic() - began:.1f} s)")  # fmt: skip


def step_dgrad(cluster: int) -> None:
    for shape, act in SHAPES:
        case = backward_case(*shape)
        if act == "gelu":
            case["skip_grad"] = None
        if act == "tanh":
            case["y"] = case["norm_grad"] = case["skip_grad"] = None
        d, grad_y, sums = hopper.hopper_dgrad(**case, activation=act, cluster=cluster, extra=CHECKED)
        torch.cuda.synchronize()
        wanted_y, wanted, size = backward_reference(case, act)
        parts = zip(d.double().split(128), case["x"].double().split(128), strict=True)
        norm = case["norm"].double()
        exact = torch.stack([torch.stack([p.sum(0), (p * (x - norm[0]) * norm[1]).sum(0)]) for p, x in parts], 1)
        text = [off(grad_y, wanted_y, 0.05), off(d, wanted, size), off(sums, exact, 20.0, 2e-5)]
        say(f"dgrad cl{cluster} {shape} {act}: grad_y {text[0]}; d {text[1]}; sums {text[2]}")


def time_shape(kernel: str, rows: int, width: int) -> None:
    # Launches of a graph work on several sets of tensors, as the layers of a stack do.
    cases = [(forward_case if kernel == "forward" else backward_case)(rows, width, width) for _ in range(3)]
    weight, source = cases[0]["weight"], cases[0]["x"]
    packed = hopper.pack_weight(weight, kernel == "dgrad")
    function: Callable[..., Any] = hopper.hopper_forward if kernel == "forward" else hopper.hopper_dgrad
    optional = "residual" if kernel == "forward" else "skip_grad"
    turn = [0]

    def run(**changes: Any) -> None:
        turn[0] = (turn[0] + 1) % len(cases)
        function(**{**cases[turn[0]], "activation": "leaky_relu", "packed": packed, **changes})

    text = []
    try:
        for i, (cluster, extra) in enumerate(VARIANTS[kernel]):
            options: dict[str, Any] = {"cluster": cluster, "extra": extra}
            name = f"cluster {cluster}" + "".join(e.replace("-D", " ") for e in extra)
            text.append(f"{name} {time_on_gpu(lambda o=options: run(**o)) * 1e6:.1f}")
            bare = options | {optional: None}
            text.append(f"no {optional} {time_on_gpu(lambda o=bare: run(**o)) * 1e6:.1f}")
            if i == 0 and kernel == "forward":
                bare["moments"] = False
                text.append(f"no moments either {time_on_gpu(lambda o=bare: run(**o)) * 1e6:.1f}")
        out, bias = torch.empty_like(source), torch.zeros(width, device=DEVICE, dtype=torch.bfloat16)
        text.append(f"addmm {time_on_gpu(lambda: torch.addmm(bias, source, weight.t(), out=out)) * 1e6:.1f}")
        text.append(f"pack {time_on_gpu(lambda: hopper.pack_weight(weight, kernel == 'dgrad', packed)) * 1e6:.1f}")
        text.append(f"copy {time_on_gpu(lambda: out.copy_(source)) * 1e6:.1f}")
    finally:
        say(f"time {kernel} {rows}x{width}, us: " + "; ".join(text))


def step_time(kernel: str) -> None:
    for rows, width in TIMED:
        time_shape(kernel, rows, width)


#: What is left out to see what the rest takes: see WITHOUT in layer.cu.
PARTS = {
    "products": 1,
    "inputs": 2,
    "inputs, prologue": 6,
    "epilogue": 8,
    "weights": 16,
    "products, weights": 17,
    "all but inputs": 29,
}


def step_parts(kernel: str) -> None:
    rows, width = TIMED[0]
    case = (forward_case if kernel == "forward" else backward_case)(rows, width, width)
    packed = hopper.pack_weight(case["weight"], kernel == "dgrad")
    function: Callable[..., Any] = hopper.hopper_forward if kernel == "forward" else hopper.hopper_dgrad
    text = []
    for name, without in PARTS.items():
        options = (f"-DWITHOUT={without}",)
        took = time_on_gpu(lambda o=options: function(**case, activation="leaky_relu", packed=packed, extra=o))
        text.append(f"{name} {took * 1e6:.1f}")
    say(f"time {kernel} {rows}x{width} without, us: " + "; ".join(text))


def step_nvrtc() -> None:
    began = time.monotonic()
    binary = build.compiled("layer.cu", hopper.defines(0, "relu", 256, 256, 2), compiler="nvrtc")
    say(f"nvrtc: {len(binary)} bytes in {time.monotonic() - began:.1f} s")


STEPS: dict[str, Callable[[], None]] = {
    "probe": step_probe,
    "forward1": lambda: step_forward(1),
    "forward2": lambda: step_forward(2),
    "dgrad1": lambda: step_dgrad(1),
    "dgrad2": lambda: step_dgrad(2),
    "nvrtc": step_nvrtc,
    "time-forward": lambda: step_time("forward"),
    "time-dgrad": lambda: step_time("dgrad"),
    "time-parts-forward": lambda: step_parts("forward"),
    "time-parts-dgrad": lambda: step_parts("dgrad"),
}


def split_of(rows: int, width: int) -> int:
    return hopper.split_of(rows, width, 132)


def compile_all() -> None:
    began = time.monotonic()
    wanted: set[tuple[str, tuple[str, ...]]] = {("pack.cu", ())}
    for cluster in (1, 2):
        wanted.add(("layer.cu", ("-DPROBE", *hopper.defines(0, "identity", 128, 128, cluster))))
    for mode in (0, 1):
        for (rows, inner, width), act in SHAPES:
            sizes = (inner, width) if mode == 0 else (width, inner)
            for cluster in (1, 2):
                options = hopper.defines(mode, act, *sizes, cluster, split_of(rows, sizes[1]), CHECKED)
                wanted.add(("layer.cu", options))
        for rows, width in TIMED:
            for cluster, extra in VARIANTS[("forward", "dgrad")[mode]]:
                split = split_of(rows, width)
                wanted.add(("layer.cu", hopper.defines(mode, "leaky_relu", width, width, cluster, split, extra)))
        for without in PARTS.values():
            rows, width = TIMED[0]
            extra = (f"-DWITHOUT={without}",)
            wanted.add(("layer.cu", hopper.defines(mode, "leaky_relu", width, width, hopper.CLUSTER, 1, extra)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda one: build.compiled(*one), sorted(wanted)))
    say(f"{len(wanted)} kernels after {time.monotonic() - began:.0f} s")


def finish(name: str, process: subprocess.Popen[str], limit: float) -> None:
    try:
        text, _ = process.communicate(timeout=max(0.1, limit))
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        text += f"{name}: ran out of time\n"
    lines = [line[:420] for line in text.splitlines() if line.strip()]
    if process.returncode:  # of a traceback the end
        lines = [line for line in lines if not line.startswith("  ")] + [f"{name}: exit status {process.returncode}"]
    say(f"== {name}\n" + "\n".join(lines[-30:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("--compile", action="store_true", help="only compile")
    parser.add_argument("--only", nargs="*", default=list(STEPS), help="steps to run")
    parser.add_argument("--limit", type=float, default=14.0, help="seconds a step")
    arguments = parser.parse_args()
    if arguments.step:
        STEPS[arguments.step]()
        return 0
    began = time.monotonic()
    compile_all()
    if arguments.compile:
        return 0

    def start(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, __file__, "--step", name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    beside = [name for name in arguments.only if not name.startswith("time")]
    running = {name: start(name) for name in beside}
    started = time.monotonic()
    for name, process in running.items():
        finish(name, process, started + arguments.limit + 8 - time.monotonic())
    for name in arguments.only:
        if name.startswith("time"):
            finish(name, start(name), arguments.limit + 2)
    say(f"{time.monotonic() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
