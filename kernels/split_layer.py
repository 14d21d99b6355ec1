"""One layer with its prologue in a pass of its own, and its epilogue in the product: the strategy "split".

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
h, grad_y               as in the plain layer          written by a pointwise pass, read by the product
residual, skip          [rows, out]         any        read by the epilogue
y, d                    [rows, out]         chosen     stored
tile_mean, tile_m2      [tiles, out]        fp32       stored per row tile (forward)
tile_sums               [2, tiles, in]      fp32       stored per row tile (backward)
======================  ==================  =========  ============================================================

Tensor cores take both operands from shared memory at full rate only when they come there untouched; a prologue between
load and product costs more than the pass that it saves (``docs/notes/performance.md``). An epilogue costs next to
nothing, as long as its registers do not meet a whole tile's: it runs on ``PARTS`` column parts of the accumulator, one
after another. Where the next norm is known beforehand (running statistics) the epilogue applies it, too, and no pass is
left: :func:`split_layer_onward`.

The other functions take and return what :mod:`.layer_forward` and :mod:`.layer_backward` do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .batch_norm import Moments, tile_moments
from .configurations import TileConfig, input_precision, split_config
from .launch import call, launch
from .layer_backward import activation_gradient
from .layer_forward import normalise, tile_order
from .norm_activation import norm_activation, norm_backward


@triton.jit
def _product(
    a_ptr, b_ptr, first, rows, row_mask, columns, column_mask, a_stride, b_stride_k, b_stride_n, K,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``a[rows, K] @ b[K, columns]`` in fp32, both read untouched."""
    a_tile = a_ptr + first * a_stride + rows[:, None] * a_stride
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        k_mask = ks < K
        a = tl.load(a_tile + ks[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        b = tl.load(
            b_ptr + ks[:, None] * b_stride_k + columns[None, :] * b_stride_n,
            mask=k_mask[:, None] & column_mask[None, :], other=0.0,
        )  # fmt: skip
        product = tl.dot(a.to(b_ptr.dtype.element_ty), b, product, input_precision=PRECISION)
    return product


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of ``x[BLOCK_M, BLOCK_N]``'s columns."""
    return tl.split(tl.permute(tl.reshape(x, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))


@triton.jit
def _part_forward(
    product, column, first, rows, row_mask, tile, bias_ptr, residual_ptr, y_ptr, tile_mean_ptr, tile_m2_ptr, norm_ptr,
    skip_ptr, next_ptr, M, N, slope, dtype, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    columns = column + tl.arange(0, BLOCK_N)
    column_mask = columns < N
    if bias_ptr is not None:
        product += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    offsets = first * N + rows[:, None] * N + columns[None, :]
    if residual_ptr is not None:
        product += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = product.to(dtype)
    if y_ptr is not None:
        tl.store(y_ptr + offsets, y, mask=mask)
    if tile_mean_ptr is not None:
        count = tl.minimum(M - first, BLOCK_M).to(tl.float32)
        mean, m2 = tile_moments(y.to(tl.float32), row_mask, count)
        tl.store(tile_mean_ptr + tile * N + columns, mean, mask=column_mask)
        tl.store(tile_m2_ptr + tile * N + columns, m2, mask=column_mask)
    if next_ptr is not None:
        a = normalise(y.to(tl.float32), norm_ptr, columns, column_mask, N)
        if skip_ptr is not None:
            a += tl.load(skip_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(next_ptr + offsets, activate(a, ACTIVATION, slope).to(next_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _part_backward(
    product, column, first, rows, row_mask, tile, residual_ptr, x_ptr, norm_ptr, skip_ptr, d_ptr, h_ptr, tile_sums_ptr,
    M, K, slope, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    columns = column + tl.arange(0, BLOCK_N)
    column_mask = columns < K
    mask = row_mask[:, None] & column_mask[None, :]
    offsets = first * K + rows[:, None] * K + columns[None, :]
    if residual_ptr is not None:
        product += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if x_ptr is not None:
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d, sum_d, sum_dx = activation_gradient(
            product, x, skip_ptr, offsets, mask, norm_ptr, columns, column_mask, K, row_mask, slope,
            d_ptr.dtype.element_ty, ACTIVATION,
        )  # fmt: skip
        tl.store(d_ptr + offsets, d, mask=mask)
        if h_ptr is not None:
            a = normalise(x, norm_ptr, columns, column_mask, K)
            if skip_ptr is not None:
                a += tl.load(skip_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(h_ptr + offsets, activate(a, ACTIVATION, slope).to(h_ptr.dtype.element_ty), mask=mask)
        tl.store(tile_sums_ptr + tile * K + columns, sum_d, mask=column_mask)
        tl.store(tile_sums_ptr + tl.cdiv(M, BLOCK_M) * K + tile * K + columns, sum_dx, mask=column_mask)
    else:
        tl.store(d_ptr + offsets, product.to(d_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _end_forward(
    product, column, first, rows, row_mask, tile, bias_ptr, residual_ptr, y_ptr, tile_mean_ptr, tile_m2_ptr, norm_ptr,
    skip_ptr, next_ptr, M, N, slope, dtype, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The epilogue on the whole of ``product`` or, with two PARTS, on its halves."""
    if PARTS == 1:
        _part_forward(
            product, column, first, rows, row_mask, tile, bias_ptr, residual_ptr, y_ptr, tile_mean_ptr, tile_m2_ptr,
            norm_ptr, skip_ptr, next_ptr, M, N, slope, dtype, ACTIVATION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        tl.static_assert(PARTS == 2, "1, 2 or 4 parts")
        left, right = _halves(product, BLOCK_M, BLOCK_N)
        _part_forward(
            left, column, first, rows, row_mask, tile, bias_ptr, residual_ptr, y_ptr, tile_mean_ptr, tile_m2_ptr,
            norm_ptr, skip_ptr, next_ptr, M, N, slope, dtype, ACTIVATION, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        _part_forward(
            right, column + BLOCK_N // 2, first, rows, row_mask, tile, bias_ptr, residual_ptr, y_ptr, tile_mean_ptr,
            tile_m2_ptr, norm_ptr, skip_ptr, next_ptr, M, N, slope, dtype, ACTIVATION, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip


@triton.jit
def _end_backward(
    product, column, first, rows, row_mask, tile, residual_ptr, x_ptr, norm_ptr, skip_ptr, d_ptr, h_ptr, tile_sums_ptr,
    M, K, slope, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The epilogue on the whole of ``product`` or, with two PARTS, on its halves."""
    if PARTS == 1:
        _part_backward(
            product, column, first, rows, row_mask, tile, residual_ptr, x_ptr, norm_ptr, skip_ptr, d_ptr, h_ptr,
            tile_sums_ptr, M, K, slope, ACTIVATION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        tl.static_assert(PARTS == 2, "1, 2 or 4 parts")
        left, right = _halves(product, BLOCK_M, BLOCK_N)
        _part_backward(
            left, column, first, rows, row_mask, tile, residual_ptr, x_ptr, norm_ptr, skip_ptr, d_ptr, h_ptr,
            tile_sums_ptr,
            M, K, slope, ACTIVATION, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        _part_backward(
            right, column + BLOCK_N // 2, first, rows, row_mask, tile, residual_ptr, x_ptr, norm_ptr, skip_ptr, d_ptr,
            h_ptr,
            tile_sums_ptr, M, K, slope, ACTIVATION, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["bias_ptr"])
def _split_forward_kernel(
    h_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    y_ptr,  # [M, N], or None: y, rounded to the weight's dtype, is only for what comes next
    tile_mean_ptr,  # [tiles, N] fp32, or None: no moments
    tile_m2_ptr,  # [tiles, N] fp32, or None
    norm_ptr,  # [5, N] fp32: of y, or None with next
    skip_ptr,  # [M, N] or None
    next_ptr,  # [M, N], or None: where activation(norm(y) + skip) goes
    M,
    N,
    K,
    slope,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    tile_m, tile_n = tile_order(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first = tile_m.to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < M - first
    column = tile_n * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    product = _product(
        h_ptr, weight_ptr, first, rows, row_mask, columns, columns < N, K, 1, K, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    dtype: tl.constexpr = weight_ptr.dtype.element_ty if y_ptr is None else y_ptr.dtype.element_ty
    if PARTS == 4:
        left, right = _halves(product, BLOCK_M, BLOCK_N)
        _end_forward(
            left, column, first, rows, row_mask, tile_m, bias_ptr, residual_ptr, y_ptr, tile_mean_ptr, tile_m2_ptr,
            norm_ptr, skip_ptr, next_ptr, M, N, slope, dtype, ACTIVATION, BLOCK_M, BLOCK_N // 2, 2,
        )  # fmt: skip
        _end_forward(
            right, column + BLOCK_N // 2, first, rows, row_mask, tile_m, bias_ptr, residual_ptr, y_ptr, tile_mean_ptr,
            tile_m2_ptr, norm_ptr, skip_ptr, next_ptr, M, N, slope, dtype, ACTIVATION, BLOCK_M, BLOCK_N // 2, 2,
        )  # fmt: skip
    else:
        _end_forward(
            product, column, first, rows, row_mask, tile_m, bias_ptr, residual_ptr, y_ptr, tile_mean_ptr, tile_m2_ptr,
            norm_ptr, skip_ptr, next_ptr, M, N, slope, dtype, ACTIVATION, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip


@triton.jit
def _split_backward_kernel(
    grad_y_ptr,  # [M, N]
    weight_ptr,  # [N, K]
    residual_ptr,  # [M, K] or None
    x_ptr,  # [M, K], or None: d is the product
    norm_ptr,  # [5, K] fp32, or None with x
    skip_ptr,  # [M, K] or None
    d_ptr,  # [M, K]
    h_ptr,  # [M, K] or None: where activation(norm(x) + skip) goes
    tile_sums_ptr,  # [2, tiles, K] fp32, or None with x
    M,
    N,
    K,
    slope,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of d, of which there are K
    BLOCK_K: tl.constexpr,  # step along the sum, over N
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    tile_m, tile_n = tile_order(M, K, BLOCK_M, BLOCK_N, GROUP_M)
    first = tile_m.to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < M - first
    column = tile_n * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    product = _product(
        grad_y_ptr, weight_ptr, first, rows, row_mask, columns, columns < K, N, K, 1, N, PRECISION, BLOCK_M, BLOCK_N,
        BLOCK_K,
    )  # fmt: skip
    if PARTS == 4:
        left, right = _halves(product, BLOCK_M, BLOCK_N)
        _end_backward(
            left, column, first, rows, row_mask, tile_m, residual_ptr, x_ptr, norm_ptr, skip_ptr, d_ptr, h_ptr,
            tile_sums_ptr,
            M, K, slope, ACTIVATION, BLOCK_M, BLOCK_N // 2, 2,
        )  # fmt: skip
        _end_backward(
            right, column + BLOCK_N // 2, first, rows, row_mask, tile_m, residual_ptr, x_ptr, norm_ptr, skip_ptr,
            d_ptr, h_ptr,
            tile_sums_ptr, M, K, slope, ACTIVATION, BLOCK_M, BLOCK_N // 2, 2,
        )  # fmt: skip
    else:
        _end_backward(
            product, column, first, rows, row_mask, tile_m, residual_ptr, x_ptr, norm_ptr, skip_ptr, d_ptr, h_ptr,
            tile_sums_ptr, M, K, slope, ACTIVATION, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``, by a recorded copy where it has another."""
    if x.dtype == dtype:
        return x
    cast = torch.empty_like(x, dtype=dtype)
    call(Tensor.copy_, cast, x)
    return cast


def split_layer_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    skip: Tensor | None = None,
    residual: Tensor | None = None,
    h: Tensor | None = None,
    moments: bool = True,
    out: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Moments | None]:
    """As :func:`.layer_forward.layer_forward`."""
    operand = x
    if norm is not None:
        operand = norm_activation(
            x, norm, skip=skip, activation=activation, negative_slope=negative_slope, dtype=weight.dtype, out=h
        )
    operand = in_dtype(operand, weight.dtype)
    y = weight.new_empty((x.shape[0], weight.shape[0])) if out is None else out
    return y, _forward(operand, weight, bias, residual, y, moments=moments, config=config)


def split_layer_onward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    norm: Tensor | None = None,
    skip: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    onward: Tensor | None = None,
    config: TileConfig | None = None,
) -> None:
    """A layer whose output's norm is known beforehand: ``onward = activation(norm(y) + skip)``, the next one's operand.

    Parameters
    ----------
    h : [rows, in] contiguous, of the weight's dtype
    weight, bias, residual
        As in :func:`split_layer_forward`.
    y : [rows, out], optional
        Where to write ``h @ weight.T + bias + residual``, if it is wanted.
    norm : fp32 [5, out], optional
    skip : [rows, out], optional
    onward : [rows, out], optional
        With ``norm``; at least one of ``y`` and ``onward`` is given.
    """
    _forward(
        h, weight, bias, residual, y, norm=norm, skip=skip, onward=onward, moments=False, config=config,
        activation=activation, negative_slope=negative_slope,
    )  # fmt: skip


def _forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    *,
    moments: bool,
    config: TileConfig | None,
    norm: Tensor | None = None,
    skip: Tensor | None = None,
    onward: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
) -> Moments | None:
    rows, (width, inner) = h.shape[0], weight.shape
    if config is None:
        config = split_config("split-forward", weight.dtype, h, rows, width, inner)
    tiles = triton.cdiv(rows, config.block_m)
    tile_mean = h.new_empty((tiles, width), dtype=torch.float32) if moments else None
    tile_m2 = None if tile_mean is None else torch.empty_like(tile_mean)
    launch(
        _split_forward_kernel, (tiles * triton.cdiv(width, config.block_n),),
        h, weight, bias, residual, y, tile_mean, tile_m2, norm, skip, onward, rows, width, inner, negative_slope,
        ACTIVATION=activation, PRECISION=input_precision(weight.dtype), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, GROUP_M=config.group_m, PARTS=config.parts, options=config.options,
    )  # fmt: skip
    return None if tile_mean is None or tile_m2 is None else (tile_mean, tile_m2, config.block_m)


def split_layer_backward(
    g: Tensor,
    weight: Tensor,
    *,
    y: Tensor | None = None,
    norm_grad: Tensor | None = None,
    skip_grad: Tensor | None = None,
    residual: Tensor | None = None,
    x: Tensor | None = None,
    norm: Tensor | None = None,
    skip: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    h: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`.layer_backward.layer_backward`; ``h`` receives the layer's operand, for its weight gradient."""
    grad_y = g if y is None or norm_grad is None else norm_backward(g, y, norm_grad, skip_grad=skip_grad)
    operand = in_dtype(grad_y, weight.dtype)
    (rows, width), inner = g.shape, weight.shape[1]
    if config is None:
        config = split_config("split-backward", weight.dtype, g, rows, inner, width)
    tiles = triton.cdiv(rows, config.block_m)
    d = weight.new_empty((rows, inner), dtype=dtype) if out is None else out
    tile_sums = None if x is None else g.new_empty((2, tiles, inner), dtype=torch.float32)
    launch(
        _split_backward_kernel, (tiles * triton.cdiv(inner, config.block_n),),
        operand, weight, residual, x, norm, skip, d, h, tile_sums, rows, width, inner, negative_slope,
        ACTIVATION=activation, PRECISION=input_precision(weight.dtype), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, GROUP_M=config.group_m, PARTS=config.parts, options=config.options,
    )  # fmt: skip
    return d, grad_y, tile_sums
