"""What a kernel compiles to, without a GPU: registers, spills, shared memory and the tensor-core instruction.

Triton compiles for any NVIDIA target on any machine, and brings ptxas and cuobjdump along. The tests hold every
configuration that can be chosen against the limits of its chip; ``python -m rvae_fast.kernels.resources`` prints them.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import configurations
from .batch_norm import (
    MERGE_BLOCK_N,
    _column_moments_kernel,
    _merge_gradients_kernel,
    _merge_moments_kernel,
    _running_norm_kernel,
    merge_steps,
)
from .configurations import TileConfig
from .deferred import block_t
from .layer_backward import _layer_backward_kernel
from .layer_forward import _layer_forward_kernel
from .norm_activation import _norm_activation_backward_kernel, _norm_activation_kernel, _norm_backward_kernel
from .passes import walk
from .weight_gradient import _sum_splits_kernel, _weight_gradient_kernel

#: Shared memory one block may use, in bytes, by compute capability (CUDA C++ Programming Guide).
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

_TENSOR_CORE = (("wgmma.mma_async", "wgmma"), ("tcgen05.mma", "tcgen05"), ("mma.sync", "mma"))


@dataclass(frozen=True)
class Resources:
    """Registers a thread, bytes of stack (where spilled registers go), bytes of shared memory a block."""

    registers: int
    stack: int
    shared: int
    tensor_core: str | None


def compile_kernel(
    kernel: Any, arguments: dict[str, Any], capability: int, *, num_warps: int, num_stages: int
) -> Resources:
    """Compile a ``@triton.jit`` kernel for compute capability ``capability`` (90 is sm_90) and read what it takes.

    Parameters
    ----------
    kernel : triton.JITFunction
    arguments : dict
        For each parameter, by name: a Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``), None for an absent pointer, or
        the value of a ``tl.constexpr`` or of an integer that a launch specialises on. Pointers and i32 are taken to be
        divisible by 16, as launches find them; ``"i32 odd"`` is an i32 that is not.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or isinstance(value, int):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = value.removesuffix(" odd")
            if value == "i32" or value.startswith("*"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")
    ptx = compiled.asm["ptx"]
    tensor_core = next((name for instruction, name in _TENSOR_CORE if instruction in ptx), None)
    return Resources(int(found[1]), int(found[2]), compiled.metadata.shared, tensor_core)


class Case(NamedTuple):
    """A configuration and the variant of the kernel it is compiled as.

    ``wide_stream``: the tensors between units are fp32 beside a half-precision product. ``deferred``: the statistics
    are merged by their consumer. ``one_step``: the sum has one step.
    """

    kernel: str
    arithmetic: str
    capability: int
    config: TileConfig
    order: str
    activation: str
    wide_stream: bool
    deferred: bool = False
    one_step: bool = False


#: (deferred, one_step) that the kernels with statistics are compiled as.
VARIANTS = ((False, False), (False, True), (True, False), (True, True))


def _variants(kernel: str, arithmetic: str, capability: int, thorough: bool) -> Sequence[tuple[bool, bool]]:
    if kernel == "weight":
        return VARIANTS[:1]
    if thorough or (arithmetic == "half" and capability == 90):
        return VARIANTS
    return VARIANTS[::3] if capability == 90 else VARIANTS[:1]


def cases(
    capabilities: Sequence[int], activations: Sequence[str], wide_streams: Sequence[bool], *, thorough: bool = True
) -> list[Case]:
    """Every configuration that can be chosen on these chips, in the variants with the most operands.

    Not ``thorough``, all ways of merging statistics are there in half precision on sm_90 alone.
    """
    merging = [
        Case(kernel, "half", capability, config, order, activation, wide, True, True)
        for kernel in ("forward", "backward")
        for capability, config in configurations.MERGING.items()
        if capability in capabilities
        for order in ("pre", "post")
        for activation in activations
        for wide in wide_streams
    ]
    return merging + [
        Case(kernel, arithmetic, capability, config, order, activation, wide, deferred, one_step)
        for kernel in configurations.KERNELS
        for arithmetic in configurations.ARITHMETICS
        for capability in capabilities
        for config in configurations.candidates(kernel, arithmetic, capability, SHARED_MEMORY_LIMIT[capability])
        for order in (("pre", "post") if kernel != "weight" else ("pre",))
        for activation in activations
        for wide in wide_streams
        for deferred, one_step in _variants(kernel, arithmetic, capability, thorough)
        if arithmetic == "half" or not wide
    ]


def compile_case(case: Case) -> Resources:
    """Compile one :class:`Case`."""
    narrow = "*bf16" if case.arithmetic == "half" else "*fp32"
    stream = "*fp32" if case.wide_stream else narrow
    pre, columns = case.order == "pre", "*fp32"
    arguments: dict[str, Any] = dict.fromkeys(("M", "N", "K", "split_rows"), "i32")
    arguments |= {f"{name}_step": "i32 odd" for name in ("grad_y", "x", "norm", "split", "partial")}
    arguments |= {"slope": "fp32", "norm_ptr": columns, "bias_ptr": columns, "norm_grad_ptr": columns}
    merged = ["in_mean", "in_m2", "gamma", "beta", "running_mean", "running_var"]
    merged += ["in_sums", "grad_gamma", "grad_beta", "skip_sum", "grad_bias"]
    arguments |= {f"{name}_ptr": columns if case.deferred else None for name in merged}
    arguments |= {"in_tiles": "i32 odd", "in_rows": "i32 odd", "eps": "fp32", "momentum": "fp32", "BATCH_STATS": True}
    tiles = configurations.deferred_tiles("fused", case.arithmetic, 1) if case.deferred else 0
    arguments |= {"BLOCK_T": block_t(tiles)}
    arguments |= {"ONE_STEP": case.one_step, "CHAINED": case.capability >= 90}
    arguments |= {"ACTIVATION": case.activation, "PRECISION": "tf32" if case.arithmetic == "tf32" else "ieee"}
    arguments |= {"BLOCK_M": case.config.block_m, "BLOCK_N": case.config.block_n, "BLOCK_K": case.config.block_k}
    arguments |= {
        "GROUP_M": case.config.group_m,
        "weight_ptr": narrow,
        "x_ptr": stream if pre else narrow,
    }
    arguments |= {"skip_ptr": None if pre else stream, "residual_ptr": None}
    if case.kernel == "forward":
        kernel = _layer_forward_kernel
        arguments |= {"h_ptr": None if pre else stream, "residual_ptr": stream if pre else None}
        arguments |= {"y_ptr": stream if pre else narrow, "tile_mean_ptr": columns, "tile_m2_ptr": columns}
    elif case.kernel == "backward":
        kernel = _layer_backward_kernel
        y = stream if pre else narrow
        arguments |= {"g_ptr": narrow, "y_ptr": y, "grad_y_ptr": y, "skip_grad_ptr": stream if pre else None}
        arguments |= {"residual_ptr": None if pre else stream, "d_ptr": narrow if pre else stream}
        arguments |= {"tile_sums_ptr": columns}
    else:
        kernel = _weight_gradient_kernel
        # fp16 stands for both half dtypes: its operand is clamped as well.
        dot_type = tl.float16 if case.arithmetic == "half" else tl.float32
        arguments |= {"grad_y_ptr": stream, "partial_ptr": columns, "DOT_TYPE": dot_type}
        arguments = {name: "*fp16" if value == "*bf16" else value for name, value in arguments.items()}
    arguments = {parameter.name: arguments[parameter.name] for parameter in kernel.params}
    return compile_kernel(
        kernel, arguments, case.capability, num_warps=case.config.num_warps, num_stages=case.config.num_stages
    )


# The kernels without a product: those that walk over whole tensors; the small ones.
_WALKS = {
    "column_moments": _column_moments_kernel,
    "moments + residual": _column_moments_kernel,
    "norm_activation": _norm_activation_kernel,
    "norm_activation_backward": _norm_activation_backward_kernel,
    "norm_backward": _norm_backward_kernel,
}
_MERGES = (_merge_moments_kernel, _merge_gradients_kernel)


def compile_passes(capability: int, columns: int | None = None) -> dict[str, Resources]:
    """Compile every kernel without a product, by name, as many rows take it; ``columns=1`` as launches of that width
    specialise it."""
    size: Any = "i32" if columns is None else columns
    scalars = {"M": "i32", "N": size, "tiles": size, "splits": "i32", "size": size}
    scalars |= {"total_step": "i32 odd"} | dict.fromkeys(("eps", "slope", "momentum"), "fp32")
    constants: dict[str, Any] = {
        "CHAINED": capability >= 90, "ACTIVATION": "gelu", "BATCH_STATS": True, "TILE_ROWS": 64, "BLOCK": 1024,
    }  # fmt: skip
    found: dict[str, Resources] = {}

    def compile_one(name: str, kernel: Any, num_warps: int, pointers: dict[str, Any], **known: Any) -> None:
        # bf16 for the tensor that comes in, fp32 for all that stands beside it.
        names = {p.name: "*bf16" if p.name in ("x_ptr", "grad_ptr") else "*fp32" for p in kernel.params}
        given = {**scalars, **constants, **pointers, **known}
        arguments = {p: given.get(p, pointer) for p, pointer in names.items()}
        found[name] = compile_kernel(kernel, arguments, capability, num_warps=num_warps, num_stages=3)

    for name, kernel in _WALKS.items():
        for element_size in (2, 4):
            config = walk(name, 65536, columns or 512, element_size)
            tensors = ("x_ptr", "skip_ptr", "residual_ptr", "y_ptr", "h_ptr", "grad_ptr", "d_ptr", "skip_grad_ptr")
            pointers = dict.fromkeys((*tensors, "grad_x_ptr"), "*bf16") if element_size == 2 else {}
            compile_one(
                f"{name}, {8 * element_size} bits", kernel, config.num_warps, pointers, **config.constants
            )  # fmt: skip
    for kernel in _MERGES:
        for tiles in (1, 512, 1024):
            block_t, num_warps = merge_steps(tiles)
            name = f"{kernel.__name__}, {tiles} tiles"
            compile_one(name, kernel, num_warps, {}, BLOCK_T=block_t, BLOCK_N=MERGE_BLOCK_N)
    compile_one(_running_norm_kernel.__name__, _running_norm_kernel, 4, {}, BLOCK_N=128)
    compile_one(_sum_splits_kernel.__name__, _sum_splits_kernel, 4, {})
    return found


def compile_cases(todo: Sequence[Case], processes: int = 2) -> list[Resources]:
    """Compile many, in processes of their own: Triton holds the interpreter while it compiles."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_case, todo, chunksize=2))


def main() -> None:
    """Print a row for each configuration, at its worst over orders and streams, with LeakyReLU and GELU."""
    worst: dict[tuple[Any, ...], Resources] = {}
    todo = cases((80, 90, 100), ("leaky_relu", "gelu"), (False, True))
    for case, found in zip(todo, compile_cases(todo), strict=True):
        key = (case.kernel, case.arithmetic, case.capability, tuple(case.config[:5]))
        seen = worst.get(key, found)
        worst[key] = Resources(
            max(seen.registers, found.registers),
            max(seen.stack, found.stack),
            max(seen.shared, found.shared),
            found.tensor_core,
        )
    print("| kernel | arithmetic | chip | tile, warps, stages | registers | stack | shared KiB | tensor cores |")
    print("|---|---|---|---|---|---|---|---|")
    for (kernel, arithmetic, chip, config), r in worst.items():
        tile = f"{config[0]}x{config[1]}x{config[2]}, {config[3]}, {config[4]}"
        print(
            f"| {kernel} | {arithmetic} | sm_{chip} | {tile} | {r.registers} | {r.stack} | {r.shared / 1024:.0f} "
            f"| {r.tensor_core or 'none'} |"
        )


if __name__ == "__main__":
    main()
