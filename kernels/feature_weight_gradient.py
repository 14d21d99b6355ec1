"""The gradient of the reconstruction error by the features' weights: a sum over the rows for every feature.

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
x, x_hat                [rows, features]    any        read
grad_error              [rows]              any        read
partial                 [splits, features]  fp32       temporary, added up by PyTorch
======================  ==================  =========  ============================================================

Every program adds up a split of the rows for some columns, in fp32: no atomics, so the result repeats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .loss_terms import error_term, tile

#: Rows that a program takes in a step, its columns, the most splits of the rows, warps.
BLOCK_M, BLOCK_N, SPLITS, NUM_WARPS = 32, 64, 64, 4


@triton.jit
def _weight_gradient_kernel(
    grad_error_ptr,  # [M]
    x_ptr,  # [M, N]
    x_hat_ptr,  # [M, N]
    partial_ptr,  # [splits, N] fp32
    M,
    N,
    split_rows,  # rows of a split, a multiple of BLOCK_M
    stride_grad_error,
    stride_x,
    stride_x_hat,
    divisor,
    LIKELIHOOD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    begin = split.to(tl.int64) * split_rows
    for step in range(0, split_rows, BLOCK_M):
        first = begin + step
        rows = first + tl.arange(0, BLOCK_M)
        row = tl.load(grad_error_ptr + rows * stride_grad_error, mask=rows < M, other=0.0).to(tl.float32) / divisor
        base, offsets, mask = tile(first, column, M, N, stride_x, BLOCK_M, BLOCK_N)
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        base, offsets, mask = tile(first, column, M, N, stride_x_hat, BLOCK_M, BLOCK_N)
        x_hat = tl.load(x_hat_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, row[:, None] * error_term(x, x_hat, LIKELIHOOD), 0.0)
    columns = column + tl.arange(0, BLOCK_N)
    tl.store(partial_ptr + split.to(tl.int64) * N + columns, tl.sum(total, axis=0), mask=columns < N)


def feature_weight_gradient(grad_error: Tensor, x: Tensor, x_hat: Tensor, divisor: float, likelihood: str) -> Tensor:
    """Gradient [features], fp32, of the error divided by ``divisor``; columns of ``x`` and ``x_hat`` are contiguous."""
    rows, features = x.shape
    splits = max(1, min(SPLITS, triton.cdiv(rows, BLOCK_M)))
    split_rows = triton.cdiv(triton.cdiv(rows, splits), BLOCK_M) * BLOCK_M
    partial = x.new_zeros((splits, features), dtype=torch.float32)
    if rows:
        launch(
            _weight_gradient_kernel, (triton.cdiv(features, BLOCK_N), splits),
            grad_error, x, x_hat, partial, rows, features, split_rows, grad_error.stride(0), x.stride(0),
            x_hat.stride(0), divisor, LIKELIHOOD=likelihood, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
            options={"num_warps": NUM_WARPS},
        )  # fmt: skip
    return partial.sum(0)
