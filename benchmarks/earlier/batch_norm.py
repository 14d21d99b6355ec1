"""BatchNorm's column statistics: per-tile moments, their merge, and the coefficients that the other kernels read.

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
x, residual             [rows, features]    any        read once
y                       [rows, features]    any        x + residual, where there is a residual
tile_mean, tile_m2      [tiles, features]   fp32       per row tile, temporary
norm                    [5, features]       fp32       stored: mean, rstd, unbiased variance, scale, shift
running_mean, _var      [features]          any        updated in place by the merge, where it is asked to
tile_sums               [2, tiles, features] fp32      per row tile, temporary: sums of g and of g * xhat
norm_grad               [4, features]       fp32       temporary: mean, scale, b, c
grad_weight, grad_bias  [features]          fp32       results: the affine gradients
grad_layer_bias         [features]          fp32       result: the gradient of the bias of the layer that wrote x
======================  ==================  =========  ============================================================

1. A normalised value is ``(x - mean) * scale + shift`` with ``scale = weight * rstd`` and ``shift = bias``: three
   numbers a column, and no cancellation where the mean is large against the deviation.
2. Moments are centred within a tile and merged by Chan, Golub and LeVeque's rule (1983), in fp32; never sums of
   squares. Tiles are merged in a fixed order by one program a column block, so results repeat bit for bit.
3. The input gradient of BatchNorm (Ioffe and Szegedy 2015, section 3) is a * g - b - (x - mean) * c with
   a = scale, b = scale * mean(g), c = scale * rstd * mean(g * xhat): again coefficients a column.
4. Its column sums are the bias gradient of the layer that wrote x, and need no pass: with batch statistics they are
   zero (a bias before such a BatchNorm changes nothing), with running ones scale * sum(g); a skip's are added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rvae_fast.kernels.launch import Number, launch

#: (tile_mean [tiles, features], tile_m2 [tiles, features], rows of each tile but the last)
Moments = tuple[Tensor, Tensor, int]

#: Rows and columns of one program of the pass of its own that takes moments.
MOMENTS_BLOCK_M, MOMENTS_BLOCK_N = 128, 64
#: Tiles and columns of one step of the merge: 8 fp32 columns are one 32-byte sector of memory.
MERGE_BLOCK_T, MERGE_BLOCK_N = 256, 8


@triton.jit
def tile_moments(values, row_mask, count):
    """Mean and centred second moment of each column of ``values[BLOCK_M, BLOCK_N]`` (fp32) over the masked rows."""
    mean = tl.sum(tl.where(row_mask[:, None], values, 0.0), axis=0) / count
    centred = tl.where(row_mask[:, None], values - mean[None, :], 0.0)
    return mean, tl.sum(centred * centred, axis=0)


@triton.jit
def _column_moments_kernel(
    x_ptr,  # [M, N]
    residual_ptr,  # [M, N] or None
    y_ptr,  # [M, N], or None without a residual
    tile_mean_ptr,  # [tiles, N] fp32
    tile_m2_ptr,  # [tiles, N] fp32
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tl.program_id(0)
    first = tile.to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < M - first
    mask = row_mask[:, None] & (columns < N)[None, :]
    offsets = first * N + rows[:, None] * N + columns[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total = x + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        y = total.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets, y, mask=mask)
        x = y.to(tl.float32)
    count = tl.minimum(M - first, BLOCK_M).to(tl.float32)
    mean, m2 = tile_moments(x, row_mask, count)
    tl.store(tile_mean_ptr + tile * N + columns, mean, mask=columns < N)
    tl.store(tile_m2_ptr + tile * N + columns, m2, mask=columns < N)


@triton.jit
def _move(running_ptr, batch, momentum, columns, mask):
    running = tl.load(running_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    moved = (1.0 - momentum) * running + momentum * batch
    tl.store(running_ptr + columns, moved.to(running_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_norm(norm_ptr, weight_ptr, bias_ptr, mean, rstd, variance, columns, N):
    mask = columns < N
    scale = rstd
    shift = tl.zeros_like(rstd)
    if weight_ptr is not None:
        scale = rstd * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(norm_ptr + columns, mean, mask=mask)
    tl.store(norm_ptr + N + columns, rstd, mask=mask)
    tl.store(norm_ptr + 2 * N + columns, variance, mask=mask)
    tl.store(norm_ptr + 3 * N + columns, scale, mask=mask)
    tl.store(norm_ptr + 4 * N + columns, shift, mask=mask)


# The addresses of a module's vectors are its own affair: nothing is gained where they are multiples of 16.
@triton.jit(do_not_specialize_on_alignment=["weight_ptr", "bias_ptr", "running_mean_ptr", "running_var_ptr"])
def _merge_moments_kernel(
    tile_mean_ptr,  # [tiles, N] fp32
    tile_m2_ptr,  # [tiles, N] fp32
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    running_mean_ptr,  # [N] or None
    running_var_ptr,  # [N], or None with running_mean
    norm_ptr,  # [5, N] fp32
    M,
    N,
    tiles,
    eps,
    momentum,
    TILE_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < N
    count = 0.0
    mean = tl.zeros([BLOCK_N], tl.float32)
    m2 = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        rows = tl.minimum(tl.maximum(M - t * TILE_ROWS, 0), TILE_ROWS).to(tl.float32)[:, None]
        offsets = t[:, None] * N + columns[None, :]
        inside = (t < tiles)[:, None] & mask[None, :]
        t_mean = tl.load(tile_mean_ptr + offsets, mask=inside, other=0.0)
        t_m2 = tl.load(tile_m2_ptr + offsets, mask=inside, other=0.0)
        chunk = tl.minimum(M - start * TILE_ROWS, BLOCK_T * TILE_ROWS).to(tl.float32)
        chunk_mean = tl.sum(t_mean * rows, axis=0) / chunk
        away = t_mean - chunk_mean[None, :]
        chunk_m2 = tl.sum(t_m2 + away * away * rows, axis=0)
        delta = chunk_mean - mean
        total = count + chunk
        mean += delta * (chunk / total)
        m2 += chunk_m2 + delta * delta * (count * chunk / total)
        count = total
    rstd = 1.0 / tl.sqrt_rn(m2 / M + eps)
    variance = m2 / tl.maximum(count - 1.0, 1.0)
    _store_norm(norm_ptr, weight_ptr, bias_ptr, mean, rstd, variance, columns, N)
    if running_mean_ptr is not None:
        _move(running_mean_ptr, mean, momentum, columns, mask)
        _move(running_var_ptr, variance, momentum, columns, mask)


@triton.jit(do_not_specialize_on_alignment=["running_mean_ptr", "running_var_ptr", "weight_ptr", "bias_ptr"])
def _running_norm_kernel(
    running_mean_ptr,  # [N]
    running_var_ptr,  # [N]
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    norm_ptr,  # [5, N] fp32
    N,
    eps,
    BLOCK_N: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mean = tl.load(running_mean_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    var = tl.load(running_var_ptr + columns, mask=columns < N, other=1.0).to(tl.float32)
    _store_norm(norm_ptr, weight_ptr, bias_ptr, mean, 1.0 / tl.sqrt_rn(var + eps), var, columns, N)


@triton.jit
def _merge_gradients_kernel(
    tile_sums_ptr,  # [2, tiles, N] fp32: of g, and of g * xhat
    norm_ptr,  # [5, N] fp32
    grad_weight_ptr,  # [N] fp32
    grad_bias_ptr,  # [N] fp32
    skip_sum_ptr,  # [N] fp32 or None: column sums of the skip's gradient
    grad_layer_bias_ptr,  # [N] fp32
    norm_grad_ptr,  # [4, N] fp32: mean, scale, b, c
    M,
    N,
    tiles,
    BATCH_STATS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < N
    sum_g = tl.zeros([BLOCK_N], tl.float32)
    sum_gx = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        offsets = t[:, None] * N + columns[None, :]
        inside = (t < tiles)[:, None] & mask[None, :]
        sum_g += tl.sum(tl.load(tile_sums_ptr + offsets, mask=inside, other=0.0), axis=0)
        sum_gx += tl.sum(tl.load(tile_sums_ptr + tiles * N + offsets, mask=inside, other=0.0), axis=0)
    tl.store(grad_bias_ptr + columns, sum_g, mask=mask)
    tl.store(grad_weight_ptr + columns, sum_gx, mask=mask)
    scale = tl.load(norm_ptr + 3 * N + columns, mask=mask, other=0.0)
    tl.store(norm_grad_ptr + columns, tl.load(norm_ptr + columns, mask=mask, other=0.0), mask=mask)
    tl.store(norm_grad_ptr + N + columns, scale, mask=mask)
    grad_layer_bias = tl.zeros_like(scale) if BATCH_STATS else scale * sum_g
    if skip_sum_ptr is not None:
        grad_layer_bias += tl.load(skip_sum_ptr + columns, mask=mask, other=0.0)
    tl.store(grad_layer_bias_ptr + columns, grad_layer_bias, mask=mask)
    if BATCH_STATS:
        rstd = tl.load(norm_ptr + N + columns, mask=mask, other=0.0)
        tl.store(norm_grad_ptr + 2 * N + columns, scale * (sum_g / M), mask=mask)
        tl.store(norm_grad_ptr + 3 * N + columns, scale * rstd * (sum_gx / M), mask=mask)
    else:
        tl.store(norm_grad_ptr + 2 * N + columns, tl.zeros_like(scale), mask=mask)
        tl.store(norm_grad_ptr + 3 * N + columns, tl.zeros_like(scale), mask=mask)


def column_moments(x: Tensor, residual: Tensor | None = None, y: Tensor | None = None) -> Moments:
    """Per-tile moments of the columns of ``x[rows, features]``, in a pass of its own.

    With a ``residual``, ``y`` becomes ``x + residual`` (it may be x itself) and the moments are y's, as rounded.

    Returns
    -------
    tile_mean, tile_m2 : fp32 [tiles, features]
    tile_rows : int
        Rows of each tile but the last.
    """
    rows, features = x.shape
    tiles = triton.cdiv(rows, MOMENTS_BLOCK_M)
    tile_mean, tile_m2 = (x.new_empty((tiles, features), dtype=torch.float32) for _ in range(2))
    grid = (tiles, triton.cdiv(features, MOMENTS_BLOCK_N))
    launch(
        _column_moments_kernel, grid, x, residual, y, tile_mean, tile_m2, rows, features,
        BLOCK_M=MOMENTS_BLOCK_M, BLOCK_N=MOMENTS_BLOCK_N, options={"num_warps": 4},
    )  # fmt: skip
    return tile_mean, tile_m2, MOMENTS_BLOCK_M


def merge_moments(
    tile_mean: Tensor,
    tile_m2: Tensor,
    tile_rows: int,
    rows: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    running: tuple[Tensor, Tensor] | None = None,
    momentum: float | Number = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Merge per-tile moments of ``rows`` rows into ``norm[5, features]``, by BatchNorm's weight, bias and eps.

    The deviation that normalises comes from the biased variance; the one that is written out, and goes into the running
    variance, is the unbiased. With ``running`` (mean and variance, contiguous) these become
    ``(1 - momentum) * running + momentum * batch``.
    """
    tiles, features = tile_mean.shape
    norm = tile_mean.new_empty((5, features)) if out is None else out
    running_mean, running_var = running or (None, None)
    launch(
        _merge_moments_kernel, (triton.cdiv(features, MERGE_BLOCK_N),), tile_mean, tile_m2, weight, bias,
        running_mean, running_var, norm, rows, features, tiles, eps, momentum,
        TILE_ROWS=tile_rows, BLOCK_T=MERGE_BLOCK_T, BLOCK_N=MERGE_BLOCK_N, options={"num_warps": 4},
    )  # fmt: skip
    return norm


def running_norm(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``norm[5, features]`` of a BatchNorm that normalises by its running statistics."""
    features = running_mean.shape[0]
    norm = running_mean.new_empty((5, features), dtype=torch.float32) if out is None else out
    launch(
        _running_norm_kernel, (triton.cdiv(features, 128),), running_mean, running_var, weight, bias, norm, features,
        eps, BLOCK_N=128, options={"num_warps": 4},
    )  # fmt: skip
    return norm


def merge_gradients(
    tile_sums: Tensor,
    norm: Tensor,
    rows: int,
    batch_stats: bool,
    *,
    skip_sum: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge ``tile_sums[2, tiles, features]`` into the affine gradients and the input gradient's coefficients.

    Parameters
    ----------
    tile_sums : fp32 [2, tiles, features]
        Column sums of the gradient g of the normalised values, and of g * xhat.
    norm : fp32 [5, features]
    rows : int
    batch_stats : bool
        Whether ``norm`` holds this batch's statistics, through which a gradient flows, or running ones.
    skip_sum : fp32 [features], optional
        Column sums of the gradient that is added to the input gradient.
    out : three fp32 [features], optional
        Where to write the first three results.

    Returns
    -------
    grad_weight, grad_bias, grad_layer_bias : fp32 [features]
        Of the BatchNorm's weight and bias, and of the bias of the linear layer before it.
    norm_grad : fp32 [4, features]
        mean, scale, b, c of ``scale * g - b - (x - mean) * c``.
    """
    _, tiles, features = tile_sums.shape
    grad_weight, grad_bias, grad_layer_bias = tile_sums.new_empty((3, features)) if out is None else out
    norm_grad = tile_sums.new_empty((4, features))
    launch(
        _merge_gradients_kernel, (triton.cdiv(features, MERGE_BLOCK_N),), tile_sums, norm, grad_weight, grad_bias,
        skip_sum, grad_layer_bias, norm_grad, rows, features, tiles,
        BATCH_STATS=batch_stats, BLOCK_T=MERGE_BLOCK_T, BLOCK_N=MERGE_BLOCK_N, options={"num_warps": 4},
    )  # fmt: skip
    return grad_weight, grad_bias, grad_layer_bias, norm_grad
