"""``z = mu + exp(logvar / 2) * eps`` and the KL divergence of every row, forward and backward, eps never stored.

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
mu, logvar              [rows, latent]      any        read once a pass; stored (they are the caller's)
seed                    [1]                 int64      stored: all that the backward needs of the random numbers
eps                     [rows, latent]      fp32       recomputed in registers from the seed and the position
z                       [rows, latent]      mu's       result
kld                     [rows]              fp32       result
grad_mu, grad_logvar    as their inputs                results of the backward
======================  ==================  =========  ============================================================

The random number of row b and column l is that of a counter: Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel
random numbers: as easy as 1, 2, 3", 2011) with the seed as its key and ``b * latent + l`` as its counter, whose first
two words a Box-Muller transform makes normal. So it depends on the seed and the position alone, not on tiles or device;
:func:`rvae_fast.reference.philox_normal` gives the same to rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import cos_turns, exp
from .launch import quick_launch

TILE = 512
NUM_WARPS = 4


@triton.jit
def _uniform(bits):
    """fp32 in (0, 1] from 32 random bits: the middle of each of the 2**32 intervals, rounded."""
    return bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def philox_normal(seed, position):
    """Standard normal numbers for an int64 block of positions."""
    low = position.to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    zero = low * 0
    a, b, _, _ = tl.philox(seed, low, high, zero, zero)
    return tl.sqrt(-2.0 * tl.log(_uniform(a))) * cos_turns(_uniform(b))


@triton.jit
def _forward_kernel(
    mu_ptr,  # [M, L]
    logvar_ptr,  # [M, L]
    seed_ptr,  # [1] int64
    z_ptr,  # [M, L] contiguous
    kld_ptr,  # [M] fp32
    M,
    L,
    stride_mu,
    stride_logvar,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    seed = tl.load(seed_ptr)
    total = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    for start in range(0, L, BLOCK_L):
        columns = start + tl.arange(0, BLOCK_L)
        mask = (rows < M)[:, None] & (columns < L)[None, :]
        mu = tl.load(mu_ptr + rows[:, None] * stride_mu + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        logvar = tl.load(logvar_ptr + rows[:, None] * stride_logvar + columns[None, :], mask=mask, other=0.0)
        logvar = logvar.to(tl.float32)
        position = rows[:, None] * L + columns[None, :]
        z = mu + exp(0.5 * logvar) * philox_normal(seed, position)
        tl.store(z_ptr + position, z.to(z_ptr.dtype.element_ty), mask=mask)
        total += tl.where(mask, 0.5 * (mu * mu + exp(logvar) - 1.0 - logvar), 0.0)
    tl.store(kld_ptr + rows, tl.sum(total, axis=1), mask=rows < M)


@triton.jit
def _backward_kernel(
    grad_z_ptr,  # [M, L] or None
    grad_kld_ptr,  # [M] or None
    mu_ptr,  # [M, L]
    logvar_ptr,  # [M, L]
    seed_ptr,  # [1] int64
    grad_mu_ptr,  # [M, L] contiguous
    grad_logvar_ptr,  # [M, L] contiguous
    M,
    L,
    stride_grad_z,
    stride_grad_kld,
    stride_mu,
    stride_logvar,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask = (rows < M)[:, None] & (columns < L)[None, :]
    logvar = tl.load(logvar_ptr + rows[:, None] * stride_logvar + columns[None, :], mask=mask, other=0.0)
    logvar = logvar.to(tl.float32)
    position = rows[:, None] * L + columns[None, :]
    grad_mu = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    grad_logvar = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    if grad_z_ptr is not None:
        grad_z = tl.load(grad_z_ptr + rows[:, None] * stride_grad_z + columns[None, :], mask=mask, other=0.0)
        grad_mu = grad_z.to(tl.float32)
        eps = philox_normal(tl.load(seed_ptr), position)
        grad_logvar = grad_mu * (0.5 * exp(0.5 * logvar) * eps)
    if grad_kld_ptr is not None:
        mu = tl.load(mu_ptr + rows[:, None] * stride_mu + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_kld = tl.load(grad_kld_ptr + rows * stride_grad_kld, mask=rows < M, other=0.0).to(tl.float32)[:, None]
        grad_mu += grad_kld * mu
        grad_logvar += grad_kld * (0.5 * (exp(logvar) - 1.0))
    tl.store(grad_mu_ptr + position, grad_mu.to(grad_mu_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_logvar_ptr + position, grad_logvar.to(grad_logvar_ptr.dtype.element_ty), mask=mask)


def tiles(latent: int) -> tuple[int, int]:
    """Rows and columns of one tile."""
    block_l = min(triton.next_power_of_2(latent), TILE)
    return min(TILE // block_l, 128), block_l


def _by_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def forward(mu: Tensor, logvar: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """z [rows, latent] in mu's dtype and kld [rows] in fp32, of fp32, bf16 or fp16 ``mu`` and ``logvar``.

    Parameters
    ----------
    mu, logvar : [rows, latent]
        Rows may have any stride.
    seed : int64 [1]
        On their device; read there, so a captured graph draws anew whenever it has changed.
    """
    rows, latent = mu.shape
    z = torch.empty((rows, latent), dtype=mu.dtype, device=mu.device)
    kld = torch.empty((rows,), dtype=torch.float32, device=mu.device)
    if rows:
        mu, logvar = _by_rows(mu), _by_rows(logvar)
        block_m, block_l = tiles(latent)
        quick_launch(
            _forward_kernel, (triton.cdiv(rows, block_m),), mu, logvar, seed, z, kld, rows, latent, mu.stride(0),
            logvar.stride(0), BLOCK_M=block_m, BLOCK_L=block_l, options={"num_warps": NUM_WARPS},
        )  # fmt: skip
    return z, kld


def backward(
    grad_z: Tensor | None, grad_kld: Tensor | None, mu: Tensor, logvar: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by mu and logvar, each in its dtype; an incoming gradient may be None."""
    rows, latent = mu.shape
    grad_mu = torch.empty((rows, latent), dtype=mu.dtype, device=mu.device)
    grad_logvar = torch.empty((rows, latent), dtype=logvar.dtype, device=mu.device)
    if rows:
        mu, logvar = _by_rows(mu), _by_rows(logvar)
        grad_z = None if grad_z is None else _by_rows(grad_z)
        block_m, block_l = tiles(latent)
        quick_launch(
            _backward_kernel, (triton.cdiv(rows, block_m), triton.cdiv(latent, block_l)),
            grad_z, grad_kld, mu, logvar, seed, grad_mu, grad_logvar, rows, latent,
            0 if grad_z is None else grad_z.stride(0), 0 if grad_kld is None else grad_kld.stride(0),
            mu.stride(0), logvar.stride(0), BLOCK_M=block_m, BLOCK_L=block_l, options={"num_warps": NUM_WARPS},
        )  # fmt: skip
    return grad_mu, grad_logvar
