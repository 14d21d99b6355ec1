"""Activations and their derivatives as device functions, by the names of ``rvae_fast._activations``.

Both take the pre-activation in fp32 and an activation's name as a compile-time constant. NaN goes through every one of
them (so comparisons are written to be false for NaN where the input must survive): a training loop looks for it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # By exp(-2 |x|), which cannot overflow; the absolute error is one rounding of 1.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, slope):
    """``activation(x)`` in fp32; ``slope`` is LeakyReLU's."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x > 0, x, x * slope)
    elif ACTIVATION == "elu":
        x = tl.where(x > 0, x, tl.exp(x) - 1.0)
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = x * _normal_cdf(x)
    elif ACTIVATION == "tanh":
        x = _tanh(x)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
    return x


@triton.jit
def activate_backward(grad, x, ACTIVATION: tl.constexpr, slope):
    """``grad * activation'(x)`` in fp32, with PyTorch's choice of derivative at the kinks."""
    if ACTIVATION == "relu":
        grad = tl.where(x <= 0, 0.0, grad)
    elif ACTIVATION == "leaky_relu":
        grad = tl.where(x > 0, grad, grad * slope)
    elif ACTIVATION == "elu":
        grad = tl.where(x > 0, grad, grad * tl.exp(x))
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-x))
        grad = grad * s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        # cdf(x) + x * pdf(x); 0.3989... is 1 / sqrt(2 pi)
        grad = grad * (_normal_cdf(x) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACTIVATION == "tanh":
        t = _tanh(x)
        grad = grad * (1.0 - t * t)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
    return grad
