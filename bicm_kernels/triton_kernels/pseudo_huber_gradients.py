"""Kernels of the losses' gradients: backward, with the value, and scaled afterwards; pseudo_huber.py launches them."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from bicm_kernels.triton_kernels.hypotenuse import distance, nonzero, slope, slope_anywhere
from bicm_kernels.triton_kernels.kept_sums import norm_with, plain_slopes, scaled_back
from bicm_kernels.triton_kernels.keys import load_rows, number
from bicm_kernels.triton_kernels.operands import load, locate, store
from bicm_kernels.triton_kernels.pseudo_huber_kernels import (
    add_term,
    chunk_sum,
    conclude,
    denoising_weights,
    residual,
    sum_of,
)
from bicm_kernels.triton_kernels.rounding import divide


@triton.jit
def factors(
    upstream,
    total,
    batch,
    elements,
    c,
    weight,
    sample,
    present,
    ELEMENTWISE: tl.constexpr,
    REDUCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The factor of a sample's residuals, c, and a power of two that the residuals are multiplied by first."""
    factor = upstream * number(weight, sample, present, COMPUTE)
    if REDUCTION == "mean":
        factor = divide(factor, tl.full(factor.shape, batch, COMPUTE))
    transition = number(c, sample, present, COMPUTE)
    power = 1.0
    if c is None:
        factor = 2.0 * factor
    elif ELEMENTWISE:
        factor = divide(factor, tl.full(factor.shape, elements, COMPUTE))
    else:
        length, power = norm_with(total, transition)
        factor = divide(factor, nonzero(length))
    return factor, transition, power


@triton.jit
def store_gradients(outs, x, sizes, sample, element, inside, r, factor, weights):
    """The derivatives in prediction, target and x, those that are not None, from a tile's residuals or slopes."""
    if outs[0] is not None:
        scale = factor
        if x is not None:
            scale = factor * weights[1]
        store(outs[0], sizes, sample, element, inside, scale * r)
    if outs[1] is not None:
        store(outs[1], sizes, sample, element, inside, (factor * -1.0) * r)
    if outs[2] is not None:
        store(outs[2], sizes, sample, element, inside, (factor * weights[0]) * r)


@triton.jit(do_not_specialize=["batch", "blocks"])
def gradients(
    outs,
    prediction,
    target,
    x,
    element_weight,
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
    factor = number(upstream, sample, present, COMPUTE)
    total = None
    if not ELEMENTWISE:
        total = load_rows(totals, 1, sample, present, 1.0)
    factor, transition, power = factors(
        factor, total, batch, elements, c, weight, sample, present, ELEMENTWISE, REDUCTION, COMPUTE
    )
    if ELEMENTWISE:
        r = slope_anywhere(r, transition)
    else:
        r *= power
    if element_weight is not None:
        r *= load(element_weight, sizes, sample, element, inside, COMPUTE)
    store_gradients(outs, x, sizes, sample, element, inside, r, factor, weights)


@triton.jit
def held_sum(
    residuals,
    c,
    scale,
    ELEMENTWISE: tl.constexpr,
    COMPUTE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """What `chunk_sum` adds up, from residuals in registers; distances by the plain formula, without a scale."""
    high = tl.zeros((1, COLUMNS), COMPUTE)
    low = tl.zeros((1, COLUMNS), COMPUTE)
    for step in tl.static_range(STEPS):
        scaled = residuals[step] * scale
        term = scaled * scaled
        if ELEMENTWISE:
            term = distance(term, c)
        high, low = add_term(high, low, term)
    return sum_of(high, low)


@triton.jit
def store_anywhere(
    outs,
    prediction,
    target,
    x,
    sizes,
    sample,
    elements,
    weights,
    c,
    factor,
    COMPUTE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """A sample's elementwise gradients where the plain formula is not accurate."""
    for step in range(STEPS):
        element = step * COLUMNS + tl.arange(0, COLUMNS)[None, :].to(INDEX)
        inside = element < elements
        r = residual(prediction, target, x, weights, sizes, sample, element, inside, COMPUTE)
        store_gradients(outs, x, sizes, sample, element, inside, slope_anywhere(r, c), factor, weights)


@triton.jit(do_not_specialize=["batch", "begun"])
def resident(
    outs,
    totals,
    loss,
    finished,
    begun: tl.int64,
    prediction,
    target,
    x,
    sizes,
    batch,
    elements,
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
    """The sum of a sample as `sums` takes it, its residuals kept in registers, and from them its gradients."""
    item = tl.program_id(0).to(tl.int64)
    sample = tl.full((1, 1), item, tl.int64)
    weights = (0.0, 1.0)
    if x is not None:
        weights = denoising_weights(levels, sample, sample >= 0, FORM, SCALED, COMPUTE)
    columns = tl.arange(0, COLUMNS)[None, :].to(INDEX)
    residuals = ()
    for step in tl.static_range(STEPS):
        element = step * COLUMNS + columns
        r = residual(prediction, target, x, weights, sizes, sample, element, element < elements, COMPUTE)
        residuals = residuals + (r,)  # type: ignore[assignment]  # noqa: RUF005 (Triton reads no star)
    transition = number(c, sample, sample >= 0, COMPUTE)
    scale = tl.full((), 1.0, COMPUTE)
    total = tl.zeros((1,), tl.float64)
    again = 0
    careful = False
    if ELEMENTWISE:
        total = held_sum(residuals, transition, scale, True, COMPUTE, COLUMNS, STEPS)
        total, scale, again = scaled_back(total, scale, transition, True)
        careful = (again > 0) | (plain_slopes(total, transition) == 0)
    else:
        rounds = 1
        while rounds > 0:
            total = held_sum(residuals, transition, scale, False, COMPUTE, COLUMNS, STEPS)
            total, scale, again = scaled_back(total, scale, transition, False)
            rounds += again - 1
    factor, transition, power = factors(
        tl.full((1, 1), 1.0, COMPUTE),
        tl.zeros((1, 1), tl.float64) + tl.sum(total, axis=0),
        batch,
        elements,
        c,
        weight,
        sample,
        sample >= 0,
        ELEMENTWISE,
        REDUCTION,
        COMPUTE,
    )
    if careful:
        # Residuals are read again, a tile at a time: there are not enough registers to hold all of them.
        if again > 0:
            total = chunk_sum(
                prediction,
                target,
                x,
                None,
                sizes,
                sample,
                tl.zeros((), INDEX),
                elements,
                weights,
                transition,
                scale,
                True,
                COMPUTE,
                COLUMNS,
                STEPS,
            )
            total, scale, again = scaled_back(total, scale, transition, True)
        store_anywhere(
            outs,
            prediction,
            target,
            x,
            sizes,
            sample,
            elements,
            weights,
            transition,
            factor,
            COMPUTE,
            COLUMNS,
            STEPS,
            INDEX,
        )
    else:
        for step in tl.static_range(STEPS):
            element = step * COLUMNS + columns
            r = residuals[step]
            if ELEMENTWISE:
                r = slope(r, transition)
            else:
                r *= power
            store_gradients(outs, x, sizes, sample, element, element < elements, r, factor, weights)
    conclude(
        total,
        totals,
        totals,
        loss,
        finished,
        begun,
        sample,
        item,
        batch,
        elements,
        1,
        c,
        weight,
        ELEMENTWISE,
        REDUCTION,
        COMPUTE,
        BLOCK,
    )


@triton.jit(do_not_specialize=["batch", "blocks"])
def scale(
    gradient,
    sizes,
    batch,
    elements,
    blocks,
    upstream,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    INDEX: tl.constexpr,
):
    """A gradient for an upstream of 1 times another, in place; rows whose upstream is 1 are not touched."""
    sample, present, _, element, inside = locate(elements, batch, blocks, ROWS, COLUMNS, INDEX)
    factor = number(upstream, sample, present, COMPUTE)
    inside = inside & (factor != 1.0)
    value = load(gradient, sizes, sample, element, inside, COMPUTE)
    store(gradient, sizes, sample, element, inside, factor * value)
