"""The kernels of Gaussian policies; gaussian.py launches them.

A chunk's sum is kept in two numbers of the compute type for each of its columns (the second holds the rounding error
of the first), and columns are added in pairs, independent of how the compiler splits a tile. So a step and
the density of its result agree to the bit, though they are different programs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from bicm_kernels.triton_kernels.counter import finishes_last
from bicm_kernels.triton_kernels.keys import number
from bicm_kernels.triton_kernels.noise import draw
from bicm_kernels.triton_kernels.operands import load, locate, store
from bicm_kernels.triton_kernels.pseudo_huber_kernels import add_term

HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)


@triton.jit
def mean_of(
    inputs,
    conditional,
    sizes,
    coefficients,
    guidance_scale,
    sample,
    present,
    element,
    inside,
    TERMS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The sum of w_k x_k of a tile, from the left."""
    y = tl.zeros(inside.shape, COMPUTE)
    for k in tl.static_range(TERMS):
        x = load(inputs[k], sizes, sample, element, inside, COMPUTE)
        if k == TERMS - 1 and conditional is not None:
            cond = load(conditional, sizes, sample, element, inside, COMPUTE)
            x = x + number(guidance_scale, sample, present, COMPUTE) * (cond - x)
        product = number(coefficients[k], sample, present, COMPUTE) * x
        if k == 0:
            y = product
        else:
            y = y + product
    return y


@triton.jit
def as_stored(y, operand):
    """A tile as a tensor holds it, in the compute type."""
    dtype: tl.constexpr = operand[0].dtype.element_ty
    rounded = y
    if y.dtype == tl.float64 and dtype.primitive_bitwidth == 16:
        rounded = y.to(tl.float32)
    return rounded.to(dtype).to(y.dtype)


@triton.jit
def other_of(
    recorded,
    references,
    sizes,
    coefficients,
    sample,
    present,
    element,
    inside,
    TERMS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The minuend of the residual: a given state, or the reference's mean."""
    if recorded is not None:
        y = load(recorded, sizes, sample, element, inside, COMPUTE)
    else:
        y = mean_of(references, None, sizes, coefficients, None, sample, present, element, inside, TERMS, COMPUTE)
    return y


@triton.jit
def tree_sum(x, COUNT: tl.constexpr):
    """The sum of (1, COUNT) as a scalar, by repeated halving; COUNT is a power of two."""
    y = tl.reshape(x, (COUNT,))
    for k in tl.static_range(0, 16):
        if COUNT >> k > 1:
            y = tl.sum(tl.reshape(y, (2, COUNT >> (k + 1))), axis=0)
    return tl.sum(y, axis=0)


@triton.jit
def density(
    total, elements, std, sample, present, DIVERGES: tl.constexpr, ADDS_UP: tl.constexpr, COMPUTE: tl.constexpr
):
    """The results of samples from their sums, in float64; 0 for a step without noise."""
    s = number(std, sample, present, COMPUTE).to(tl.float64)
    count = tl.full(total.shape, elements, tl.float64)
    still = s == 0.0
    s = tl.where(still, 1.0, s)
    square = 2.0 * s * s
    value = total / square
    if not ADDS_UP:
        value = (total / count) / square
    if not DIVERGES:
        constant = tl.log(s) + HALF_LOG_TWO_PI
        if ADDS_UP:
            constant = count * constant
        value = -value - constant
    return tl.where(still, 0.0, value)


@triton.jit(do_not_specialize=["batch", "chunks", "begun", "seed", "step", "sample_id"])
def density_sums(
    results,
    partial,
    finished,
    begun: tl.int64,
    out,
    inputs,
    conditional,
    recorded,
    references,
    sizes,
    batch,
    elements,
    chunks,
    coefficients,
    guidance_scale,
    std,
    seed: tl.int64,
    step: tl.int64,
    sample_id: tl.int64,
    key_tensors,
    TERMS: tl.constexpr,
    DRAWS: tl.constexpr,
    COUNTS: tl.constexpr,
    ADDS_UP: tl.constexpr,
    COMPUTE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    """One chunk: with `out`, the next state; the sum of its squares; the last program makes the samples' results.

    `finished` counts the programs from `begun` on; None: every sample is one chunk.
    """
    DIVERGES: tl.constexpr = out is None and recorded is None
    item = tl.program_id(0).to(tl.int64)
    sample = tl.full((1, 1), item // chunks, tl.int64)
    present = sample >= 0
    begin = (item % chunks).to(INDEX) * (COLUMNS * STEPS)
    high = tl.zeros((1, COLUMNS), COMPUTE)
    low = tl.zeros((1, COLUMNS), COMPUTE)
    for turn in range(STEPS):
        first = begin + turn * COLUMNS
        element = first + tl.arange(0, COLUMNS)[None, :]
        inside = element < elements
        mean = mean_of(
            inputs, conditional, sizes, coefficients, guidance_scale, sample, present, element, inside, TERMS, COMPUTE
        )
        if out is not None:
            other = mean
            if DRAWS:
                w = number(std, sample, present, COMPUTE)
                n = draw(seed, step, sample_id, key_tensors, sample, present, first, True, COUNTS, COLUMNS, GROUP)
                other = tl.where(w != 0.0, mean + w * n.to(COMPUTE), mean)
            store(out, sizes, sample, element, inside, other)
            other = as_stored(other, out)
        else:
            other = other_of(
                recorded, references, sizes, coefficients, sample, present, element, inside, TERMS, COMPUTE
            )
        r = tl.where(inside, other - mean, 0.0)
        high, low = add_term(high, low, r * r)
    low = tl.where(low == low, low, 0.0)  # the rounding error of an infinite sum is NaN: drop it
    total = tree_sum(high.to(tl.float64) + low.to(tl.float64), COLUMNS)
    if finished is None:
        row = sample.reshape(1)
        value = density(tl.full((1,), total, tl.float64), elements, std, row, row >= 0, DIVERGES, ADDS_UP, COMPUTE)
        tl.store(results + row, value.to(results.dtype.element_ty))
    else:
        tl.store(partial + item, total)
        if finishes_last(finished, begun):
            for start in range(0, batch, BLOCK):
                row = start + tl.arange(0, BLOCK).to(tl.int64)
                there = row < batch
                value = tl.zeros((BLOCK,), tl.float64)
                for chunk in range(chunks):
                    # Other programs wrote the chunks: `.cg` bypasses L1.
                    value += tl.load(partial + row * chunks + chunk, mask=there, other=0.0, cache_modifier=".cg")
                value = density(value, elements, std, row, there, DIVERGES, ADDS_UP, COMPUTE)
                tl.store(results + row, value.to(results.dtype.element_ty), mask=there)


@triton.jit
def split_power(base):
    """A float64 factor as a power of two in float32's range and the rest; (1, factor) where it is in range itself."""
    exponent = ((base.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023
    outside = (exponent > -1023) & ((exponent < -126) | (exponent > 126))
    exponent = tl.where(outside, tl.minimum(tl.maximum(exponent, -126), 126), 0)
    power = ((1023 + exponent) << 52).to(tl.float64, bitcast=True)
    inverse = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)
    return power, base * inverse


@triton.jit(do_not_specialize=["batch", "blocks"])
def density_gradients(
    outs,
    inputs,
    conditional,
    recorded,
    references,
    sizes,
    batch,
    elements,
    blocks,
    coefficients,
    guidance_scale,
    std,
    upstream,
    TERMS: tl.constexpr,
    ADDS_UP: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The derivatives in the state or the reference's tensors, then in the mean's, those that are not None."""
    sample, present, _, element, inside = locate(elements, batch, blocks, ROWS, COLUMNS, INDEX)
    mean = mean_of(
        inputs, conditional, sizes, coefficients, guidance_scale, sample, present, element, inside, TERMS, COMPUTE
    )
    r = other_of(recorded, references, sizes, coefficients, sample, present, element, inside, TERMS, COMPUTE) - mean
    s = number(std, sample, present, COMPUTE).to(tl.float64)
    square = s * s
    if not ADDS_UP:
        square *= tl.full(square.shape, elements, tl.float64)
    base = number(upstream, sample, present, tl.float64) / tl.where(s == 0.0, 1.0, square)
    base = tl.where(s == 0.0, 0.0, base)
    if COMPUTE.primitive_bitwidth == 32:
        power, base = split_power(base)
        r = r * power.to(COMPUTE)
    GIVEN: tl.constexpr = 1 if recorded is not None else TERMS
    if recorded is not None and outs[0] is not None:
        store(outs[0], sizes, sample, element, inside, (-base).to(COMPUTE) * r)
    for k in tl.static_range(TERMS):
        w = number(coefficients[k], sample, present, COMPUTE).to(tl.float64)
        if recorded is None:
            if outs[k] is not None:
                store(outs[k], sizes, sample, element, inside, (base * w).to(COMPUTE) * r)
            w = -w
        if k == TERMS - 1 and conditional is not None:
            scale = number(guidance_scale, sample, present, COMPUTE).to(tl.float64)
            if outs[GIVEN + TERMS] is not None:
                store(outs[GIVEN + TERMS], sizes, sample, element, inside, (base * (w * scale)).to(COMPUTE) * r)
            w = w * (1.0 - scale)
        if outs[GIVEN + k] is not None:
            store(outs[GIVEN + k], sizes, sample, element, inside, (base * w).to(COMPUTE) * r)
