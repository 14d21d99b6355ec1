"""One layer backward, weight side: the prologue recomputed and the product over the rows, in row splits.

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
grad_y                  [rows, out]         any        read
x, norm                 as in the forward              read
h                       [rows, in]          dot type   recomputed in registers
partial                 [splits, layers, out, in] fp32 stored per split of the rows, summed in a second step
grad_weight             [out, in]           fp32       result
======================  ==================  =========  ============================================================

1. Prologue, in registers: ``h = activation((x - mean) * scale + shift)``, as the forward rounded it.
2. Product ``grad_y.T @ h`` over a split's rows, accumulated in fp32; the splits fill the machine where the weight has
   few tiles.
3. The splits are summed in order by a second kernel: no atomics, so results repeat bit for bit.

Small layers of one stack run together, in one launch: a program finds its layer's tensors by index arithmetic, since
they lie at equal distances.

The bias gradient, the column sums of ``grad_y``, needs no pass: see ``batch_norm.merge_gradients``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .configurations import TileConfig, input_precision, weight_config
from .launch import follow, launch
from .layer_forward import tile_order

_DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["grad_y_step", "x_step", "norm_step", "split_step", "partial_step"])
def _weight_gradient_kernel(
    grad_y_ptr,  # [M, N], of the first layer; the others' lie grad_y_step such tensors on, and so on
    x_ptr,  # [M, K]
    norm_ptr,  # [5, K] fp32, or None: x is h
    partial_ptr,  # [N, K] fp32 a split and layer
    M,
    N,
    K,
    split_rows,  # rows of a split, a multiple of BLOCK_K
    grad_y_step,
    x_step,
    norm_step,
    split_step,
    partial_step,
    slope,
    ACTIVATION: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of the weight, of which there are N
    BLOCK_N: tl.constexpr,  # columns of the weight, of which there are K
    BLOCK_K: tl.constexpr,  # step along the sum, over M
    GROUP_M: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow(CHAINED)
    tile_n, tile_k = tile_order(N, K, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    grad_y_ptr += layer * grad_y_step * M * N
    x_ptr += layer * x_step * M * K
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
        norm_ptr += layer * norm_step * 5 * K
        mean = tl.load(norm_ptr + ks, mask=k_mask, other=0.0)[None, :]
        scale = tl.load(norm_ptr + 3 * K + ks, mask=k_mask, other=0.0)[None, :]
        shift = tl.load(norm_ptr + 4 * K + ks, mask=k_mask, other=0.0)[None, :]
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(steps):
        row_mask = rows < last - first - step * BLOCK_K
        g = tl.load(g_pointers, mask=n_mask[:, None] & row_mask[None, :], other=0.0)
        h = tl.load(x_pointers, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        if norm_ptr is not None:
            # Rows past the end come out as activation(shift - mean * scale), which g's zeros take out of the sum, if
            # it is finite: of a column that hardly varies, far from zero, it is beyond fp16.
            h = activate((h.to(tl.float32) - mean) * scale + shift, ACTIVATION, slope)
            if DOT_TYPE is tl.float16:
                h = tl.clamp(h, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        product = tl.dot(g.to(DOT_TYPE), h.to(DOT_TYPE), product, input_precision=PRECISION)
        g_pointers += BLOCK_K * N
        x_pointers += BLOCK_K * K
    offsets = (split * split_step + layer * partial_step) * N * K + ns[:, None] * K + ks[None, :]
    tl.store(partial_ptr + offsets, product, mask=n_mask[:, None] & k_mask[None, :])


@triton.jit(do_not_specialize=["splits", "total_step"])
def _sum_splits_kernel(
    partial_ptr,  # [splits, layers, size] fp32
    total_ptr,  # [size] fp32 a layer
    splits,
    size,
    total_step,  # from a layer's to the next one's, in such tensors
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow(CHAINED)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    layer = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    pointers = partial_ptr + layer * size + i
    for _ in range(splits):
        total += tl.load(pointers, mask=mask, other=0.0)
        pointers += tl.num_programs(1).to(tl.int64) * size
    tl.store(total_ptr + layer * total_step * size + i, total, mask=mask)


def weight_gradient(
    grad_y: Tensor,
    x: Tensor,
    *,
    norm: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    layers: int = 1,
    steps: tuple[int, int, int, int] = (1, 1, 1, 1),
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
    layers, steps
        With several layers of one width in one launch, each tensor is the first layer's, and a part of a stacked
        tensor: the next layer's grad_y, x, norm and result lie so many parts on. ``out`` is needed.
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
        config = weight_config(grad_y, x, dtype, layers)
    # Splits of whole steps; rounding up may leave fewer of them than asked for.
    split_rows = triton.cdiv(triton.cdiv(rows, config.splits), config.block_k) * config.block_k
    splits = triton.cdiv(rows, split_rows)
    total = grad_y.new_empty((features, inner), dtype=torch.float32) if out is None else out
    partial = total if splits == 1 else total.new_empty((splits, layers, features, inner))
    grid = (triton.cdiv(features, config.block_m) * triton.cdiv(inner, config.block_n), splits, layers)
    partial_steps = (1, steps[3]) if splits == 1 else (layers, 1)
    launch(
        _weight_gradient_kernel, grid, grad_y, x, norm, partial, rows, features, inner, split_rows, *steps[:3],
        *partial_steps, negative_slope, ACTIVATION=activation, DOT_TYPE=_DOT_TYPES[dtype],
        PRECISION=input_precision(dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        options=config.options,
    )  # fmt: skip
    if splits > 1:
        size = features * inner
        blocks = triton.cdiv(size, 1024)
        launch(
            _sum_splits_kernel, (blocks, layers), partial, total, splits, size, steps[3], BLOCK=1024,
            options={"num_warps": 4},
        )  # fmt: skip
    return total
