"""The kernels of the pseudo-Huber losses; pseudo_huber.py launches them.

A chunk's sum is kept in two numbers of the compute type (the second holds what rounding took from the first), because
most GPUs are slow in double precision.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from bicm_kernels.triton_kernels.keys import number
from bicm_kernels.triton_kernels.operands import load, locate, store
from bicm_kernels.triton_kernels.rounding import divide, root
from bicm_kernels.triton_kernels.scaling import bcm, cm


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


@triton.jit(do_not_specialize=["chunks"])
def sums(
    partial,
    loss,
    prediction,
    target,
    x,
    sizes,
    elements,
    chunks,
    levels,
    c,
    weight,
    FORM: tl.constexpr,
    SCALED: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    COMPUTE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The sum of one chunk, and the loss of the sample where that is all of it and a loss is wanted here."""
    item = tl.program_id(0).to(tl.int64)
    sample = tl.full((1, 1), item // chunks, tl.int64)
    present = sample >= 0
    first = (item % chunks).to(INDEX) * (COLUMNS * STEPS)
    weights = (0.0, 1.0)
    if x is not None:
        weights = denoising_weights(levels, sample, present, FORM, SCALED, COMPUTE)
    high = tl.zeros((1, COLUMNS), COMPUTE)
    low = tl.zeros((1, COLUMNS), COMPUTE)
    for step in range(STEPS):
        element = first + step * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        r = residual(prediction, target, x, weights, sizes, sample, element, element < elements, COMPUTE)
        term = r * r
        if ELEMENTWISE:
            term = distance(term, number(c, sample, present, COMPUTE))
        high, low = add_term(high, low, term)
    # Where a sum is infinite, what was lost is not a number and does not count.
    exact = high.to(tl.float64) + tl.where(low == low, low, 0.0).to(tl.float64)
    total = tl.sum(exact, axis=1)
    row = sample.reshape(1)
    tl.store(partial + item + tl.arange(0, 1), total)
    if loss is not None:
        value = weighted(total, elements, c, weight, row, row >= 0, ELEMENTWISE, COMPUTE)
        tl.store(loss + row, value.to(loss.dtype.element_ty))


@triton.jit
def weighted(total, elements, c, weight, sample, present, ELEMENTWISE: tl.constexpr, COMPUTE: tl.constexpr):
    """The distances of samples from their sums, weighted."""
    if ELEMENTWISE:
        value = total / elements.to(tl.float64)
    else:
        value = distance(total, number(c, sample, present, COMPUTE).to(tl.float64))
    return number(weight, sample, present, COMPUTE).to(tl.float64) * value


@triton.jit(do_not_specialize=["batch", "elements", "chunks"])
def finish(
    out,
    partial,
    loss,
    batch,
    elements: tl.int64,
    chunks,
    c,
    weight,
    ELEMENTWISE: tl.constexpr,
    REDUCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Chunks become samples, and samples the loss, in order."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, batch, BLOCK):
        sample = start + tl.arange(0, BLOCK).to(tl.int64)
        present = sample < batch
        value = tl.zeros((BLOCK,), tl.float64)
        for chunk in range(chunks):
            value += tl.load(partial + sample * chunks + chunk, mask=present, other=0.0)
        tl.store(out + sample, value, mask=present)
        value = weighted(value, elements, c, weight, sample, present, ELEMENTWISE, COMPUTE)
        if REDUCTION == "none":
            tl.store(loss + sample, value.to(loss.dtype.element_ty), mask=present)
        total += tl.where(present, value, 0.0)
    if REDUCTION != "none":
        reduced = tl.sum(total, axis=0)
        if REDUCTION == "mean":
            reduced = reduced / batch.to(tl.float64)
        tl.store(loss, reduced.to(loss.dtype.element_ty))


@triton.jit(do_not_specialize=["batch", "blocks"])
def gradients(
    outs,
    prediction,
    target,
    x,
    sizes,
    batch,
    elements,
    blocks,
    levels,
    c,
    weight,
    upstream,
    totals,
    FORM: tl.constexpr,
    SCALED: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    REDUCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The derivatives in prediction, target and x, those that are not None."""
    sample, present, _, element, inside = locate(elements, batch, blocks, ROWS, COLUMNS, INDEX)
    weights = (0.0, 1.0)
    if x is not None:
        weights = denoising_weights(levels, sample, present, FORM, SCALED, COMPUTE)
    r = residual(prediction, target, x, weights, sizes, sample, element, inside, COMPUTE)
    factor = number(upstream, sample, present, COMPUTE) * number(weight, sample, present, COMPUTE)
    if REDUCTION == "mean":
        factor = divide(factor, tl.full(factor.shape, batch, COMPUTE))
    transition = number(c, sample, present, COMPUTE)
    if ELEMENTWISE:
        factor = divide(factor, tl.full(factor.shape, elements, COMPUTE))
        r = divide(r, nonzero(root(r * r + transition * transition)))
    else:
        total = tl.load(totals + sample, mask=present, other=1.0).to(COMPUTE)
        factor = divide(factor, nonzero(root(total + transition * transition)))
    if outs[0] is not None:
        scale = factor
        if x is not None:
            scale = factor * weights[1]
        store(outs[0], sizes, sample, element, inside, scale * r)
    if outs[1] is not None:
        store(outs[1], sizes, sample, element, inside, (factor * -1.0) * r)
    if outs[2] is not None:
        store(outs[2], sizes, sample, element, inside, (factor * weights[0]) * r)
