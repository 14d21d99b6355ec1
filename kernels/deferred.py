"""Column statistics that their consumer merges itself, where a launch costs more than reading them once a program.

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
tile_mean, tile_m2      [tiles, features]   fp32       read by every program: all tiles of the columns it needs
norm                    [5, features]       fp32       stored by the first program; nobody reads it in this launch
running_mean, _var      [features]          any        updated in place by the first program alone
tile_sums               [2, tiles, features] fp32      read by every program
grad_weight, grad_bias  [features]          fp32       stored by the first program
grad_layer_bias         [features]          fp32       stored by the first program
======================  ==================  =========  ============================================================

A merge in a launch of its own (``batch_norm.py``) costs 2.5 us whatever its size. With few row tiles every program of
the consumer can read them all instead, from the second-level cache: 32 tiles of 128 columns are 32 KB. All programs
merge in the same order, so all have the same bits, and repeats have too. Which layers run so is
``configurations.deferred_tiles``'s choice.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import Moments, move_running, store_norm
from .launch import Number


class DeferredNorm(NamedTuple):
    """What ``batch_norm.merge_moments`` takes, for the consumer to do; ``out`` is the norm that it writes."""

    moments: Moments
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    out: Tensor
    running: tuple[Tensor, Tensor] | None = None
    momentum: float | Number = 0.0


class DeferredGradient(NamedTuple):
    """What ``batch_norm.merge_gradients`` takes, for the consumer to do; ``out`` is what it writes: the gradients of
    the BatchNorm's weight and bias and of the bias of the layer before."""

    tile_sums: Tensor
    norm: Tensor
    batch_stats: bool
    skip_sum: Tensor | None
    out: tuple[Tensor, Tensor, Tensor]


def block_t(tiles: int) -> int:
    """Tiles of the one step in which a consumer merges ``tiles``."""
    return max(4, triton.next_power_of_2(tiles))


@triton.jit
def merged_norm(
    tile_mean_ptr, tile_m2_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, norm_ptr,
    columns, mask, stores, M, N, tiles, tile_rows, eps, momentum, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Mean, scale and shift of ``columns``; with ``stores`` the norm and the running statistics are written as well."""
    t = tl.arange(0, BLOCK_T)
    rows = tl.minimum(tl.maximum(M - t * tile_rows, 0), tile_rows).to(tl.float32)[:, None]
    offsets = t[:, None] * N + columns[None, :]
    inside = (t < tiles)[:, None] & mask[None, :]
    t_mean = tl.load(tile_mean_ptr + offsets, mask=inside, other=0.0)
    t_m2 = tl.load(tile_m2_ptr + offsets, mask=inside, other=0.0)
    mean = tl.sum(t_mean * rows, axis=0) / M
    away = t_mean - mean[None, :]
    m2 = tl.sum(t_m2 + away * away * rows, axis=0)
    rstd = tl.where(mask, 1.0 / tl.sqrt_rn(m2 / M + eps), 0.0)
    scale = rstd
    shift = tl.zeros_like(rstd)
    if weight_ptr is not None:
        scale = rstd * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    variance = m2 / tl.maximum(M - 1.0, 1.0)
    store_norm(norm_ptr, mean, rstd, variance, scale, shift, columns, stores, N)
    if running_mean_ptr is not None:
        move_running(running_mean_ptr, mean, momentum, columns, stores)
        move_running(running_var_ptr, variance, momentum, columns, stores)
    return mean, scale, shift


@triton.jit
def merged_gradient(
    tile_sums_ptr, norm_ptr, grad_weight_ptr, grad_bias_ptr, skip_sum_ptr, grad_layer_bias_ptr,
    columns, mask, stores, M, N, tiles, BATCH_STATS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """mean, scale, b and c of ``columns``; with ``stores`` the gradients of the parameters are written as well."""
    t = tl.arange(0, BLOCK_T)
    offsets = t[:, None] * N + columns[None, :]
    inside = (t < tiles)[:, None] & mask[None, :]
    sum_g = tl.sum(tl.load(tile_sums_ptr + offsets, mask=inside, other=0.0), axis=0)
    sum_gx = tl.sum(tl.load(tile_sums_ptr + tiles * N + offsets, mask=inside, other=0.0), axis=0)
    mean = tl.load(norm_ptr + columns, mask=mask, other=0.0)
    scale = tl.load(norm_ptr + 3 * N + columns, mask=mask, other=0.0)
    b = tl.zeros_like(scale)
    c = tl.zeros_like(scale)
    grad_layer_bias = tl.zeros_like(scale)
    if BATCH_STATS:
        b = scale * (sum_g / M)
        c = scale * tl.load(norm_ptr + N + columns, mask=mask, other=0.0) * (sum_gx / M)
    else:
        grad_layer_bias = scale * sum_g
    if skip_sum_ptr is not None:
        grad_layer_bias += tl.load(skip_sum_ptr + columns, mask=stores, other=0.0)
    tl.store(grad_weight_ptr + columns, sum_gx, mask=stores)
    tl.store(grad_bias_ptr + columns, sum_g, mask=stores)
    tl.store(grad_layer_bias_ptr + columns, grad_layer_bias, mask=stores)
    return mean, scale, b, c
