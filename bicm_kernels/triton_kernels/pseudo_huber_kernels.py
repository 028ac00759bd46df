"""The kernels of the pseudo-Huber losses; pseudo_huber.py launches them.

A chunk's sum is kept in two numbers of the compute type (the second holds the rounding error of the first), because
most GPUs are slow in double precision.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from bicm_kernels.triton_kernels.counter import finishes_last
from bicm_kernels.triton_kernels.hypotenuse import distance, distance_anywhere
from bicm_kernels.triton_kernels.kept_sums import add_sums, distance_of_sum, overflows, scaled_back
from bicm_kernels.triton_kernels.keys import number
from bicm_kernels.triton_kernels.operands import load
from bicm_kernels.triton_kernels.preconditioning_kernels import bcm, cm


@triton.jit
def denoising_weights(levels, sample, present, FORM: tl.constexpr, SCALED: tl.constexpr, COMPUTE: tl.constexpr):
    """(c_skip, c_out) of every row; `levels` are t, u or sigma_min, sigma_data."""
    t = number(levels[0], sample, present, COMPUTE)
    u = number(levels[1], sample, present, COMPUTE)
    sigma_data = number(levels[2], sample, present, COMPUTE)
    if FORM == "cm":
        weights = cm(t, u, sigma_data, SCALED)
    else:
        weights = bcm(t, u, sigma_data, SCALED)
    return weights


@triton.jit
def residual(prediction, target, x, weights, sizes, sample, element, inside, COMPUTE: tl.constexpr):
    """Of a tile, in the compute type; 0 where no element is."""
    r = load(prediction, sizes, sample, element, inside, COMPUTE)
    if x is not None:
        r = weights[0] * load(x, sizes, sample, element, inside, COMPUTE) + weights[1] * r
    r = r - load(target, sizes, sample, element, inside, COMPUTE)
    return tl.where(inside, r, 0.0)


@triton.jit
def add_term(high, low, term):
    """high + low + term: the sum, and its rounding error."""
    total = high + term
    part = total - high
    return total, low + ((high - (total - part)) + (term - part))


@triton.jit
def sum_of(high, low):
    """A tile's sums, added up: (1,) in float64. The rounding error of an infinite one is NaN and is dropped."""
    low = tl.where(low == low, low, 0.0)
    return tl.sum(high.to(tl.float64), axis=1) + tl.sum(low, axis=1).to(tl.float64)


@triton.jit
def term_of(r, c, scale, ELEMENTWISE: tl.constexpr):
    """A residual's part of the sum."""
    if ELEMENTWISE:
        if scale == 1.0:
            term = distance(r * r, c)
        else:
            term = distance_anywhere(r, c, scale)
    else:
        scaled = r * scale
        term = scaled * scaled
    return term


@triton.jit
def weighed_term(r, c, weight, ELEMENTWISE: tl.constexpr):
    """A residual's part of a sum whose terms have weights, in float64."""
    if ELEMENTWISE:
        term = distance_anywhere(r, c, tl.full((), 1.0, r.dtype)).to(tl.float64)
    else:
        term = r.to(tl.float64) * r.to(tl.float64)
    return weight * term


@triton.jit
def chunk_sum(
    prediction,
    target,
    x,
    element_weight,
    sizes,
    sample,
    first,
    elements,
    weights,
    c,
    scale,
    ELEMENTWISE: tl.constexpr,
    COMPUTE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Distances times `scale`, or squares of the residuals times `scale`, added up: (1,) in float64."""
    SUM: tl.constexpr = COMPUTE if element_weight is None else tl.float64
    high = tl.zeros((1, COLUMNS), SUM)
    low = tl.zeros((1, COLUMNS), SUM)
    for step in range(STEPS):
        element = first + step * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = element < elements
        r = residual(prediction, target, x, weights, sizes, sample, element, inside, COMPUTE)
        if element_weight is None:
            term = term_of(r, c, scale, ELEMENTWISE)
        else:
            term = weighed_term(r, c, load(element_weight, sizes, sample, element, inside, tl.float64), ELEMENTWISE)
        high, low = add_term(high, low, term)
    return sum_of(high, low)


@triton.jit(do_not_specialize=["batch", "chunks", "begun"])
def sums(
    totals,
    partial,
    loss,
    finished,
    begun: tl.int64,
    prediction,
    target,
    x,
    element_weight,
    sizes,
    batch,
    elements,
    chunks,
    levels,
    c,
    weight,
    FORM: tl.constexpr,
    SCALED: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    REDUCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The sum of one chunk; the program that finishes last makes the loss of all of them.

    `finished` counts the programs from `begun` on; None: every sample is one chunk, and its loss its own.
    """
    item = tl.program_id(0).to(tl.int64)
    sample = tl.full((1, 1), item // chunks, tl.int64)
    first = (item % chunks).to(INDEX) * (COLUMNS * STEPS)
    weights = (0.0, 1.0)
    if x is not None:
        weights = denoising_weights(levels, sample, sample >= 0, FORM, SCALED, COMPUTE)
    transition = number(c, sample, sample >= 0, COMPUTE)
    # Squares of float32 overflow above 1.8e19 and lose digits below 1e-19. Where the sum indicates this, they
    # are recomputed from residuals times a power of two, which is exact.
    scale = tl.full((), 1.0, COMPUTE)
    total = tl.zeros((1,), tl.float64)
    rounds = 1
    while rounds > 0:
        total = chunk_sum(
            prediction,
            target,
            x,
            element_weight,
            sizes,
            sample,
            first,
            elements,
            weights,
            transition,
            scale,
            ELEMENTWISE,
            COMPUTE,
            COLUMNS,
            STEPS,
        )
        rounds -= 1
        if element_weight is None:
            total, scale, again = scaled_back(total, scale, transition, ELEMENTWISE)
            rounds += again
        else:
            # Negative weights have no norm, and a negative kept sum has another meaning.
            total = tl.where(total < 0.0, float("nan"), total)
    conclude(
        total,
        totals,
        partial,
        loss,
        finished,
        begun,
        sample,
        item,
        batch,
        elements,
        chunks,
        c,
        weight,
        ELEMENTWISE,
        REDUCTION,
        COMPUTE,
        BLOCK,
    )


@triton.jit
def conclude(
    total,
    totals,
    partial,
    loss,
    finished,
    begun,
    sample,
    item,
    batch,
    elements,
    chunks,
    c,
    weight,
    ELEMENTWISE: tl.constexpr,
    REDUCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a chunk's sum, and the loss where there is one chunk; otherwise the last program combines all."""
    if finished is None:
        tl.store(totals + item + tl.arange(0, 1), total)
        row = sample.reshape(1)
        value = weighted(total, elements, c, weight, row, row >= 0, ELEMENTWISE, COMPUTE)
        tl.store(loss + row, value.to(loss.dtype.element_ty))
    else:
        tl.store(partial + item + tl.arange(0, 1), total)
        if finishes_last(finished, begun):
            finish(totals, partial, loss, batch, elements, chunks, c, weight, ELEMENTWISE, REDUCTION, COMPUTE, BLOCK)


@triton.jit
def weighted(total, elements, c, weight, sample, present, ELEMENTWISE: tl.constexpr, COMPUTE: tl.constexpr):
    """The distances of samples from their sums, weighted."""
    value = distance_of_sum(total, elements, c, sample, present, ELEMENTWISE, COMPUTE)
    return number(weight, sample, present, COMPUTE).to(tl.float64) * value


@triton.jit
def finish_samples(
    totals,
    partial,
    loss,
    scale,
    batch,
    elements,
    chunks,
    c,
    weight,
    ELEMENTWISE: tl.constexpr,
    REDUCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combine chunks into samples, in order, and sum their values times `scale`.

    Other programs wrote the chunks: `.cg` bypasses L1.
    """
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, batch, BLOCK):
        sample = start + tl.arange(0, BLOCK).to(tl.int64)
        present = sample < batch
        value = tl.zeros((BLOCK,), tl.float64)
        for chunk in range(chunks):
            part = tl.load(partial + sample * chunks + chunk, mask=present, other=0.0, cache_modifier=".cg")
            value = add_sums(value, part, ELEMENTWISE, COMPUTE)
        tl.store(totals + sample, value, mask=present)
        value = weighted(value, elements, c, weight, sample, present, ELEMENTWISE, COMPUTE)
        if REDUCTION == "none":
            tl.store(loss + sample, value.to(loss.dtype.element_ty), mask=present)
        if COMPUTE.primitive_bitwidth == 64:
            value *= scale
        total += tl.where(present, value, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def finish(
    totals,
    partial,
    loss,
    batch,
    elements,
    chunks,
    c,
    weight,
    ELEMENTWISE: tl.constexpr,
    REDUCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combine samples into the loss. The mean of float64 values may be finite where their sum overflows."""
    scale = tl.full((), 1.0, tl.float64)
    reduced = tl.full((), 0.0, tl.float64)
    rounds = 1
    while rounds > 0:
        reduced = finish_samples(
            totals,
            partial,
            loss,
            scale,
            batch,
            elements,
            chunks,
            c,
            weight,
            ELEMENTWISE,
            REDUCTION,
            COMPUTE,
            BLOCK,
        )
        rounds -= 1
        if COMPUTE.primitive_bitwidth == 64 and REDUCTION == "mean":
            again = overflows(reduced) & (scale == 1.0)
            scale = tl.where(again, 2.0**-64, scale)
            rounds += again.to(tl.int32)
    if REDUCTION != "none":
        if REDUCTION == "mean":
            reduced = reduced / tl.full((), batch, tl.float64)
        if COMPUTE.primitive_bitwidth == 64:
            reduced = reduced / scale
        tl.store(loss, reduced.to(loss.dtype.element_ty))
