"""Terms of the reconstruction error and of the KL divergence, and where a tile of rows lies."""

from __future__ import annotations

import triton
import triton.language as tl

from .elementary import exp, log1p_unit


@triton.jit
def error_term(x, x_hat, LIKELIHOOD: tl.constexpr):
    """Error of one feature; ``x_hat`` is a logit for ``bernoulli``."""
    if LIKELIHOOD == "squared":
        d = x_hat - x
        term = d * d
    elif LIKELIHOOD == "absolute":
        term = tl.abs(x_hat - x)
    else:
        tl.static_assert(LIKELIHOOD == "bernoulli", "unknown likelihood")
        # (1 - x) x_hat - log sigmoid(x_hat), in which a large logit on the right side of a target near 1 stays exact.
        term = (1.0 - x) * x_hat - tl.where(x_hat < 0, x_hat, 0.0) + log1p_unit(tl.exp(-tl.abs(x_hat)))
    return term


@triton.jit
def error_slope(x, x_hat, LIKELIHOOD: tl.constexpr):
    """Derivative of :func:`error_term` by ``x_hat``."""
    d = x_hat - x
    if LIKELIHOOD == "squared":
        d = 2.0 * d
    elif LIKELIHOOD == "absolute":
        d = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))  # d itself: 0, or a NaN
    else:
        tl.static_assert(LIKELIHOOD == "bernoulli", "unknown likelihood")
        d = 1.0 / (1.0 + tl.exp(-x_hat)) - x
    return d


@triton.jit
def kld_term(mu, logvar):
    """Divergence of one latent variable from the standard normal."""
    return 0.5 * (mu * mu + exp(logvar) - 1.0 - logvar)


@triton.jit
def tile(first, start, M, N, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offset of the row ``first`` (64 bits), offsets ``[BLOCK_M, BLOCK_N]`` from there with columns from ``start`` (32,
    which spares registers), and the mask."""
    rows = tl.arange(0, BLOCK_M)
    columns = start + tl.arange(0, BLOCK_N)
    mask = (rows < M - first)[:, None] & (columns < N)[None, :]
    return first * stride, rows[:, None] * stride + columns[None, :], mask
