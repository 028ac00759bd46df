"""sqrt(r^2 + c^2) for numbers of any size.

Where the squares of residuals or c would overflow or lose digits, both are multiplied by a power
of two first, which is exact. Otherwise the power is 1, and the bits are those of the plain formulas.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from bicm_kernels.triton_kernels.rounding import divide, root

# For float32 and float64: numbers whose squares, and sums of two, are normal; from FAINT on, c^2 absorbs what squares
# below LEAST^2 lose; the powers of two for smaller and for larger ones.
LEAST_32, MOST_32, LARGEST_32 = tl.constexpr(2.0**-63), tl.constexpr(2.0**63), tl.constexpr((2 - 2.0**-23) * 2.0**127)
LEAST_64, MOST_64, LARGEST_64 = tl.constexpr(2.0**-511), tl.constexpr(2.0**511), tl.constexpr(1.7976931348623157e308)
FAINT_32, GROW_32, SHRINK_32 = tl.constexpr(2.0**-50), tl.constexpr(2.0**96), tl.constexpr(2.0**-66)
FAINT_64, GROW_64, SHRINK_64 = tl.constexpr(2.0**-480), tl.constexpr(2.0**600), tl.constexpr(2.0**-514)


@triton.jit
def nonzero(x):
    """Safe divisor: 0/0 gives 0."""
    return tl.where(x == 0.0, 3.0, x)


@triton.jit
def distance(s, c):
    """sqrt(s + c^2) - c without cancellation; 0 at s = c = 0."""
    return divide(s, nonzero(root(s + c * c) + c))


@triton.jit
def power_for(size, c):
    """The power of two by which squares of a residual of this size and of c keep all digits of their sum."""
    larger = tl.where(size > c, size, c)
    power = tl.full(size.shape, 1.0, size.dtype)
    if size.dtype == tl.float64:
        power = tl.where((size < LEAST_64) & (larger < FAINT_64), GROW_64, power)
        power = tl.where(larger > MOST_64, SHRINK_64, power)
    else:
        power = tl.where((size < LEAST_32) & (larger < FAINT_32), GROW_32, power)
        power = tl.where(larger > MOST_32, SHRINK_32, power)
    return power


@triton.jit
def slope(r, c):
    """r / sqrt(r^2 + c^2) where squares do not overflow, and those that underflow are negligible against c^2."""
    return divide(r, nonzero(root(r * r + c * c)))


@triton.jit
def slope_anywhere(r, c):
    """r / sqrt(r^2 + c^2); 0 at r = c = 0, NaN for an infinite r."""
    power = power_for(tl.abs(r), c)
    x = r * power
    y = c * power
    return divide(x, nonzero(root(x * x + y * y)))


@triton.jit
def distance_anywhere(r, c, scale):
    """sqrt(r^2 + c^2) - c times a power of two, infinite for an infinite r."""
    size = tl.abs(r)
    power = power_for(size, c)
    if r.dtype == tl.float64:
        finite = tl.where(size > LARGEST_64, LARGEST_64, size)
        normal = size >= LEAST_64
    else:
        finite = tl.where(size > LARGEST_32, LARGEST_32, size)
        normal = size >= LEAST_32
    x = finite * power
    y = c * power
    # The quotient of squares, with the plain formula's bits; or the quotient of the numbers, times the residual.
    plain = (power == 1.0) & normal
    quotient = divide(tl.where(plain, x * x, x), nonzero(root(x * x + y * y) + y))
    return quotient * scale * tl.where(plain, 1.0, size)


@triton.jit
def hypotenuse(a, b):
    """sqrt(a^2 + b^2) of float64 numbers from 0 on whose squares may overflow."""
    larger = tl.where(a > b, a, b)
    ratio = tl.where(a > b, b, a) / nonzero(larger)
    return larger * root(1.0 + ratio * ratio)
