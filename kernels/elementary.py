"""Elementary functions that must be more exact than the machine's fast instructions, as device functions on fp32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """``e**x`` to about one rounding for every x, infinite above 88.7.

    ``tl.exp`` is the machine's ``2**y`` at ``y = x * log2(e)``, whose rounding is an error of |x| roundings in the
    result. Here x = n ln 2 + r with ln 2 in two parts (Cody and Waite 1980), and only r goes there.
    """
    n = tl.floor(tl.minimum(tl.maximum(x, -160.0), 160.0) * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    # 2**n as a square, so that e**88.5, which needs n = 128, does not overflow on the way.
    half = tl.floor(n * 0.5)
    # A NaN goes through r; an infinity would meet its opposite there.
    return tl.where(tl.abs(x) == float("inf"), tl.exp(x), tl.exp2(half) * (tl.exp2(n - half) * tl.exp(r)))


@triton.jit
def log1p_unit(e):
    """``log(1 + e)`` for e in [0, 1], exact to a few roundings however small e is.

    By ``2 artanh(s)``, ``s = e / (2 + e) <= 1/3``: odd powers of s, the first one left out below 1e-8 of the sum.
    """
    s = e / (2.0 + e)
    t = s * s
    p = 1.0 / 13.0 + t * (1.0 / 15.0)
    p = 1.0 / 11.0 + t * p
    p = 1.0 / 9.0 + t * p
    p = 1.0 / 7.0 + t * p
    p = 1.0 / 5.0 + t * p
    p = 1.0 / 3.0 + t * p
    return 2.0 * (s + s * t * p)


@triton.jit
def cos_turns(u):
    """``cos(2 pi u)`` for u in [0, 1], to about one rounding of 1.

    As the sine of ``2 pi (1/4 - r)``, r the distance to the nearest whole turn, by its series. The subtraction is
    exact, and there is no path for large angles, whose table the general cosine keeps in memory.
    """
    r = tl.abs(u - tl.floor(u + 0.5))
    x = (0.25 - r) * 6.283185307179586
    t = x * x
    p = -1.0 / 39916800.0 + t * (1.0 / 6227020800.0)
    p = 1.0 / 362880.0 + t * p
    p = -1.0 / 5040.0 + t * p
    p = 1.0 / 120.0 + t * p
    p = -1.0 / 6.0 + t * p
    return x + x * t * p
