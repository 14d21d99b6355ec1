"""One layer forward: normalise + activate, matrix product, bias + residual + column moments, in one pass.

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
x                       [rows, in]          any        read: the raw output of the layer before
norm                    [5, in]             fp32       read: mean, rstd, variance, scale, shift (``batch_norm.py``)
skip                    [rows, in]          any        read, order "post" only: added before the activation
h                       [rows, in]          skip's     recomputed; stored where asked (a unit's input, "post")
weight                  [out, in]           dot type   read
bias                    [out]               any        read
residual                [rows, out]         any        read: added to the product
y                       [rows, out]         chosen     stored: the raw linear output
tile_mean, tile_m2      [tiles, out]        fp32       stored per row tile, merged by ``batch_norm.merge_moments`` or by
                                                       the next layer (``deferred.py``)
======================  ==================  =========  ============================================================

1. Prologue, in registers: ``h = activation((x - mean) * scale + shift + skip)``, fp32, rounded to the dot type.
2. Product ``h @ weight.T`` on tensor cores, accumulated in fp32.
3. Epilogue: ``y = product + bias + residual``, and the centred moments of the columns of y as rounded, because that is
   what the next BatchNorm sees.

Any of x, skip, residual and y may be fp32 beside a half-precision product: under autocast the residual stream may be.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .batch_norm import Moments, tile_moments
from .configurations import TileConfig, forward_config, input_precision
from .deferred import DeferredNorm, block_t, merged_norm
from .launch import follow, launch


@triton.jit
def tile_order(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column tile of this program, in groups of ``GROUP_M`` row tiles so that both operands stay in L2."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return group * GROUP_M + within % size, within // size


@triton.jit
def normalise(x, norm_ptr, columns, mask, N):
    """``(x - mean) * scale + shift`` of a tile ``[rows, columns]``; 0 in columns outside the mask, where x is 0."""
    mean = tl.load(norm_ptr + columns, mask=mask, other=0.0)
    scale = tl.load(norm_ptr + 3 * N + columns, mask=mask, other=0.0)
    shift = tl.load(norm_ptr + 4 * N + columns, mask=mask, other=0.0)
    return (x - mean[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def _operands(
    x_ptr, norm_ptr, in_mean_ptr, in_m2_ptr, gamma_ptr, beta_ptr, running_mean_ptr, running_var_ptr, skip_ptr, h_ptr,
    weight_ptr, x_tile, row_mask, h_row_mask, columns, column_mask, ks, stored, M, K, slope, in_tiles, in_rows,
    eps, momentum, BLOCK_T: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One step's tiles of h, in the dot type, and of the weight, transposed; the kernel says what the arguments are."""
    k_mask = ks < K
    mask = row_mask[:, None] & k_mask[None, :]
    weight = tl.load(
        weight_ptr + columns[None, :] * K + ks[:, None], mask=k_mask[:, None] & column_mask[None, :], other=0.0
    )
    h = tl.load(x_ptr + x_tile + ks[None, :], mask=mask, other=0.0)
    if norm_ptr is not None:
        if in_mean_ptr is not None:
            mean, scale, shift = merged_norm(
                in_mean_ptr, in_m2_ptr, gamma_ptr, beta_ptr, running_mean_ptr, running_var_ptr, norm_ptr, ks, k_mask,
                ks < stored, M, K, in_tiles, in_rows, eps, momentum, BLOCK_T,
            )  # fmt: skip
            a = (h.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]
        else:
            a = normalise(h.to(tl.float32), norm_ptr, ks, k_mask, K)
        if skip_ptr is not None:
            a += tl.load(skip_ptr + x_tile + ks[None, :], mask=mask, other=0.0).to(tl.float32)
        h = activate(a, ACTIVATION, slope)
        if h_ptr is not None:
            out = h.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + x_tile + ks[None, :], out, mask=h_row_mask[:, None] & k_mask[None, :])
    return h.to(weight_ptr.dtype.element_ty), weight


_VECTORS = ["gamma_ptr", "beta_ptr", "running_mean_ptr", "running_var_ptr", "bias_ptr"]


@triton.jit(do_not_specialize=["in_tiles", "in_rows"], do_not_specialize_on_alignment=_VECTORS)
def _layer_forward_kernel(
    x_ptr,  # [M, K]
    norm_ptr,  # [5, K] fp32, or None: no normalisation
    in_mean_ptr,  # [in_tiles, K] fp32, or None: norm is read; with it, norm is merged from these and written
    in_m2_ptr,  # [in_tiles, K] fp32, or None with in_mean
    gamma_ptr,  # [K] or None: the norm's weight, for the merge, and so on to running_var
    beta_ptr,  # [K] or None
    running_mean_ptr,  # [K] or None
    running_var_ptr,  # [K], or None with running_mean
    skip_ptr,  # [M, K] or None
    h_ptr,  # [M, K] or None
    weight_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    y_ptr,  # [M, N]
    tile_mean_ptr,  # [tiles, N] fp32, or None: no moments
    tile_m2_ptr,  # [tiles, N] fp32, or None
    M,
    N,
    K,
    slope,
    in_tiles,
    in_rows,  # rows of each of them but the last
    eps,
    momentum,
    BLOCK_T: tl.constexpr,  # at least in_tiles
    ONE_STEP: tl.constexpr,  # K <= BLOCK_K
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow(CHAINED)
    tile_m, tile_n = tile_order(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first = tile_m.to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < M - first
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < N

    x_tile = first * K + rows[:, None] * K
    # The programs of the first column tile store h for all.
    h_row_mask = rows < tl.where(tile_n == 0, M - first, 0)
    # The first program stores the norm that it merged.
    stored = tl.where(tl.program_id(0) == 0, K, 0)
    if ONE_STEP:
        # Straight on, so that all loads are under way at once.
        h, weight = _operands(
            x_ptr, norm_ptr, in_mean_ptr, in_m2_ptr, gamma_ptr, beta_ptr, running_mean_ptr, running_var_ptr, skip_ptr,
            h_ptr, weight_ptr, x_tile, row_mask, h_row_mask, columns, column_mask, tl.arange(0, BLOCK_K),
            stored, M, K, slope, in_tiles, in_rows, eps, momentum, BLOCK_T, ACTIVATION,
        )  # fmt: skip
        product = tl.dot(h, weight, input_precision=PRECISION)
    else:
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            h, weight = _operands(
                x_ptr, norm_ptr, in_mean_ptr, in_m2_ptr, gamma_ptr, beta_ptr, running_mean_ptr, running_var_ptr,
                skip_ptr, h_ptr, weight_ptr, x_tile, row_mask, h_row_mask, columns, column_mask,
                k + tl.arange(0, BLOCK_K), stored, M, K, slope, in_tiles, in_rows, eps, momentum, BLOCK_T,
                ACTIVATION,
            )  # fmt: skip
            product = tl.dot(h, weight, product, input_precision=PRECISION)

    if bias_ptr is not None:
        product += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    y_tile = first * N + rows[:, None] * N + columns[None, :]
    if residual_ptr is not None:
        product += tl.load(residual_ptr + y_tile, mask=mask, other=0.0).to(tl.float32)
    y = product.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + y_tile, y, mask=mask)
    if tile_mean_ptr is not None:
        count = tl.minimum(M - first, BLOCK_M).to(tl.float32)
        mean, m2 = tile_moments(y.to(tl.float32), row_mask, count)
        tl.store(tile_mean_ptr + tile_m * N + columns, mean, mask=column_mask)
        tl.store(tile_m2_ptr + tile_m * N + columns, m2, mask=column_mask)


def layer_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | DeferredNorm | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    skip: Tensor | None = None,
    residual: Tensor | None = None,
    h: Tensor | None = None,
    moments: bool = True,
    out: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Moments | None]:
    """``y = activation(norm(x) + skip) @ weight.T + bias + residual`` with the moments of the columns of y.

    Parameters
    ----------
    x : [rows, in] contiguous, rows > 0
    weight : [out, in] contiguous
        Its dtype is the product's.
    bias : [out], optional
    norm : fp32 [5, in] or DeferredNorm, optional
        Without it the prologue is left out: no normalisation, no skip, no activation.
    skip : [rows, in], optional
        Added to the normalised x before the activation (order "post").
    residual : [rows, out], optional
        Added to the product (order "pre").
    h : [rows, in], optional
        Where to write the prologue's result, if it is wanted.
    out : [rows, out], optional
        Where to write y; by default a new tensor of the weight's dtype.
    moments : bool
        Gather the column moments of y in the epilogue.
    config : TileConfig, optional
        The tile sizes; by default the table's.

    Returns
    -------
    y : [rows, out]
    (tile_mean, tile_m2, tile_rows) or None
        As ``batch_norm.column_moments`` returns them.
    """
    rows, inner = x.shape
    width = weight.shape[0]
    if config is None:
        config = forward_config(x, weight, rows, isinstance(norm, DeferredNorm))
    tiles = triton.cdiv(rows, config.block_m)
    y = weight.new_empty((rows, width)) if out is None else out
    tile_mean = x.new_empty((tiles, width), dtype=torch.float32) if moments else None
    tile_m2 = None if tile_mean is None else torch.empty_like(tile_mean)
    merge: tuple[Any, ...] = (norm, None, None, None, None, None, None)
    numbers: tuple[Any, ...] = (0, 0, 0.0, 0.0)
    if isinstance(norm, DeferredNorm):
        in_mean, in_m2, in_rows = norm.moments
        merge = (norm.out, in_mean, in_m2, norm.weight, norm.bias, *(norm.running or (None, None)))
        numbers = (in_mean.shape[0], in_rows, norm.eps, norm.momentum)
    launch(
        _layer_forward_kernel, (tiles * triton.cdiv(width, config.block_n),),
        x, *merge, skip, h, weight, bias, residual, y, tile_mean, tile_m2, rows, width, inner,
        negative_slope, *numbers, BLOCK_T=block_t(numbers[0]), ONE_STEP=inner <= config.block_k,
        ACTIVATION=activation, PRECISION=input_precision(weight.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        options=config.options,
    )  # fmt: skip
    return y, None if tile_mean is None or tile_m2 is None else (tile_mean, tile_m2, config.block_m)
