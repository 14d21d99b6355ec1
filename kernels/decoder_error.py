"""The last linear layer of a decoder and the reconstruction error of its rows: the reconstruction is never written.

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
h                       [rows, in]          dot type   read: the layer's input
weight                  [features, in]      dot type   read
bias                    [features]          any        read, optional
x                       [rows, features]    any        read once: the target
feature_weight          [features]          any        read, optional
x_hat                   [rows, features]               in registers only, fp32
partial                 [tiles, rows]       fp32       temporary: one sum for each row and tile of columns
error                   [rows]              fp32       result
======================  ==================  =========  ============================================================

1. Product ``h @ weight.T`` on tensor cores, accumulated in fp32; bias added.
2. Epilogue: each element becomes its error against x (``reconstruction_kld.error_term``), summed along the row.
3. The column tiles' sums are added in order by a second, small kernel: no atomics.

Tiles depend on the arithmetic and the chip's family alone, so a row's error does not depend on how many came with it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configurations import TileConfig, arithmetic_of, device_facts, family, input_precision
from .launch import launch
from .layer_forward import tile_order
from .loss_terms import error_term
from .weight_gradient import _sum_splits_kernel

#: By arithmetic and family of chips; None: every family without its own.
CONFIGS: dict[tuple[str, int | None], TileConfig] = {
    ("half", None): TileConfig(128, 128, 64, 8, 3),
    ("half", 80): TileConfig(64, 128, 32, 4, 3),
    ("tf32", None): TileConfig(64, 128, 32, 8, 3),
    ("tf32", 80): TileConfig(64, 64, 32, 4, 3),
    ("ieee", None): TileConfig(64, 64, 16, 4, 2),
}


def config_for(arithmetic: str, capability: int) -> TileConfig:
    """Tiles for ``"half"``, ``"tf32"`` or ``"ieee"`` products on a chip of compute capability ``capability``."""
    return CONFIGS.get((arithmetic, family(capability))) or CONFIGS[arithmetic, None]


@triton.jit
def _decoder_error_kernel(
    h_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    x_ptr,  # [M, N]
    feature_weight_ptr,  # [N] or None
    partial_ptr,  # [tiles of columns, M] fp32
    M,
    N,
    K,
    stride_h,
    stride_x,
    divisor,  # the error is divided by it
    LIKELIHOOD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = tile_order(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first = tile_m.to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < M - first
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < N
    h_tile = first * stride_h + rows[:, None] * stride_h
    mask = row_mask[:, None] & column_mask[None, :]
    x_tile = first * stride_x + rows[:, None] * stride_x + columns[None, :]
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        k_mask = ks < K
        h = tl.load(h_ptr + h_tile + ks[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + columns[None, :] * K + ks[:, None], mask=k_mask[:, None] & column_mask[None, :], other=0.0
        )
        product = tl.dot(h, weight, product, input_precision=PRECISION)
    if bias_ptr is not None:
        product += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    x = tl.load(x_ptr + x_tile, mask=mask, other=0.0, eviction_policy="evict_first")
    term = error_term(x.to(tl.float32), product, LIKELIHOOD)
    if feature_weight_ptr is not None:
        term = term * tl.load(feature_weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    error = tl.sum(tl.where(mask, term, 0.0), axis=1) / divisor
    tl.store(partial_ptr + tile_n.to(tl.int64) * M + first + rows, error, mask=row_mask)


def decoder_error(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    feature_weight: Tensor | None,
    likelihood: str,
    reduction: str,
    *,
    config: TileConfig | None = None,
) -> Tensor:
    """fp32 [rows]: the error of ``x`` under ``h @ weight.T + bias``, as ``reconstruction_kld`` defines it.

    Parameters
    ----------
    h : [rows, in]
        Rows may have any stride.
    weight : [features, in]
        Its dtype, which is h's, is the product's: fp32, bf16 or fp16.
    bias, feature_weight : [features], optional
    x : [rows, features]
    likelihood, reduction
        Of :func:`rvae_fast.reconstruction_kld`.
    config : TileConfig, optional
    """
    rows, inner = h.shape
    features = weight.shape[0]
    if not rows:
        return x.new_empty((0,), dtype=torch.float32)
    h = h if h.stride(1) == 1 or inner == 1 else h.contiguous()
    x = x if x.stride(1) == 1 or features == 1 else x.contiguous()
    if config is None:
        capability = device_facts(x.device)[0] if x.device.type == "cuda" else 90
        config = config_for(arithmetic_of(weight.dtype), capability)
    tiles = triton.cdiv(features, config.block_n)
    partial = x.new_empty((tiles, rows), dtype=torch.float32)
    launch(
        _decoder_error_kernel, (triton.cdiv(rows, config.block_m) * tiles,),
        h, weight.contiguous(), None if bias is None else bias.contiguous(), x,
        None if feature_weight is None else feature_weight.contiguous(), partial, rows, features, inner, h.stride(0),
        x.stride(0), float(features) if reduction == "mean" else 1.0,
        LIKELIHOOD=likelihood, PRECISION=input_precision(weight.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        options=config.options,
    )  # fmt: skip
    if tiles == 1:
        return partial[0]
    error = partial.new_empty((rows,))
    launch(
        _sum_splits_kernel, (triton.cdiv(rows, 256), 1), partial, error, tiles, rows, 0, BLOCK=256,
        options={"num_warps": 4},
    )  # fmt: skip
    return error
