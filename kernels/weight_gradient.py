"""One layer backward, weight side: the prologue recomputed and the product over the rows, in row splits.

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
grad_y                  [rows, out]         any        read
x, norm                 as in the forward              read
h                       [rows, in]          dot type   recomputed in registers
partial                 [splits, out, in]   fp32       stored per split of the rows, summed in a second step
grad_weight             [out, in]           fp32       result
======================  ==================  =========  ============================================================

1. Prologue, in registers: ``h = activation((x - mean) * scale + shift)``, as the forward rounded it.
2. Product ``grad_y.T @ h`` over a split's rows, accumulated in fp32; the splits fill the machine where the weight has
   few tiles.
3. The splits are summed in order by a second kernel: no atomics, so results repeat bit for bit.

The bias gradient, the column sums of ``grad_y``, needs no pass: see ``batch_norm.merge_gradients``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .configurations import TileConfig, input_precision, weight_config
from .launch import launch
from .layer_forward import tile_order

_DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _weight_gradient_kernel(
    grad_y_ptr,  # [M, N]
    x_ptr,  # [M, K]
    norm_ptr,  # [5, K] fp32, or None: x is h
    partial_ptr,  # [splits, N, K] fp32
    M,
    N,
    K,
    split_rows,  # rows of a split, a multiple of BLOCK_K
    slope,
    ACTIVATION: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of the weight, of which there are N
    BLOCK_N: tl.constexpr,  # columns of the weight, of which there are K
    BLOCK_K: tl.constexpr,  # step along the sum, over M
    GROUP_M: tl.constexpr,
):
    tile_n, tile_k = tile_order(N, K, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1).to(tl.int64)
    ns = tile_n * BLOCK_M + tl.arange(0, BLOCK_M)
    ks = tile_k * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = ns < N
    k_mask = ks < K
    first = split * split_rows
    last = tl.minimum(first + split_rows, M)
    steps = tl.cdiv(last - first, BLOCK_K).to(tl.int32)
    rows = tl.arange(0, BLOCK_K)
    g_pointers = grad_y_ptr + first * N + rows[None, :] * N + ns[:, None]
    x_pointers = x_ptr + first * K + rows[:, None] * K + ks[None, :]
    if norm_ptr is not None:
        mean = tl.load(norm_ptr + ks, mask=k_mask, other=0.0)[None, :]
        scale = tl.load(norm_ptr + 3 * K + ks, mask=k_mask, other=0.0)[None, :]
        shift = tl.load(norm_ptr + 4 * K + ks, mask=k_mask, other=0.0)[None, :]
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(steps):
        row_mask = rows < last - first - step * BLOCK_K
        g = tl.load(g_pointers, mask=n_mask[:, None] & row_mask[None, :], other=0.0)
        h = tl.load(x_pointers, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        if norm_ptr is not None:
            # Rows past the end come out as activation(shift - mean * scale), which g's zeros take out of the sum.
            h = activate((h.to(tl.float32) - mean) * scale + shift, ACTIVATION, slope)
        product = tl.dot(g.to(DOT_TYPE), h.to(DOT_TYPE), product, input_precision=PRECISION)
        g_pointers += BLOCK_K * N
        x_pointers += BLOCK_K * K
    offsets = split * N * K + ns[:, None] * K + ks[None, :]
    tl.store(partial_ptr + offsets, product, mask=n_mask[:, None] & k_mask[None, :])


@triton.jit
def _sum_splits_kernel(
    partial_ptr,  # [splits, size] fp32
    total_ptr,  # [size] fp32
    splits,
    size,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    total = tl.zeros([BLOCK], tl.float32)
    pointers = partial_ptr + i
    for _ in range(splits):
        total += tl.load(pointers, mask=mask, other=0.0)
        pointers += size
    tl.store(total_ptr + i, total, mask=mask)


def weight_gradient(
    grad_y: Tensor,
    x: Tensor,
    *,
    norm: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """``grad_y.T @ activation(norm(x))`` in fp32.

    Parameters
    ----------
    grad_y : [rows, out] contiguous, rows > 0
    x : [rows, in] contiguous
    norm : fp32 [5, in], optional
        Without it ``x`` is the layer's input as it is.
    activation, negative_slope
        The forward's.
    dtype : torch.dtype, optional
        The product's; by default x's.
    out : fp32 [out, in] contiguous, optional
        Where to write the result.
    config : TileConfig, optional
        The tile sizes and the number of splits; by default the table's.

    Returns
    -------
    fp32 [out, in]
    """
    rows, features = grad_y.shape
    inner = x.shape[1]
    dtype = x.dtype if dtype is None else dtype
    if config is None:
        config = weight_config(grad_y, x, dtype)
    # Splits of whole steps; rounding up may leave fewer of them than asked for.
    split_rows = triton.cdiv(triton.cdiv(rows, config.splits), config.block_k) * config.block_k
    splits = triton.cdiv(rows, split_rows)
    total = grad_y.new_empty((features, inner), dtype=torch.float32) if out is None else out
    partial = total if splits == 1 else total.new_empty((splits, features, inner))
    grid = (triton.cdiv(features, config.block_m) * triton.cdiv(inner, config.block_n), splits)
    launch(
        _weight_gradient_kernel, grid, grad_y, x, norm, partial, rows, features, inner, split_rows, negative_slope,
        ACTIVATION=activation, DOT_TYPE=_DOT_TYPES[dtype], PRECISION=input_precision(dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        options=config.options,
    )  # fmt: skip
    if splits > 1:
        size = features * inner
        blocks = triton.cdiv(size, 1024)
        launch(_sum_splits_kernel, (blocks,), partial, total, splits, size, BLOCK=1024, options={"num_warps": 4})
    return total
