"""The kernels of the pseudo-Huber losses; pseudo_huber.py launches them.

A chunk's sum is kept in two numbers of the compute type (the second holds what rounding took from the first), because
most GPUs are slow in double precision.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from bicm_kernels.triton_kernels.keys import number
from bicm_kernels.triton_kernels.operands import load
from bicm_kernels.triton_kernels.preconditioning_kernels import bcm, cm
from bicm_kernels.triton_kernels.rounding import divide, root


@triton.jit
def nonzero(x):
    """What zero is divided by where zero over zero is meant to be zero."""
    return tl.where(x == 0.0, 3.0, x)


@triton.jit
def distance(s, c):
    """sqrt(s + c^2) - c without its cancellation; 0 at s = c = 0."""
    return divide(s, nonzero(root(s + c * c) + c))


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
    """high + low + term: the sum, and what rounding took from it."""
    total = high + term
    part = total - high
    return total, low + ((high - (total - part)) + (term - part))


@triton.jit
def trusted(total):
    """Whether squares of float32 that add up to this can neither have overflowed nor have lost digits."""
    return (total >= 7.888609052210118e-31) & (total < float("inf"))  # 2^-100


@triton.jit
def scaled_back(total, scale):
    """A sum of squares of residuals times `scale`, the next scale, and 1 where they have to be taken again with it."""
    found = tl.sum(total, axis=0)
    again = 0
    if scale != 1.0:
        total *= tl.where(scale > 1.0, 1.5930919111324523e-58, 6.277101735386681e57)  # 2^-192, 2^192
    elif trusted(found) == 0:
        scale = tl.where(found < 1.0, 7.922816251426434e28, 1.262177448353619e-29)
        again = 1
    return total, scale, again


@triton.jit
def chunk_sum(
    prediction,
    target,
    x,
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
    """Distances, or squares of the residuals times `scale`, added up: (1,) in float64."""
    high = tl.zeros((1, COLUMNS), COMPUTE)
    low = tl.zeros((1, COLUMNS), COMPUTE)
    for step in range(STEPS):
        element = first + step * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        r = residual(prediction, target, x, weights, sizes, sample, element, element < elements, COMPUTE) * scale
        term = r * r
        if ELEMENTWISE:
            term = distance(term, number(c, sample, sample >= 0, COMPUTE))
        high, low = add_term(high, low, term)
    # Where a sum is infinite, what was lost is not a number and does not count.
    low = tl.where(low == low, low, 0.0)
    return tl.sum(high.to(tl.float64), axis=1) + tl.sum(low, axis=1).to(tl.float64)


@triton.jit(do_not_specialize=["batch", "chunks"])
def sums(
    totals,
    partial,
    loss,
    finished,
    prediction,
    target,
    x,
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

    `finished` counts the programs and is 0 before and after; None: every sample is one chunk, and its loss its own.
    """
    item = tl.program_id(0).to(tl.int64)
    sample = tl.full((1, 1), item // chunks, tl.int64)
    first = (item % chunks).to(INDEX) * (COLUMNS * STEPS)
    weights = (0.0, 1.0)
    if x is not None:
        weights = denoising_weights(levels, sample, sample >= 0, FORM, SCALED, COMPUTE)
    # Squares of float32 overflow above 1.8e19 and lose digits below 1e-19. Where the sum shows that they may have, they
    # are taken again of residuals times 2^96 or 2^-96: exact, and in float32 like everything that elements need.
    scale = tl.full((), 1.0, COMPUTE)
    total = tl.zeros((1,), tl.float64)
    rounds = 1
    while rounds > 0:
        total = chunk_sum(
            prediction,
            target,
            x,
            sizes,
            sample,
            first,
            elements,
            weights,
            c,
            scale,
            ELEMENTWISE,
            COMPUTE,
            COLUMNS,
            STEPS,
        )
        rounds -= 1
        if not ELEMENTWISE and COMPUTE.primitive_bitwidth == 32:
            total, scale, again = scaled_back(total, scale)
            rounds += again
    conclude(
        total,
        totals,
        partial,
        loss,
        finished,
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
    """Store a chunk's sum, and the loss where it needs no other; else the last program makes it of all."""
    if finished is None:
        tl.store(totals + item + tl.arange(0, 1), total)
        row = sample.reshape(1)
        value = weighted(total, elements, c, weight, row, row >= 0, ELEMENTWISE, COMPUTE)
        tl.store(loss + row, value.to(loss.dtype.element_ty))
    else:
        tl.store(partial + item + tl.arange(0, 1), total)
        tl.debug_barrier()  # the sum is stored before the program counts
        last = tl.num_programs(0) - 1
        if tl.atomic_add(finished, 1, sem="acq_rel") == last:
            finish(totals, partial, loss, batch, elements, chunks, c, weight, ELEMENTWISE, REDUCTION, COMPUTE, BLOCK)
            tl.store(finished, 0)


@triton.jit
def weighted(total, elements, c, weight, sample, present, ELEMENTWISE: tl.constexpr, COMPUTE: tl.constexpr):
    """The distances of samples from their sums, weighted."""
    if ELEMENTWISE:
        value = total / tl.full((), elements, tl.float64)
    else:
        value = distance(total, number(c, sample, present, COMPUTE).to(tl.float64))
    return number(weight, sample, present, COMPUTE).to(tl.float64) * value


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
    """Chunks become samples, and samples the loss, in order. Programs elsewhere wrote the chunks: `.cg` is past L1."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, batch, BLOCK):
        sample = start + tl.arange(0, BLOCK).to(tl.int64)
        present = sample < batch
        value = tl.zeros((BLOCK,), tl.float64)
        for chunk in range(chunks):
            value += tl.load(partial + sample * chunks + chunk, mask=present, other=0.0, cache_modifier=".cg")
        tl.store(totals + sample, value, mask=present)
        value = weighted(value, elements, c, weight, sample, present, ELEMENTWISE, COMPUTE)
        if REDUCTION == "none":
            tl.store(loss + sample, value.to(loss.dtype.element_ty), mask=present)
        total += tl.where(present, value, 0.0)
    if REDUCTION != "none":
        reduced = tl.sum(total, axis=0)
        if REDUCTION == "mean":
            reduced = reduced / tl.full((), batch, tl.float64)
        tl.store(loss, reduced.to(loss.dtype.element_ty))
