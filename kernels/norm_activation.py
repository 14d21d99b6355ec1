"""Normalise + activate as passes of their own, forward and backward: for a stage's ends, and beside a plain product.

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
x                       [rows, features]    any        read: a raw linear output
norm, norm_grad         [5 or 4, features]  fp32       read (``batch_norm.py``)
skip                    [rows, features]    any        read, order "post" only
h                       [rows, features]    chosen     stored: ``activation(norm(x) + skip)``
grad                    [rows, features]    any        read: the gradient of h
d                       [rows, features]    chosen     stored: the gradient at the activation's input
tile_sums               [2, tiles, features] fp32      stored per row tile: column sums of d and of d * xhat
grad_x                  [rows, features]    x's        stored: ``scale * d - b - (x - mean) * c + skip_grad``
======================  ==================  =========  ============================================================

The three kernels are the prologue of ``layer_forward.py`` and the epilogue and prologue of ``layer_backward.py``, each
one read of its inputs and one write. A program has a tile of whole rows (or a strip of wide ones) and walks down it in
steps of a few rows (``passes.py`` says how many): the columns' coefficients are loaded once, sums stay in the registers
of the thread that has the column and are added up across threads once at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_backward
from .launch import follow, launch
from .passes import Walk, walk, widest


@triton.jit
def _norm_activation_kernel(
    x_ptr,  # [M, N]
    norm_ptr,  # [5, N] fp32
    skip_ptr,  # [M, N] or None
    h_ptr,  # [M, N]
    M,
    N,
    slope,
    ACTIVATION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow(CHAINED)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < N
    rows = tl.arange(0, BLOCK_M)
    offsets = rows[:, None] * N + columns[None, :]
    mean = tl.load(norm_ptr + columns, mask=column_mask, other=0.0)
    scale = tl.load(norm_ptr + 3 * N + columns, mask=column_mask, other=0.0)
    shift = tl.load(norm_ptr + 4 * N + columns, mask=column_mask, other=0.0)
    for step in tl.range(0, TILE_ROWS, BLOCK_M, num_stages=STAGES):
        first = tl.program_id(0).to(tl.int64) * TILE_ROWS + step
        base = first * N
        mask = (rows < M - first)[:, None] & column_mask[None, :]
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        skip = 0.0
        if skip_ptr is not None:
            skip = tl.load(skip_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        a = (x.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :] + skip
        tl.store(h_ptr + base + offsets, activate(a, ACTIVATION, slope).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_activation_backward_kernel(
    grad_ptr,  # [M, N]
    x_ptr,  # [M, N]
    norm_ptr,  # [5, N] fp32
    skip_ptr,  # [M, N] or None
    d_ptr,  # [M, N], or None: only its sums, of d in grad's dtype
    h_ptr,  # [M, N] or None: the activation's result, for who needs it again
    tile_sums_ptr,  # [2, tiles, N] fp32
    M,
    N,
    slope,
    ACTIVATION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow(CHAINED)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < N
    rows = tl.arange(0, BLOCK_M)
    offsets = rows[:, None] * N + columns[None, :]
    mean = tl.load(norm_ptr + columns, mask=column_mask, other=0.0)
    scale = tl.load(norm_ptr + 3 * N + columns, mask=column_mask, other=0.0)
    shift = tl.load(norm_ptr + 4 * N + columns, mask=column_mask, other=0.0)
    sum_d = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sum_dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, TILE_ROWS, BLOCK_M, num_stages=STAGES):
        first = tl.program_id(0).to(tl.int64) * TILE_ROWS + step
        base = first * N
        row_mask = rows < M - first
        mask = row_mask[:, None] & column_mask[None, :]
        grad = tl.load(grad_ptr + base + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0)
        skip = 0.0
        if skip_ptr is not None:
            skip = tl.load(skip_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        centred = x.to(tl.float32) - mean[None, :]
        a = centred * scale[None, :] + shift[None, :] + skip
        d = activate_backward(grad.to(tl.float32), a, ACTIVATION, slope)
        d = tl.where(row_mask[:, None], d, 0.0)
        if d_ptr is None:
            d = d.to(grad_ptr.dtype.element_ty).to(tl.float32)
        else:
            stored = d.to(d_ptr.dtype.element_ty)
            tl.store(d_ptr + base + offsets, stored, mask=mask)
            d = stored.to(tl.float32)
        if h_ptr is not None:
            h = activate(a, ACTIVATION, slope)
            tl.store(h_ptr + base + offsets, h.to(h_ptr.dtype.element_ty), mask=mask)
        sum_d += d
        sum_dx += d * centred
    rstd = tl.load(norm_ptr + N + columns, mask=column_mask, other=0.0)
    sums = tl.program_id(0) * N + columns
    tl.store(tile_sums_ptr + sums, tl.sum(sum_d, axis=0), mask=column_mask)
    tl.store(tile_sums_ptr + tl.num_programs(0) * N + sums, tl.sum(sum_dx, axis=0) * rstd, mask=column_mask)


@triton.jit
def _norm_backward_kernel(
    d_ptr,  # [M, N]; with norm the gradient of the activation's result
    x_ptr,  # [M, N]
    norm_grad_ptr,  # [4, N] fp32
    norm_ptr,  # [5, N] fp32 or None
    skip_grad_ptr,  # [M, N] or None
    grad_x_ptr,  # [M, N]
    M,
    N,
    slope,
    ACTIVATION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow(CHAINED)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < N
    rows = tl.arange(0, BLOCK_M)
    offsets = rows[:, None] * N + columns[None, :]
    mean = tl.load(norm_grad_ptr + columns, mask=column_mask, other=0.0)
    scale = tl.load(norm_grad_ptr + N + columns, mask=column_mask, other=0.0)
    b = tl.load(norm_grad_ptr + 2 * N + columns, mask=column_mask, other=0.0)
    c = tl.load(norm_grad_ptr + 3 * N + columns, mask=column_mask, other=0.0)
    if norm_ptr is not None:
        shift = tl.load(norm_ptr + 4 * N + columns, mask=column_mask, other=0.0)
    for step in tl.range(0, TILE_ROWS, BLOCK_M, num_stages=STAGES):
        first = tl.program_id(0).to(tl.int64) * TILE_ROWS + step
        base = first * N
        mask = (rows < M - first)[:, None] & column_mask[None, :]
        d = tl.load(d_ptr + base + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        skip = 0.0
        if skip_grad_ptr is not None:  # loaded before the first use of the others, so that all are under way together
            skip = tl.load(skip_grad_ptr + base + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
            skip = skip.to(tl.float32)
        centred = x.to(tl.float32) - mean[None, :]
        if norm_ptr is not None:  # d again, as it went into the sums
            a = centred * scale[None, :] + shift[None, :]
            d = activate_backward(d.to(tl.float32), a, ACTIVATION, slope).to(d_ptr.dtype.element_ty)
        grad_x = scale[None, :] * d.to(tl.float32) - b[None, :] - centred * c[None, :] + skip
        tl.store(grad_x_ptr + base + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def norm_activation(
    x: Tensor,
    norm: Tensor,
    *,
    skip: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    config: Walk | None = None,
) -> Tensor:
    """``activation((x - mean) * scale + shift + skip)`` for contiguous ``x[rows, features]``, rows > 0.

    It is written to ``out``, or to a new tensor of ``dtype`` (by default x's).
    """
    h = torch.empty_like(x, dtype=dtype) if out is None else out
    config = walk("norm_activation", *x.shape, widest(x, skip, h)) if config is None else config
    launch(
        _norm_activation_kernel, config.grid(*x.shape), x, norm, skip, h, *x.shape, negative_slope,
        ACTIVATION=activation, **config.constants, options=config.options,
    )  # fmt: skip
    return h


def norm_activation_backward(
    grad: Tensor,
    x: Tensor,
    norm: Tensor,
    *,
    skip: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    dtype: torch.dtype | None = None,
    config: Walk | None = None,
) -> tuple[Tensor, Tensor]:
    """``d[rows, features]`` in ``dtype`` (grad's), the gradient at the activation's input, and ``tile_sums`` for
    ``merge_gradients``."""
    d = torch.empty_like(grad, dtype=dtype)
    config = walk("norm_activation_backward", *x.shape, widest(grad, x, skip, d)) if config is None else config
    grid = config.grid(*x.shape)
    tile_sums = x.new_empty((2, grid[0], x.shape[1]), dtype=torch.float32)
    launch(
        _norm_activation_backward_kernel, grid, grad, x, norm, skip, d, None, tile_sums, *x.shape, negative_slope,
        ACTIVATION=activation, **config.constants, options=config.options,
    )  # fmt: skip
    return d, tile_sums


def activation_sums(
    grad: Tensor,
    x: Tensor,
    norm: Tensor,
    *,
    h: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    config: Walk | None = None,
) -> Tensor:
    """The ``tile_sums`` of :func:`norm_activation_backward` without its d, which :func:`norm_backward` can work out.

    ``h`` becomes the activation's result, as :func:`norm_activation` gives it.
    """
    config = walk("norm_activation_backward", *x.shape, widest(grad, x, h)) if config is None else config
    grid = config.grid(*x.shape)
    tile_sums = x.new_empty((2, grid[0], x.shape[1]), dtype=torch.float32)
    launch(
        _norm_activation_backward_kernel, grid, grad, x, norm, None, None, h, tile_sums, *x.shape, negative_slope,
        ACTIVATION=activation, **config.constants, options=config.options,
    )  # fmt: skip
    return tile_sums


def norm_backward(
    d: Tensor,
    x: Tensor,
    norm_grad: Tensor,
    *,
    skip_grad: Tensor | None = None,
    norm: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: Tensor | None = None,
    config: Walk | None = None,
) -> Tensor:
    """BatchNorm's input gradient ``scale * d - b - (x - mean) * c``, plus the gradient that came over the skip, in x's
    dtype.

    With ``norm`` (of the same BatchNorm), ``d`` is the gradient of the activation's result instead, and goes through
    its derivative first.
    """
    grad_x = torch.empty_like(x) if out is None else out
    config = walk("norm_backward", *x.shape, widest(d, x, skip_grad, grad_x)) if config is None else config
    launch(
        _norm_backward_kernel, config.grid(*x.shape), d, x, norm_grad, norm, skip_grad, grad_x, *x.shape,
        negative_slope, ACTIVATION=activation, **config.constants, options=config.options,
    )  # fmt: skip
    return grad_x
