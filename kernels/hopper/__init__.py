"""A layer of a residual block on Hopper in bf16: the fused forward, in CUDA C++.

It takes the arguments of ``layer_forward`` in order "pre", for widths of 128, 256, 384 and 512 (the sum's may differ
from the result's), and weights packed by :func:`pack_weight`. See ``layer.cu``.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from . import build

ACTIVATIONS = ("identity", "relu", "leaky_relu", "elu", "silu", "gelu", "tanh")
WIDTHS = (128, 256, 384, 512)
#: Rows of a tile.
BLOCK_M = 128
THREADS = 640
#: Bytes of a slot and of a stage, see ``layer.cu``.
BLOCK = 16384
#: CTAs of a cluster, which share what they read of the weight.
CLUSTER = 2


class _Arguments(ctypes.Structure):
    """``Arguments`` of ``layout.cuh``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "x", "norm", "weight", "bias", "residual", "y", "tile_mean", "tile_m2",
        )),
        ("rows", ctypes.c_int), ("tiles", ctypes.c_int), ("slope", ctypes.c_float),
    ]  # fmt: skip


def tiles_of(rows: int) -> int:
    """Tiles of so many rows."""
    return -(-rows // BLOCK_M)


def split_of(rows: int, width: int, multiprocessors: int) -> int:
    """How many CTAs share the columns of a tile of rows: as many as there are multiprocessors for."""
    tiles, split = tiles_of(rows), 1
    while width // 128 % (2 * split) == 0 and 2 * split * tiles <= multiprocessors:
        split *= 2
    return split


def defines(
    activation: str, inner: int, width: int, cluster: int, split: int = 1, extra: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """The ``-D`` options of a kernel: a sum over ``inner``, ``width`` columns."""
    if inner not in WIDTHS or width not in WIDTHS:
        raise ValueError(f"widths must be among {WIDTHS}, not {inner} and {width}")
    values = {
        "ACT": ACTIVATIONS.index(activation),
        "KC": inner // 64,
        "PANELS": width // 128 // split,
        "SPLIT": split,
        "CL": cluster,
    }
    return (*(f"-D{name}={value}" for name, value in values.items()), *extra)


def shared_bytes(inner: int, width: int) -> int:
    """Dynamic shared memory of a kernel for ``width`` columns a CTA, as ``layer.cu`` lays it out."""
    blocks = (inner // 64) * (width // 128)
    slots, stages = (8, 5) if blocks > 8 else (5 if blocks > 5 else 8, blocks)
    return (slots + stages) * BLOCK + 16384 + 16 * (slots + stages)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    if tensor is None:
        return
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.data_ptr() % 16:
        raise ValueError(
            f"{name} must be a contiguous {dtype} tensor {list(shape)} that starts at a multiple of 16 bytes"
        )


def pack_weight(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Weights ``[..., out, in]`` (fp32 or bf16, contiguous) as the blocks that the kernel copies.

    Returns
    -------
    bf16 [..., out * in]
    """
    height, inner = weight.shape[-2:]
    if height not in WIDTHS or inner not in WIDTHS:
        raise ValueError(f"widths must be among {WIDTHS}, not {inner} and {height}")
    if weight.dtype not in (torch.float32, torch.bfloat16) or not weight.is_contiguous():
        raise ValueError("weights must be contiguous, fp32 or bf16")
    if out is None:
        out = weight.new_empty((*weight.shape[:-2], height * inner), dtype=torch.bfloat16)
    grid = (height * inner // 8 // 256, weight.numel() // (height * inner))
    sizes = (height, inner, weight.dtype == torch.float32)
    with torch.cuda.device(weight.device):
        run = build.kernel("pack.cu", "pack_weight", (), 0, weight.device.index)
        run(grid, 256, *(ctypes.c_void_p(t.data_ptr()) for t in (weight, out)), *map(ctypes.c_int, sizes))
    return out


def _launch(
    activation: str, slope: float, inner: int, width: int, rows: int, device: torch.device, cluster: int,
    flags: tuple[str, ...], **tensors: Tensor | None,
) -> None:  # fmt: skip
    values = {name: _address(t) for name, t in tensors.items()}
    arguments = _Arguments(**values, rows=rows, tiles=tiles_of(rows), slope=slope)
    with torch.cuda.device(device):
        run, grid = _plan(activation, inner, width, rows, device, cluster, flags)
        run(grid, THREADS, arguments)


@functools.lru_cache(maxsize=1024)
def _plan(
    activation: str, inner: int, width: int, rows: int, device: torch.device, cluster: int, flags: tuple[str, ...]
) -> tuple[build.Kernel, tuple[int, int]]:  # fmt: skip
    """The kernel, on the device that is current, and its grid: looked up once, since every layer asks."""
    chip = torch.cuda.get_device_properties(device).multi_processor_count
    split = split_of(rows, width, chip)
    grid = min(-(-tiles_of(rows) // cluster), chip // split // cluster) * cluster
    options = defines(activation, inner, width, cluster, split, flags)
    run = build.kernel("layer.cu", "layer", options, shared_bytes(inner, width // split), device.index)
    return run, (grid, split)


def hopper_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor,
    activation: str = "identity",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    moments: bool = True,
    out: Tensor | None = None,
    packed: Tensor | None = None,
    cluster: int = CLUSTER,
    extra: tuple[str, ...] = (),
) -> tuple[Tensor, tuple[Tensor, Tensor, int] | None]:
    """``layer_forward`` in bf16; ``packed`` is ``pack_weight(weight)`` where the caller has it already."""
    rows, width = x.shape[0], weight.shape[0]
    y = torch.empty((rows, width), dtype=torch.bfloat16, device=x.device) if out is None else out
    tile_mean = x.new_empty((tiles_of(rows), width), dtype=torch.float32) if moments else None
    tile_m2 = None if tile_mean is None else torch.empty_like(tile_mean)
    packed = pack_weight(weight) if packed is None else packed
    launch_forward(
        activation, negative_slope, x, packed, bias, norm, residual, y, tile_mean, tile_m2, cluster=cluster, flags=extra
    )
    return y, None if tile_mean is None or tile_m2 is None else (tile_mean, tile_m2, BLOCK_M)


def launch_forward(
    activation: str,
    negative_slope: float,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    residual: Tensor | None,
    y: Tensor,
    tile_mean: Tensor | None,
    tile_m2: Tensor | None,
    *,
    cluster: int = CLUSTER,
    flags: tuple[str, ...] = (),
) -> None:
    """The forward's launch, into tensors that are there."""
    (rows, inner), width = x.shape, y.shape[1]
    for tensor, name in ((x, "x"), (residual, "residual"), (y, "out")):
        _check(tensor, (rows, inner if name == "x" else width), torch.bfloat16, name)
    _check(norm, (5, inner), torch.float32, "norm")
    if bias is not None and (bias.dtype != torch.float32 or bias.data_ptr() % 16):
        bias = bias.to(torch.float32, copy=True)  # a view of something larger may begin anywhere
    _launch(
        activation, negative_slope, inner, width, rows, x.device, cluster, flags, x=x, norm=norm, weight=packed,
        bias=bias, residual=residual, y=y, tile_mean=tile_mean, tile_m2=tile_m2,
    )  # fmt: skip
