"""One layer backward, input side: BatchNorm input gradient, matrix product, activation's derivative, column sums.

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
g                       [rows, out]         any        read: the gradient of y, or d of the norm that follows
y                       [rows, out]         any        read: the layer's raw output, for that norm's input gradient
norm_grad               [4, out]            fp32       read: mean, scale, b, c (``batch_norm.merge_gradients``)
skip_grad               [rows, out]         any        read: the gradient that came over the skip connection
grad_y                  [rows, out]         y's        recomputed; stored once, for the weight gradient and the skip
weight                  [out, in]           dot type   read
x, norm, skip           as in the forward              read: the forward's prologue is recomputed from them
residual                [rows, in]          any        read: a gradient added to the product (order "post")
d                       [rows, in]          chosen     stored: gradient at the activation's input
tile_sums               [2, tiles, in]      fp32       stored per row tile: column sums of d and of d * xhat
======================  ==================  =========  ============================================================

1. Prologue, in registers: ``grad_y = scale * g - b - (y - mean) * c + skip_grad``: BatchNorm's input gradient and the
   skip's, fp32, rounded to the dot type.
2. Product ``grad_y @ weight`` on tensor cores, accumulated in fp32.
3. Epilogue: ``d = (product + residual) * activation'(norm(x) + skip)`` and the two sums a column that BatchNorm's
   backward needs, of d as rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate_backward
from .configurations import TileConfig, backward_config, input_precision
from .deferred import DeferredGradient, block_t, merged_gradient
from .launch import follow, launch
from .layer_forward import tile_order


@triton.jit
def norm_input_gradient(g, y, norm_grad_ptr, columns, mask, N):
    """``scale * g - b - (y - mean) * c`` of a tile ``[rows, columns]``; 0 in columns outside the mask."""
    mean = tl.load(norm_grad_ptr + columns, mask=mask, other=0.0)
    scale = tl.load(norm_grad_ptr + N + columns, mask=mask, other=0.0)
    b = tl.load(norm_grad_ptr + 2 * N + columns, mask=mask, other=0.0)
    c = tl.load(norm_grad_ptr + 3 * N + columns, mask=mask, other=0.0)
    return scale[None, :] * g - b[None, :] - (y - mean[None, :]) * c[None, :]


@triton.jit
def activation_gradient(
    grad, x, skip_ptr, offsets, mask, norm_ptr, columns, column_mask, N, row_mask, slope, dtype,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Gradient at the activation's input, in ``dtype`` (0 outside the rows), and its two column sums in fp32."""
    mean = tl.load(norm_ptr + columns, mask=column_mask, other=0.0)
    rstd = tl.load(norm_ptr + N + columns, mask=column_mask, other=0.0)
    scale = tl.load(norm_ptr + 3 * N + columns, mask=column_mask, other=0.0)
    shift = tl.load(norm_ptr + 4 * N + columns, mask=column_mask, other=0.0)
    centred = x - mean[None, :]
    a = centred * scale[None, :] + shift[None, :]
    if skip_ptr is not None:
        a += tl.load(skip_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    d = activate_backward(grad, a, ACTIVATION, slope)
    d = tl.where(row_mask[:, None], d, 0.0).to(dtype)
    rounded = d.to(tl.float32)
    return d, tl.sum(rounded, axis=0), tl.sum(rounded * centred, axis=0) * rstd


@triton.jit
def _operands(
    g_ptr, y_ptr, norm_grad_ptr, in_sums_ptr, grad_gamma_ptr, grad_beta_ptr, skip_sum_ptr, grad_bias_ptr,
    skip_grad_ptr, grad_y_ptr, weight_ptr, g_tile, row_mask, grad_y_row_mask, columns, column_mask, ns, stored,
    M, N, K, in_tiles, BATCH_STATS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One step's tiles of grad_y, in the dot type, and of the weight; the kernel says what the arguments are."""
    n_mask = ns < N
    mask = row_mask[:, None] & n_mask[None, :]
    weight = tl.load(
        weight_ptr + ns[:, None] * K + columns[None, :], mask=n_mask[:, None] & column_mask[None, :], other=0.0
    )
    g = tl.load(g_ptr + g_tile + ns[None, :], mask=mask, other=0.0)
    if y_ptr is not None:
        y = tl.load(y_ptr + g_tile + ns[None, :], mask=mask, other=0.0).to(tl.float32)
        if in_sums_ptr is not None:
            mean, scale, b, c = merged_gradient(
                in_sums_ptr, norm_grad_ptr, grad_gamma_ptr, grad_beta_ptr, skip_sum_ptr, grad_bias_ptr, ns, n_mask,
                ns < stored, M, N, in_tiles, BATCH_STATS, BLOCK_T,
            )  # fmt: skip
            grad_y = scale[None, :] * g.to(tl.float32) - b[None, :] - (y - mean[None, :]) * c[None, :]
        else:
            grad_y = norm_input_gradient(g.to(tl.float32), y, norm_grad_ptr, ns, n_mask, N)
        if skip_grad_ptr is not None:
            grad_y += tl.load(skip_grad_ptr + g_tile + ns[None, :], mask=mask, other=0.0).to(tl.float32)
        g = grad_y
        if grad_y_ptr is not None:
            out = grad_y.to(grad_y_ptr.dtype.element_ty)
            tl.store(grad_y_ptr + g_tile + ns[None, :], out, mask=grad_y_row_mask[:, None] & n_mask[None, :])
    return g.to(weight_ptr.dtype.element_ty), weight


@triton.jit(do_not_specialize=["in_tiles"])
def _layer_backward_kernel(
    g_ptr,  # [M, N]
    y_ptr,  # [M, N], or None: g is the gradient of y already
    norm_grad_ptr,  # [4, N] fp32, or None with y
    in_sums_ptr,  # [2, in_tiles, N] fp32, or None: with them norm_grad is merged, from that norm's [5, N], and read
    grad_gamma_ptr,  # [N] fp32, or None without in_sums, and so on to grad_bias: what the merge writes
    grad_beta_ptr,  # [N] fp32
    skip_sum_ptr,  # [N] fp32 or None: column sums of the skip's gradient
    grad_bias_ptr,  # [N] fp32
    skip_grad_ptr,  # [M, N] or None
    grad_y_ptr,  # [M, N] or None
    weight_ptr,  # [N, K]
    residual_ptr,  # [M, K] or None
    x_ptr,  # [M, K], or None: d is the product
    norm_ptr,  # [5, K] fp32, or None with x
    skip_ptr,  # [M, K] or None
    d_ptr,  # [M, K]
    tile_sums_ptr,  # [2, tiles, K] fp32, or None with x
    M,
    N,
    K,
    slope,
    in_tiles,
    BATCH_STATS: tl.constexpr,
    BLOCK_T: tl.constexpr,  # at least in_tiles
    ONE_STEP: tl.constexpr,  # N <= BLOCK_K
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of d, of which there are K
    BLOCK_K: tl.constexpr,  # step along the sum, over N
    GROUP_M: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow(CHAINED)
    tile_m, tile_n = tile_order(M, K, BLOCK_M, BLOCK_N, GROUP_M)
    first = tile_m.to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < M - first
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < K

    g_tile = first * N + rows[:, None] * N
    # The programs of the first column tile store grad_y for all.
    grad_y_row_mask = rows < tl.where(tile_n == 0, M - first, 0)
    # The first program stores the gradients that it merged.
    stored = tl.where(tl.program_id(0) == 0, N, 0)
    if ONE_STEP:
        # Straight on, so that all loads are under way at once.
        g, weight = _operands(
            g_ptr, y_ptr, norm_grad_ptr, in_sums_ptr, grad_gamma_ptr, grad_beta_ptr, skip_sum_ptr, grad_bias_ptr,
            skip_grad_ptr, grad_y_ptr, weight_ptr, g_tile, row_mask, grad_y_row_mask, columns, column_mask,
            tl.arange(0, BLOCK_K), stored, M, N, K, in_tiles, BATCH_STATS, BLOCK_T,
        )  # fmt: skip
        product = tl.dot(g, weight, input_precision=PRECISION)
    else:
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for n in range(0, N, BLOCK_K):
            g, weight = _operands(
                g_ptr, y_ptr, norm_grad_ptr, in_sums_ptr, grad_gamma_ptr, grad_beta_ptr, skip_sum_ptr, grad_bias_ptr,
                skip_grad_ptr, grad_y_ptr, weight_ptr, g_tile, row_mask, grad_y_row_mask, columns, column_mask,
                n + tl.arange(0, BLOCK_K), stored, M, N, K, in_tiles, BATCH_STATS, BLOCK_T,
            )  # fmt: skip
            product = tl.dot(g, weight, product, input_precision=PRECISION)

    offsets = first * K + rows[:, None] * K + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if residual_ptr is not None:
        product += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if x_ptr is not None:
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d, sum_d, sum_dx = activation_gradient(
            product, x, skip_ptr, offsets, mask, norm_ptr, columns, column_mask, K, row_mask, slope,
            d_ptr.dtype.element_ty, ACTIVATION,
        )  # fmt: skip
        tl.store(d_ptr + offsets, d, mask=mask)
        tl.store(tile_sums_ptr + tile_m * K + columns, sum_d, mask=column_mask)
        tl.store(tile_sums_ptr + tl.cdiv(M, BLOCK_M) * K + tile_m * K + columns, sum_dx, mask=column_mask)
    else:
        tl.store(d_ptr + offsets, product.to(d_ptr.dtype.element_ty), mask=mask)


def layer_backward(
    g: Tensor,
    weight: Tensor,
    *,
    y: Tensor | None = None,
    norm_grad: Tensor | DeferredGradient | None = None,
    skip_grad: Tensor | None = None,
    residual: Tensor | None = None,
    x: Tensor | None = None,
    norm: Tensor | None = None,
    skip: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    grad_y: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient at the input of the activation before the layer (``x``, ``norm`` given) or of the layer's input (not).

    Parameters
    ----------
    g : [rows, out] contiguous, rows > 0
        The gradient of the layer's output; with ``y``, d of the BatchNorm that follows the layer.
    weight : [out, in] contiguous
        Its dtype is the product's.
    y, norm_grad : [rows, out] and fp32 [4, out] or DeferredGradient, optional
        The layer's output and the coefficients of that BatchNorm's input gradient.
    skip_grad : [rows, out], optional
        Added to that input gradient.
    residual : [rows, in], optional
        Added to the product before the activation's derivative.
    x, norm, skip, activation, negative_slope
        The forward's prologue.
    dtype : torch.dtype, optional
        Of d; by default the weight's.
    out : [rows, in] contiguous, optional
        Where to write d; by default a new tensor of that dtype.
    grad_y : [rows, out] contiguous, of y's dtype, optional
        With ``y``, where to write grad_y; by default a new tensor.
    config : TileConfig, optional
        The tile sizes; by default the table's.

    Returns
    -------
    d : [rows, in]
    grad_y : [rows, out]
        The gradient of the layer's output: of y's dtype with ``y``, otherwise ``g``.
    tile_sums : fp32 [2, tiles, in] or None
        Column sums of d and of d * xhat over each row tile.
    """
    rows, width = g.shape
    inner = weight.shape[1]
    if config is None:
        config = backward_config(g, weight, rows, isinstance(norm_grad, DeferredGradient))
    tiles = triton.cdiv(rows, config.block_m)
    d = weight.new_empty((rows, inner), dtype=dtype) if out is None else out
    if y is not None and grad_y is None:
        grad_y = torch.empty_like(y)
    tile_sums = g.new_empty((2, tiles, inner), dtype=torch.float32) if x is not None else None
    merge: tuple[Any, ...] = (norm_grad, None, None, None, None, None)
    in_tiles, batch_stats = 0, False
    if isinstance(norm_grad, DeferredGradient):
        gamma, beta, bias = norm_grad.out
        merge = (norm_grad.norm, norm_grad.tile_sums, gamma, beta, norm_grad.skip_sum, bias)
        in_tiles, batch_stats = norm_grad.tile_sums.shape[1], norm_grad.batch_stats
    launch(
        _layer_backward_kernel, (tiles * triton.cdiv(inner, config.block_n),),
        g, y, *merge, skip_grad, grad_y, weight, residual, x, norm, skip, d, tile_sums, rows, width, inner,
        negative_slope, in_tiles, BATCH_STATS=batch_stats, BLOCK_T=block_t(in_tiles),
        ONE_STEP=width <= config.block_k, ACTIVATION=activation, PRECISION=input_precision(weight.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        options=config.options,
    )  # fmt: skip
    return d, g if y is None or grad_y is None else grad_y, tile_sums
