"""Exact steps on tiles: csrc/core/reversible.h in Triton, integer for integer.

The least int64 represents NaN: an element that leaves the range becomes it and stays it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from bicm_kernels.triton_kernels.keys import integer, number
from bicm_kernels.triton_kernels.operands import addresses, load, locate, store

LARGEST = tl.constexpr(2**63 - 1)
MISSING = tl.constexpr(-(2**63))
MISSING_32 = tl.constexpr(-(2**31))
MAX_RATIO = tl.constexpr(2**20)


@triton.jit
def power_of_two(exponent, sample):
    """2^exponent for each row, for small exponents."""
    return ((tl.full(sample.shape, exponent, tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def load_integers(operand, sizes, sample, element, inside):
    """A tile of a state or a buffer."""
    q = tl.load(addresses(operand, sizes, sample, element), mask=inside, other=0)
    result = q.to(tl.int64)
    if q.dtype == tl.int32:
        result = tl.where(q == MISSING_32, MISSING, result)
    return result


@triton.jit
def load_values(operand, sizes, sample, element, inside, unit):
    """A tile in float64; a state is decoded, rounded once, and NaN where it is missing."""
    if operand[0].dtype.element_ty.is_int():
        q = load_integers(operand, sizes, sample, element, inside)
        values = tl.where(q == MISSING, float("nan"), q.to(tl.float64) * unit)
    else:
        values = load(operand, sizes, sample, element, inside, tl.float64)
    return values


@triton.jit
def encode(x):
    """rint(x). Triton has no rounding to even for float64: truncate, and round by the exact remainder."""
    inside = (x < 9223372036854775808.0) & (x > -9223372036854775808.0)
    x = tl.where(inside, x, 0.0)
    whole = x.to(tl.int64)
    rest = tl.abs(x - whole.to(tl.float64))
    away = (rest > 0.5) | ((rest == 0.5) & ((whole & 1) != 0))
    whole += tl.where(away, tl.where(x < 0.0, -1, 1), 0)
    return tl.where(inside, whole, MISSING)


@triton.jit
def within(x, largest):
    return tl.where((x <= largest) & (x >= -largest), x, MISSING)


@triton.jit
def plus(x, y, largest):
    """x + y where neither is missing and the sum is within [-largest, largest]."""
    total = x + y
    wrapped = ((x ^ total) & (y ^ total)) < 0
    return tl.where(wrapped | (x == MISSING) | (y == MISSING), MISSING, within(total, largest))


@triton.jit
def make_factor(value):
    """(value, its reciprocal, high, high_rest, low, low_rest); high value + high_rest = 2^63 - 1, low likewise."""
    reciprocal = tl.full(value.shape, -1, tl.int64).to(tl.uint64) // value.to(tl.uint64)
    high = (reciprocal >> 1).to(tl.int64)
    high_rest = LARGEST - high * value
    exact = high_rest == 0
    low = tl.where(exact, 0, -1) - high
    low_rest = tl.where(exact, 0, value - high_rest)
    return value, reciprocal, high, high_rest, low, low_rest


@triton.jit
def floor_divide(x, by):
    """Quotient and remainder towards minus infinity (Triton's truncate): floor(x/d) = ~floor(~x/d) below 0."""
    sign = x >> 63
    d = by[0].to(tl.uint64)
    size = (x ^ sign).to(tl.uint64)
    quotient = tl.umulhi(size, by[1])
    remainder = size - quotient * d
    more = remainder >= d
    quotient = (quotient + more.to(tl.uint64)).to(tl.int64)
    remainder = remainder.to(tl.int64)
    remainder = tl.where(more, remainder - by[0], remainder)
    return quotient ^ sign, tl.where(x < 0, by[0] - 1 - remainder, remainder)


@triton.jit
def multiply_add(x, by, rest):
    """x by + rest, 0 <= rest < by, and whether it is within [-LARGEST, LARGEST], decided before the product."""
    high = by[2] - (rest > by[3]).to(tl.int64)
    low = by[4] + (rest < by[5]).to(tl.int64)
    return x * by[0] + rest, (x <= high) & (x >= low)


@triton.jit
def scale(q, buffer, source, target):
    """q target/source, and the buffer that undoes it (Maclaurin, Duvenaud & Adams 2015)."""
    state, remainder = floor_divide(q, source)
    total, fits = multiply_add(buffer, source, remainder)
    kept, rest = floor_divide(total, target)
    scaled, also_fits = multiply_add(state, target, rest)
    return tl.where(fits & also_fits & (q != MISSING), scaled, MISSING), kept


@triton.jit
def bdia_weights(raw, n, m):
    """BDIA eq. 24 without its first term."""
    gamma = n.to(tl.float64) / m.to(tl.float64)
    return raw[0] - gamma / raw[2], raw[1] + gamma * (raw[3] / raw[2])


@triton.jit
def increments(tiles, weights, per_unit, TERMS: tl.constexpr):
    """The sum of w_k x_k from the left, rounded once to the grid."""
    y = weights[0] * tiles[0]
    for k in tl.static_range(1, TERMS):
        y = y + weights[k] * tiles[k]
    return encode(y * per_unit)


@triton.jit
def note(overflow, mark, mark_tensor, missing, sample, present):
    """Mark the rows in which something is missing and that have no mark yet.

    Programs may share a row: they write the same mark, and only where there is none, so their order does not matter.
    """
    found = tl.max(missing.to(tl.int32), axis=1, keep_dims=True) != 0
    entry = overflow[0] + sample * overflow[1]
    before = tl.load(entry, mask=found & present, other=1, volatile=True)
    tl.store(entry, integer(mark, mark_tensor, sample, present), mask=found & present & (before == 0))


@triton.jit(do_not_specialize=["batch", "blocks", "n", "m", "fraction_bits", "mark"])
def exact_step(
    out,
    info_out,
    last,
    info,
    inputs,
    conditional,
    sizes,
    batch,
    elements,
    blocks,
    coefficients,
    guidance_scale,
    n: tl.int64,
    n_tensor,
    m: tl.int64,
    m_tensor,
    fraction_bits: tl.int64,
    overflow,
    mark: tl.int64,
    mark_tensor,
    TERMS: tl.constexpr,
    BDIA: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    INDEX: tl.constexpr,
):
    """mul(last) + increment, or div(last - increment); without a last state the increment itself, an encoding.

    Without an info the ratio is 1.
    """
    sample, present, _, element, inside = locate(elements, batch, blocks, ROWS, COLUMNS, INDEX)
    unit, per_unit = power_of_two(-fraction_bits, sample), power_of_two(fraction_bits, sample)
    tiles = ()
    for k in tl.static_range(TERMS):
        x = load_values(inputs[k], sizes, sample, element, inside, unit)
        if k == TERMS - 1 and conditional is not None:
            cond = load_values(conditional, sizes, sample, element, inside, unit)
            x = x + number(guidance_scale, sample, present, tl.float64) * (cond - x)
        tiles += (x,)  # type: ignore[assignment]
    raw = ()
    for k in tl.static_range(len(coefficients)):
        raw += (number(coefficients[k], sample, present, tl.float64),)  # type: ignore[assignment]
    if info is None:
        numerator = tl.full(sample.shape, 1, tl.int64)
        denominator = numerator
    else:
        numerator, denominator = integer(n, n_tensor, sample, present), integer(m, m_tensor, sample, present)
    if BDIA:
        raw = bdia_weights(raw, numerator, denominator)
    increment = increments(tiles, raw, per_unit, TERMS)

    largest = LARGEST
    if out[0].dtype.element_ty == tl.int32:
        largest = -(MISSING_32 + 1)
    if last is None:
        result = within(increment, largest)
    else:
        state = load_integers(last, sizes, sample, element, inside)
        if INVERSE:
            state = plus(state, 0 - increment, largest)
        result = state
        if info is not None:
            buffer = load_integers(info, sizes, sample, element, inside)
            valid = (numerator >= 1) & (numerator <= MAX_RATIO) & (denominator >= 1) & (denominator <= MAX_RATIO)
            one = (numerator == denominator) | (valid == 0)
            over, under = make_factor(tl.where(one, 1, numerator)), make_factor(tl.where(one, 1, denominator))
            if INVERSE:
                scaled, kept = scale(state, buffer, over, under)
            else:
                scaled, kept = scale(state, buffer, under, over)
            result = tl.where(valid, tl.where(one, state, scaled), MISSING)
        if not INVERSE:
            result = plus(result, increment, largest)
        if info is not None:
            kept = tl.where(one | (result == MISSING), buffer, kept)
            store(info_out, sizes, sample, element, inside, kept)

    missing = result == MISSING
    if out[0].dtype.element_ty == tl.int32:
        result = tl.where(missing, MISSING_32, result)
    store(out, sizes, sample, element, inside, result)
    if overflow is not None:
        note(overflow, mark, mark_tensor, missing & inside, sample, present)


@triton.jit(do_not_specialize=["batch", "blocks", "fraction_bits"])
def decode_fixed_point(
    out,
    q,
    sizes,
    batch,
    elements,
    blocks,
    fraction_bits: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    INDEX: tl.constexpr,
):
    sample, _, _, element, inside = locate(elements, batch, blocks, ROWS, COLUMNS, INDEX)
    unit = power_of_two(-fraction_bits, sample)
    store(out, sizes, sample, element, inside, load_values(q, sizes, sample, element, inside, unit))
