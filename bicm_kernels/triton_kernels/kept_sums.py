"""A sample's sum, of squares or of elementwise distances, as it is kept in float64; its distance and its norm.

Where float64 is the compute type, its squares may overflow or underflow: a sum of squares outside of MOST and LEAST is
kept as minus the norm, in units of LARGE_UNIT, which make it 1 at least, or of SMALL_UNIT, which make it less. An
elementwise sum above MOST is kept as minus the sum, in units of LARGE_UNIT.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from bicm_kernels.triton_kernels.hypotenuse import (
    FAINT_32,
    FAINT_64,
    GROW_32,
    GROW_64,
    LARGEST_64,
    distance,
    hypotenuse,
)
from bicm_kernels.triton_kernels.keys import number
from bicm_kernels.triton_kernels.rounding import root

MOST, LEAST = tl.constexpr(2.0**1000), tl.constexpr(2.0**-960)
LARGE_UNIT, SMALL_UNIT = tl.constexpr(2.0**500), tl.constexpr(2.0**-430)
INVERSE_LARGE, INVERSE_SMALL = tl.constexpr(2.0**-500), tl.constexpr(2.0**430)

# Bounds of accurate sums of squares and of distances, those without c separately; and the largest c for them.
LEAST_SQUARE_32, MOST_SQUARE_32 = tl.constexpr(2.0**-100), tl.constexpr(float("inf"))
LEAST_DISTANCE_32, LEAST_STEEP_32, MOST_DISTANCE_32 = (tl.constexpr(2.0**e) for e in (-60, -20, 60))
LEAST_DISTANCE_64, LEAST_STEEP_64, MOST_DISTANCE_64 = (tl.constexpr(2.0**e) for e in (-520, -430, 500))
COMMON_32, COMMON_64 = tl.constexpr(2.0**50), tl.constexpr(2.0**480)
# The scale of distances where their sum overflows; and, at a large c, where the plain formula gives 0.
LESSENED, LITTLE = tl.constexpr(2.0**-20), tl.constexpr(2.0**20)


@triton.jit
def overflows(x):
    """Whether a number is infinite or NaN."""
    return (tl.abs(x) <= LARGEST_64) == 0


@triton.jit
def norm_of(total):
    """The norm of a sum of squares, its unit, and the inverse of the unit."""
    large = total <= -1.0
    kept = total < 0.0
    norm = tl.where(kept, -total, root(tl.where(kept, 0.0, total)))
    unit = tl.where(large, LARGE_UNIT, tl.where(kept, SMALL_UNIT, tl.full(total.shape, 1.0, tl.float64)))
    inverse = tl.where(large, INVERSE_LARGE, tl.where(kept, INVERSE_SMALL, tl.full(total.shape, 1.0, tl.float64)))
    return norm, unit, inverse


@triton.jit
def keep_norm(value, large):
    """A norm in one of the units, as it is kept."""
    norm = value * tl.where(large, LARGE_UNIT, tl.full(value.shape, SMALL_UNIT, tl.float64))
    beyond = tl.where(large, value >= 1.0, (value > 0.0) & (norm * norm < LEAST))
    return tl.where(beyond & (value <= LARGEST_64), -value, norm * norm)


@triton.jit
def keep_distances(value, unit):
    """An elementwise sum in some unit, as it is kept."""
    total = value * unit
    return tl.where((total <= MOST) | overflows(value), total, -(value * (unit * INVERSE_LARGE)))


@triton.jit
def add_sums(a, b, ELEMENTWISE: tl.constexpr, COMPUTE: tl.constexpr):
    """The sums of two parts of samples, added up."""
    total = a + b
    if COMPUTE.primitive_bitwidth == 64:
        plain = ((a >= 0.0) & (b >= 0.0) & (total <= MOST)) | overflows(total)
        if tl.min(plain.to(tl.int32), axis=0) == 0:
            if ELEMENTWISE:
                larger = tl.where(a < 0.0, -a, a * INVERSE_LARGE) + tl.where(b < 0.0, -b, b * INVERSE_LARGE)
                kept = keep_distances(larger, tl.full((), LARGE_UNIT, tl.float64))
            else:
                large = (a <= -1.0) | (b <= -1.0) | (total > MOST)
                inverse = tl.where(large, INVERSE_LARGE, tl.full(a.shape, INVERSE_SMALL, tl.float64))
                x, unit_of_x, _ = norm_of(a)
                y, unit_of_y, _ = norm_of(b)
                kept = keep_norm(hypotenuse(x * (unit_of_x * inverse), y * (unit_of_y * inverse)), large)
            total = tl.where(plain, total, kept)
    return total


@triton.jit
def distance_of_sum(total, elements, c, sample, present, ELEMENTWISE: tl.constexpr, COMPUTE: tl.constexpr):
    """The distances of samples from their sums, in float64; of the squared one c is None."""
    if c is None:
        value = total
        if COMPUTE.primitive_bitwidth == 64:
            norm, unit, _ = norm_of(total)
            value = tl.where(total < 0.0, (norm * unit) * (norm * unit), total)
    elif ELEMENTWISE:
        count = tl.full((), elements, tl.float64)
        value = total / count
        if COMPUTE.primitive_bitwidth == 64:
            value = tl.where(total < 0.0, (-total / count) * LARGE_UNIT, value)
    else:
        transition = number(c, sample, present, COMPUTE).to(tl.float64)
        value = distance(total, transition)
        if COMPUTE.primitive_bitwidth == 64:
            norm, unit, inverse = norm_of(total)
            n = 0.5 * norm
            y = 0.5 * (transition * inverse)
            careful = n / (hypotenuse(n, y) + y) * norm * unit
            value = tl.where(squares_add(total, transition), value, careful)
        value = tl.where((total > LARGEST_64) & (transition <= LARGEST_64), total, value)
    return value


@triton.jit
def squares_add(total, c):
    """Whether the plain formulas suffice for a sum of squares of float64."""
    return (total >= 0.0) & (total <= MOST) & (c <= LARGE_UNIT)


@triton.jit
def trusted(total, c, ELEMENTWISE: tl.constexpr):
    """Whether no term can have overflowed and underflow is negligible; and whether the sum is too small."""
    if c.dtype == tl.float64:
        if ELEMENTWISE:
            small = total < tl.where(c < FAINT_64, LEAST_STEEP_64, tl.full((), LEAST_DISTANCE_64, tl.float64))
            fits = (total <= MOST_DISTANCE_64) & (c <= COMMON_64)
        else:
            small = total < LEAST
            fits = total <= MOST
    else:
        if ELEMENTWISE:
            small = total < tl.where(c < FAINT_32, LEAST_STEEP_32, tl.full((), LEAST_DISTANCE_32, tl.float64))
            fits = (total <= MOST_DISTANCE_32) & (c <= COMMON_32)
        else:
            small = total < LEAST_SQUARE_32
            fits = total < MOST_SQUARE_32
    return fits & (small == 0), small


@triton.jit
def plain_slopes(total, c):
    """Whether the plain formula is accurate for every slope of one sample's elementwise distances."""
    sum_ = tl.sum(total, axis=0)
    transition = tl.sum(tl.sum(c, axis=1), axis=0)
    if c.dtype == tl.float64:
        fits = (sum_ <= MOST_DISTANCE_64) & (transition >= FAINT_64) & (transition <= COMMON_64)
    else:
        fits = (sum_ <= MOST_DISTANCE_32) & (transition >= FAINT_32) & (transition <= COMMON_32)
    return fits & (sum_ >= 0.0)


@triton.jit
def keep_sum(total, scale, ELEMENTWISE: tl.constexpr):
    """A sum that was taken with a scale, as it is kept."""
    grows = scale > 1.0
    one = tl.full(total.shape, 1.0, tl.float64)
    if scale.dtype == tl.float64:
        if ELEMENTWISE:
            unit = tl.where(scale == LITTLE, LESSENED, tl.where(grows, one * 2.0**-600, LITTLE))
            kept = keep_distances(total, unit)
        else:
            kept = keep_norm(root(total) * tl.where(grows, one * 2.0**-170, one * 2.0**100), one * scale < 1.0)
    else:
        if ELEMENTWISE:
            kept = total * tl.where(scale == LITTLE, LESSENED, tl.where(grows, one * 2.0**-96, LITTLE))
        else:
            kept = total * tl.where(grows, one * 2.0**-192, one * 2.0**192)
    return kept


@triton.jit
def scaled_back(total, scale, c, ELEMENTWISE: tl.constexpr):
    """A chunk's sum, taken with `scale`, the next scale, and 1 where the sum has to be taken again with that."""
    found = tl.sum(total, axis=0)
    transition = tl.sum(tl.sum(c, axis=1), axis=0)
    again = 0
    if scale != 1.0:
        total = keep_sum(total, scale, ELEMENTWISE)
    else:
        fits, small = trusted(found, transition, ELEMENTWISE)
        if fits == 0:
            again = 1
            if c.dtype == tl.float64:
                grow = tl.full((), GROW_64, tl.float64)
                common = transition <= COMMON_64
            else:
                grow = tl.full((), GROW_32, tl.float32)
                common = transition <= COMMON_32
            if ELEMENTWISE:
                scale = tl.where(small, tl.where(common, grow, LITTLE), LESSENED)
            else:
                scale = tl.where(small, grow, 1.0 / grow)
    return total, scale, again


@triton.jit
def norm_with(total, c):
    """sqrt(total + c^2) times a power of two in the type of c, and that power; float32 for any size of the sum."""
    if c.dtype == tl.float32:
        high = total.to(tl.float32)
        large = high > 2.0**100
        wide = c > 2.0**63
        small = (high < 2.0**-100) & (c < FAINT_32)
        shift = tl.where(large, -192, tl.where(wide, -132, tl.where(small & (total > 0.0), 192, 0))).to(tl.int64) << 52
        bits = total.to(tl.int64, bitcast=True)
        # A float64 sum of float32 squares is far from the ends of its range; 0 and non-finite values are unchanged.
        moved = (bits + shift).to(tl.float64, bitcast=True).to(tl.float32)
        high = tl.where((total > 0.0) & (total < float("inf")), moved, high)
        power = tl.where(large, 2.0**-96, tl.where(wide, 2.0**-66, tl.where(small, 2.0**96, 1.0)))
        scaled = c * power
        length = root(high + scaled * scaled)
    else:
        norm, _, inverse = norm_of(total)
        plain = squares_add(total, c)
        power = tl.where(plain, 1.0, inverse)
        length = tl.where(plain, root(total + c * c), hypotenuse(norm, c * inverse))
    return length, power
