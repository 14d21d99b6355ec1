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
one read of its inputs and one write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rvae_fast.kernels.activations import activate
from rvae_fast.kernels.launch import launch
from rvae_fast.kernels.layer_backward import activation_gradient, norm_input_gradient
from rvae_fast.kernels.layer_forward import normalise

#: Rows and columns of one program.
BLOCK_M, BLOCK_N = 64, 64


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < M - first
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row_mask[:, None] & (columns < N)[None, :]
    return first * N + rows[:, None] * N + columns[None, :], mask, row_mask, columns


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offsets, mask, _, columns = _tile(M, N, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    a = normalise(x, norm_ptr, columns, columns < N, N)
    if skip_ptr is not None:
        a += tl.load(skip_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(h_ptr + offsets, activate(a, ACTIVATION, slope).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_activation_backward_kernel(
    grad_ptr,  # [M, N]
    x_ptr,  # [M, N]
    norm_ptr,  # [5, N] fp32
    skip_ptr,  # [M, N] or None
    d_ptr,  # [M, N]
    tile_sums_ptr,  # [2, tiles, N] fp32
    M,
    N,
    slope,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offsets, mask, row_mask, columns = _tile(M, N, BLOCK_M, BLOCK_N)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    d, sum_d, sum_dx = activation_gradient(
        grad, x, skip_ptr, offsets, mask, norm_ptr, columns, columns < N, N, row_mask, slope,
        d_ptr.dtype.element_ty, ACTIVATION,
    )  # fmt: skip
    tl.store(d_ptr + offsets, d, mask=mask)
    sums = tl.program_id(0) * N + columns
    tl.store(tile_sums_ptr + sums, sum_d, mask=columns < N)
    tl.store(tile_sums_ptr + tl.num_programs(0) * N + sums, sum_dx, mask=columns < N)


@triton.jit
def _norm_backward_kernel(
    d_ptr,  # [M, N]
    x_ptr,  # [M, N]
    norm_grad_ptr,  # [4, N] fp32
    skip_grad_ptr,  # [M, N] or None
    grad_x_ptr,  # [M, N]
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offsets, mask, _, columns = _tile(M, N, BLOCK_M, BLOCK_N)
    d = tl.load(d_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad_x = norm_input_gradient(d, x, norm_grad_ptr, columns, columns < N, N)
    if skip_grad_ptr is not None:
        grad_x += tl.load(skip_grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], BLOCK_M), triton.cdiv(x.shape[1], BLOCK_N)


def norm_activation(
    x: Tensor,
    norm: Tensor,
    *,
    skip: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``activation((x - mean) * scale + shift + skip)`` for contiguous ``x[rows, features]``, rows > 0.

    It is written to ``out``, or to a new tensor of ``dtype`` (by default x's).
    """
    h = torch.empty_like(x, dtype=dtype) if out is None else out
    launch(
        _norm_activation_kernel, _grid(x), x, norm, skip, h, *x.shape, negative_slope,
        ACTIVATION=activation, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, options={"num_warps": 4},
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
) -> tuple[Tensor, Tensor]:
    """``d[rows, features]`` in ``dtype`` (grad's), the gradient at the activation's input, and ``tile_sums`` for
    ``merge_gradients``."""
    d = torch.empty_like(grad, dtype=dtype)
    grid = _grid(x)
    tile_sums = x.new_empty((2, grid[0], x.shape[1]), dtype=torch.float32)
    launch(
        _norm_activation_backward_kernel, grid, grad, x, norm, skip, d, tile_sums, *x.shape, negative_slope,
        ACTIVATION=activation, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, options={"num_warps": 4},
    )  # fmt: skip
    return d, tile_sums


def norm_backward(
    d: Tensor, x: Tensor, norm_grad: Tensor, *, skip_grad: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """BatchNorm's input gradient ``scale * d - b - (x - mean) * c``, plus the gradient that came over the skip, in x's
    dtype."""
    grad_x = torch.empty_like(x) if out is None else out
    launch(
        _norm_backward_kernel, _grid(x), d, x, norm_grad, skip_grad, grad_x, *x.shape,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, options={"num_warps": 4},
    )  # fmt: skip
    return grad_x
