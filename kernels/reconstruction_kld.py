"""Reconstruction error and KL divergence of every row, forward and backward, each input read once.

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
x, x_hat                [rows, features]    any        read once a pass
mu, logvar              [rows, latent]      any        read once a pass, optional
feature_weight          [features]          any        read by every program (it stays in the cache), optional
error, kld              [rows]              fp32       results
grad_error, grad_kld    [rows]              any        read
grad_x ... grad_logvar  as their inputs                results of the backward, those that are wanted
======================  ==================  =========  ============================================================

1. Forward: a program has whole rows. Those of up to 1024 columns it takes a few at a time, the next ones' loads under
   way; along longer ones it walks over the columns, sums kept a lane and added up once at the end. So there are no
   partial results, no atomics, and any number of columns.
2. Backward: every element by itself, a grid over rows and columns. Nothing but the inputs is kept between the two.
3. The KL of both is the work of programs of their own, behind the others in the grid: nothing waits for its loads.
4. The gradient of ``feature_weight``, which is rarely learned, is a pass of its own (``feature_weight_gradient.py``).

Arithmetic is fp32, so fp64 is not for these kernels. Columns must be contiguous, rows may have any stride.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import exp
from .feature_weight_gradient import feature_weight_gradient
from .launch import quick_launch
from .loss_terms import error_slope, error_term, kld_term, tile
from .passes import PROGRAMS, Walk

#: Elements of one tile: 16 a thread of a long row, two loads of 16 bytes from each bf16 operand; 8 of short rows and of
#: latent variables, whose many row offsets and exponentials take registers.
TILE, SHORT_TILE = 2048, 1024
NUM_WARPS = 4
#: Of programs that go over whole rows in several steps: elements of a step, warps, stages in which steps overlap, and
#: steps at most, forward and backward. The best of 30 at 65536 rows of 784 in bf16, on an H200.
LOSS_STEPS = {"forward": (4096, 8, 3, 8), "backward": (1024, 4, 4, 8)}


@triton.jit
def _errors(
    x_ptr, x_hat_ptr, weight_ptr, first, start, M, N, stride_x, stride_x_hat,
    LIKELIHOOD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The terms of a tile, weighted; 0 outside."""
    base, offsets, mask = tile(first, start, M, N, stride_x, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0)
    base, offsets, mask = tile(first, start, M, N, stride_x_hat, BLOCK_M, BLOCK_N)
    x_hat = tl.load(x_hat_ptr + base + offsets, mask=mask, other=0.0)
    term = error_term(x.to(tl.float32), x_hat.to(tl.float32), LIKELIHOOD)
    if weight_ptr is not None:
        columns = start + tl.arange(0, BLOCK_N)
        term = term * tl.load(weight_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    return tl.where(mask, term, 0.0)


@triton.jit
def _divergences(
    mu_ptr, logvar_ptr, kld_ptr, first, M, L, stride_mu, stride_logvar, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The KL of the rows from ``first``."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for latent in range(0, L, BLOCK_N):
        base, at, inside = tile(first, latent, M, L, stride_mu, BLOCK_M, BLOCK_N)
        mu = tl.load(mu_ptr + base + at, mask=inside, other=0.0)
        base, at, inside = tile(first, latent, M, L, stride_logvar, BLOCK_M, BLOCK_N)
        logvar = tl.load(logvar_ptr + base + at, mask=inside, other=0.0)
        total += tl.where(inside, kld_term(mu.to(tl.float32), logvar.to(tl.float32)), 0.0)
    rows = tl.arange(0, BLOCK_M)
    tl.store(kld_ptr + first + rows, tl.sum(total, axis=1), mask=rows < M - first)


@triton.jit
def _forward_kernel(
    x_ptr,  # [M, N]
    x_hat_ptr,  # [M, N]
    mu_ptr,  # [M, L] or None
    logvar_ptr,  # [M, L] or None
    weight_ptr,  # [N] or None
    error_ptr,  # [M] fp32
    kld_ptr,  # [M] fp32, zeroed where there is no mu
    M,
    N,
    L,
    stride_x,
    stride_x_hat,
    stride_mu,
    stride_logvar,
    divisor,  # the error is divided by it
    LIKELIHOOD: tl.constexpr,
    WHOLE: tl.constexpr,  # whether BLOCK_N columns are a row
    TILE_ROWS: tl.constexpr,  # rows of a program; BLOCK_M of those that are not whole
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    KLD_M: tl.constexpr,  # rows of a program of the KL
    KLD_N: tl.constexpr,
):
    program = tl.program_id(0)
    tiles = tl.cdiv(M, TILE_ROWS)
    if program < tiles:
        begin = program.to(tl.int64) * TILE_ROWS
        rows = tl.arange(0, BLOCK_M)
        if WHOLE:
            for step in tl.range(0, TILE_ROWS, BLOCK_M, num_stages=STAGES):
                first = begin + step
                terms = _errors(
                    x_ptr, x_hat_ptr, weight_ptr, first, 0, M, N, stride_x, stride_x_hat, LIKELIHOOD, BLOCK_M, BLOCK_N
                )
                tl.store(error_ptr + first + rows, tl.sum(terms, axis=1) / divisor, mask=rows < M - first)
        else:
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
                total += _errors(
                    x_ptr, x_hat_ptr, weight_ptr, begin, start, M, N, stride_x, stride_x_hat, LIKELIHOOD, BLOCK_M,
                    BLOCK_N,
                )  # fmt: skip
            tl.store(error_ptr + begin + rows, tl.sum(total, axis=1) / divisor, mask=rows < M - begin)
    elif mu_ptr is not None:
        kld_first = (program - tiles).to(tl.int64) * KLD_M
        _divergences(mu_ptr, logvar_ptr, kld_ptr, kld_first, M, L, stride_mu, stride_logvar, KLD_M, KLD_N)


@triton.jit
def _divergence_gradients(
    grad_kld_ptr, mu_ptr, logvar_ptr, grad_mu_ptr, grad_logvar_ptr, first, M, L, stride_grad_kld, stride_mu,
    stride_logvar, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients by mu and logvar of the rows from ``first``."""
    rows = first + tl.arange(0, BLOCK_M)
    grad_kld = tl.load(grad_kld_ptr + rows * stride_grad_kld, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    for latent in range(0, L, BLOCK_N):
        if grad_mu_ptr is not None:
            base, at, inside = tile(first, latent, M, L, stride_mu, BLOCK_M, BLOCK_N)
            mu = tl.load(mu_ptr + base + at, mask=inside, other=0.0).to(tl.float32)
            base, at, inside = tile(first, latent, M, L, L, BLOCK_M, BLOCK_N)
            tl.store(grad_mu_ptr + base + at, (grad_kld * mu).to(grad_mu_ptr.dtype.element_ty), mask=inside)
        if grad_logvar_ptr is not None:
            base, at, inside = tile(first, latent, M, L, stride_logvar, BLOCK_M, BLOCK_N)
            logvar = tl.load(logvar_ptr + base + at, mask=inside, other=0.0).to(tl.float32)
            base, at, inside = tile(first, latent, M, L, L, BLOCK_M, BLOCK_N)
            grad = grad_kld * (0.5 * (exp(logvar) - 1.0))
            tl.store(grad_logvar_ptr + base + at, grad.to(grad_logvar_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_error_ptr,  # [M] or None: then only the KL's gradients
    grad_kld_ptr,  # [M] or None: then only the error's
    x_ptr,  # [M, N]
    x_hat_ptr,  # [M, N]
    mu_ptr,  # [M, L] or None
    logvar_ptr,  # [M, L] or None
    weight_ptr,  # [N] or None
    grad_x_ptr,  # [M, N] contiguous, or None where not wanted
    grad_x_hat_ptr,  # [M, N] contiguous, or None
    grad_mu_ptr,  # [M, L] contiguous, or None
    grad_logvar_ptr,  # [M, L] contiguous, or None
    M,
    N,
    L,
    stride_grad_error,
    stride_grad_kld,
    stride_x,
    stride_x_hat,
    stride_mu,
    stride_logvar,
    divisor,
    LIKELIHOOD: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    KLD_M: tl.constexpr,
    KLD_N: tl.constexpr,
):
    program = tl.program_id(0)
    tiles = 0
    if grad_error_ptr is not None:
        strips = tl.cdiv(N, BLOCK_N)
        tiles = tl.cdiv(M, TILE_ROWS) * strips
        if program < tiles:
            begin = (program // strips).to(tl.int64) * TILE_ROWS
            start = (program % strips) * BLOCK_N
            for step in tl.range(0, TILE_ROWS, BLOCK_M, num_stages=STAGES):
                first = begin + step
                rows = first + tl.arange(0, BLOCK_M)
                row = tl.load(grad_error_ptr + rows * stride_grad_error, mask=rows < M, other=0.0)
                base, offsets, mask = tile(first, start, M, N, stride_x, BLOCK_M, BLOCK_N)
                x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
                base, offsets, mask = tile(first, start, M, N, stride_x_hat, BLOCK_M, BLOCK_N)
                x_hat = tl.load(x_hat_ptr + base + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
                scale = (row.to(tl.float32) / divisor)[:, None]
                if weight_ptr is not None:
                    columns = start + tl.arange(0, BLOCK_N)
                    weight = tl.load(weight_ptr + columns, mask=columns < N, other=0.0)
                    scale = scale * weight.to(tl.float32)[None, :]
                x_hat = x_hat.to(tl.float32)
                slope = error_slope(x.to(tl.float32), x_hat, LIKELIHOOD)
                base, offsets, mask = tile(first, start, M, N, N, BLOCK_M, BLOCK_N)
                if grad_x_hat_ptr is not None:
                    by_x_hat = (scale * slope).to(grad_x_hat_ptr.dtype.element_ty)
                    tl.store(grad_x_hat_ptr + base + offsets, by_x_hat, mask=mask)
                if grad_x_ptr is not None:
                    by_x = -x_hat if LIKELIHOOD == "bernoulli" else -slope
                    tl.store(grad_x_ptr + base + offsets, (scale * by_x).to(grad_x_ptr.dtype.element_ty), mask=mask)
    if grad_kld_ptr is not None:  # noqa: SIM102  (known when it is compiled, unlike the other)
        if program >= tiles:
            kld_first = (program - tiles).to(tl.int64) * KLD_M
            _divergence_gradients(
                grad_kld_ptr, mu_ptr, logvar_ptr, grad_mu_ptr, grad_logvar_ptr, kld_first, M, L, stride_grad_kld,
                stride_mu, stride_logvar, KLD_M, KLD_N,
            )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def loss_walk(rows: int, features: int, direction: str = "forward") -> Walk:
    """How a program goes over ``[rows, features]``; a step, and so a row's sum, depends on the features alone."""
    block_n = min(max(triton.next_power_of_2(features), 16), 1024)
    block_m = (TILE if block_n >= 256 else SHORT_TILE) // block_n
    if features % 8 or block_n < 256:
        return Walk(block_m, block_m, block_n, NUM_WARPS)  # loads that asynchronous copies are too wide for
    if features > block_n:
        return Walk(block_m, block_m, block_n, NUM_WARPS, 3)
    elements, num_warps, stages, most = LOSS_STEPS[direction]
    block_m, steps = elements // block_n, 1
    while 2 * steps <= most and triton.cdiv(rows, 2 * steps * block_m) >= PROGRAMS:
        steps *= 2
    return Walk(steps * block_m, block_m, block_n, num_warps, stages if steps > 1 else 1)


def kld_tile(latent: int) -> tuple[int, int]:
    """Rows and columns of one program of the KL."""
    block_n = min(max(triton.next_power_of_2(latent), 1), SHORT_TILE)
    return min(SHORT_TILE // block_n, 128), block_n


def _by_rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor with contiguous columns."""
    if tensor is None or tensor.stride(1) == 1 or tensor.shape[1] == 1:
        return tensor
    return tensor.contiguous()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def forward(
    x: Tensor,
    x_hat: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None,
    feature_weight: Tensor | None,
    likelihood: str,
    reduction: str,
    config: Walk | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`rvae_fast.reference.reconstruction_kld` for fp32, bf16 and fp16 tensors: error and kld, fp32 [rows]."""
    rows, features = x.shape
    # Not two rows of one tensor: compiled graphs rely on an op's results beginning at multiples of 16 bytes.
    error, kld = (x.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    if mu is None:
        kld.zero_()
    if not rows:
        return error, kld
    x, x_hat, mu, logvar = (_by_rows(t) for t in (x, x_hat, mu, logvar))  # type: ignore[assignment]
    latent = 0 if mu is None else mu.shape[1]
    config = loss_walk(rows, features) if config is None else config
    kld_m, kld_n = kld_tile(latent)
    programs = triton.cdiv(rows, config.tile_rows) + (triton.cdiv(rows, kld_m) if latent else 0)
    weight = None if feature_weight is None else feature_weight.contiguous()
    quick_launch(
        _forward_kernel, (programs,), x, x_hat, mu, logvar, weight, error, kld, rows, features, latent, _stride(x),
        _stride(x_hat), _stride(mu), _stride(logvar), float(features) if reduction == "mean" else 1.0,
        LIKELIHOOD=likelihood, WHOLE=features <= config.block_n, **config.constants, KLD_M=kld_m, KLD_N=kld_n,
        options=config.options,
    )  # fmt: skip
    return error, kld


def backward(
    grad_error: Tensor | None,
    grad_kld: Tensor | None,
    x: Tensor,
    x_hat: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None,
    feature_weight: Tensor | None,
    likelihood: str,
    reduction: str,
    needs: Sequence[bool],
    config: Walk | None = None,
) -> list[Tensor]:
    """:func:`rvae_fast.reference.reconstruction_kld_backward` for fp32, bf16 and fp16 tensors."""
    rows, features = x.shape
    inputs = (x, x_hat, mu, logvar, feature_weight)
    by_error = [needs[i] and grad_error is not None for i in (0, 1)]
    by_kld = [needs[i] and grad_kld is not None and mu is not None for i in (2, 3)]
    grads = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if wanted and t is not None else None
        for t, wanted in zip(inputs[:4], (*by_error, *by_kld), strict=True)
    ]
    divisor = float(features) if reduction == "mean" else 1.0
    x, x_hat, mu, logvar = (_by_rows(t) for t in inputs[:4])  # type: ignore[assignment]
    weight = None if feature_weight is None else feature_weight.contiguous()
    latent = 0 if mu is None else mu.shape[1]
    if rows and (any(by_error) or any(by_kld)):
        config = loss_walk(rows, features, "backward") if config is None else config
        kld_m, kld_n = kld_tile(latent)
        tiles, strips = config.grid(rows, features)
        programs = (tiles * strips if any(by_error) else 0) + (triton.cdiv(rows, kld_m) if any(by_kld) else 0)
        quick_launch(
            _backward_kernel, (programs,), grad_error if any(by_error) else None, grad_kld if any(by_kld) else None,
            x, x_hat, mu, logvar, weight, *grads, rows, features, latent, _stride(grad_error), _stride(grad_kld),
            _stride(x), _stride(x_hat), _stride(mu), _stride(logvar), divisor,
            LIKELIHOOD=likelihood, **config.constants, KLD_M=kld_m, KLD_N=kld_n, options=config.options,
        )  # fmt: skip
    results = [grad for grad in grads if grad is not None]
    if needs[4] and grad_error is not None and feature_weight is not None:
        grad = feature_weight_gradient(grad_error, x, x_hat, divisor, likelihood)
        results.append(grad.to(feature_weight.dtype))
    return results
