"""Functions of numbers that kernels of several families need, in Triton: accurate, and the same in its interpreter.

``tl.exp`` and arithmetic are all they are made of: the interpreter has no ``log1p`` or ``tanh``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(z):
    """Within a few ulp of float32 and float64; odd, at most 1, NaN for NaN."""
    a = tl.abs(z)
    e = tl.exp(-2.0 * a)
    # 1 - e cancels for small a; there, the continued fraction with six levels, good to 5e-17.
    s = tl.where(a < 0.25, a * a, 0.0)
    small = a * (10395.0 + s * (1260.0 + s * 21.0)) / (10395.0 + s * (4725.0 + s * (210.0 + s)))
    h = tl.where(a < 0.25, small, (1.0 - e) / (1.0 + e))
    return tl.where(z < 0, -h, h)


@triton.jit
def sigmoid(z):
    e = tl.exp(-tl.abs(z))  # never overflows
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def softplus(z):
    """log(1 + exp(z)), small values with all their digits."""
    e = tl.exp(-tl.abs(z))
    # log(1 + e) = 2 artanh(s), s = e / (2 + e) at most 1/3: the series to 2e-17, since log itself loses digits at 1.
    s = e / (2.0 + e)
    square = s * s
    series = square * (1.0 / 33.0)
    for n in tl.static_range(15):
        series = square * (series + 1.0 / (31.0 - 2.0 * n))
    return tl.where(z > 0, z, 0.0) + 2.0 * (s + s * series)


@triton.jit
def expm1_of_negative(z):
    """exp(z) - 1 for z <= 0, and 0 for z > 0."""
    t = tanh(0.5 * tl.where(z > 0, 0.0, z))
    return 2.0 * t / (1.0 - t)
