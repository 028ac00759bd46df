"""Kernels of the losses' gradients: backward, with the value, and scaled afterwards; pseudo_huber.py launches them."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from bicm_kernels.triton_kernels.keys import load_rows, number
from bicm_kernels.triton_kernels.operands import load, locate, store
from bicm_kernels.triton_kernels.pseudo_huber_kernels import (
    add_term,
    conclude,
    denoising_weights,
    distance,
    nonzero,
    residual,
    scaled_back,
)
from bicm_kernels.triton_kernels.rounding import divide, root


@triton.jit
def norm(total, c):
    """sqrt(total + c^2) times a power of two, and that power: float32 whatever the size of a float64 sum."""
    high = total.to(c.dtype)
    if c.dtype == tl.float32:
        large = (high > 1.2676506002282294e30) | (c > 1125899906842624.0)  # 2^100, 2^50
        small = (high < 7.888609052210118e-31) & (c < 8.881784197001252e-16)  # 2^-100, 2^-50
        shift = tl.where(large, -192, tl.where(small & (total > 0.0), 192, 0)).to(tl.int64) << 52
        bits = total.to(tl.int64, bitcast=True)
        # A float64 sum of float32 squares is far from the ends of its range; 0 and what is not finite stay.
        moved = (bits + shift).to(tl.float64, bitcast=True).to(tl.float32)
        high = tl.where((total > 0.0) & (total < float("inf")), moved, high)
        power = tl.where(large, 1.262177448353619e-29, tl.where(small, 7.922816251426434e28, 1.0))
    else:
        power = tl.full(c.shape, 1.0, c.dtype)
    scaled = c * power
    return root(high + scaled * scaled), power


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
    if ELEMENTWISE:
        factor = divide(factor, tl.full(factor.shape, elements, COMPUTE))
    else:
        length, power = norm(total, transition)
        factor = divide(factor, nonzero(length))
    return factor, transition, power


@triton.jit
def store_gradients(
    outs, x, sizes, sample, element, inside, r, factor, transition, power, weights, ELEMENTWISE: tl.constexpr
):
    """The derivatives in prediction, target and x, those that are not None, from a tile's residuals."""
    if ELEMENTWISE:
        r = divide(r, nonzero(root(r * r + transition * transition)))
    else:
        r *= power
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
    store_gradients(outs, x, sizes, sample, element, inside, r, factor, transition, power, weights, ELEMENTWISE)


@triton.jit(do_not_specialize=["batch"])
def resident(
    outs,
    totals,
    loss,
    finished,
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
    scale = tl.full((), 1.0, COMPUTE)
    total = tl.zeros((1,), tl.float64)
    rounds = 1
    while rounds > 0:
        high = tl.zeros((1, COLUMNS), COMPUTE)
        low = tl.zeros((1, COLUMNS), COMPUTE)
        for step in tl.static_range(STEPS):
            r = residuals[step] * scale
            term = r * r
            if ELEMENTWISE:
                term = distance(term, number(c, sample, sample >= 0, COMPUTE))
            high, low = add_term(high, low, term)
        low = tl.where(low == low, low, 0.0)
        total = tl.sum(high.to(tl.float64), axis=1) + tl.sum(low, axis=1).to(tl.float64)
        rounds -= 1
        if not ELEMENTWISE and COMPUTE.primitive_bitwidth == 32:
            total, scale, again = scaled_back(total, scale)
            rounds += again
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
    for step in tl.static_range(STEPS):
        element = step * COLUMNS + columns
        store_gradients(
            outs,
            x,
            sizes,
            sample,
            element,
            element < elements,
            residuals[step],
            factor,
            transition,
            power,
            weights,
            ELEMENTWISE,
        )
    conclude(
        total,
        totals,
        totals,
        loss,
        finished,
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
