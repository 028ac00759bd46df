"""Sampler updates: one kernel for an affine map of a few tensors plus keyed noise, and the ops that choose its weights."""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicm_kernels.triton_kernels import checks
from bicm_kernels.triton_kernels.keys import (
    NO_KEY,
    Argument,
    Integer,
    Key,
    Number,
    make_key,
    number,
    number_argument,
)
from bicm_kernels.triton_kernels.noise import draw
from bicm_kernels.triton_kernels.operands import lay_out, load, locate, store

MAX_TERMS = 5
FORM_TERMS = {"bdia": 3, "bdia_inverse": 3}  # the coefficients of any other form are its weights


@triton.jit
def divide(a, b):
    """The correctly rounded quotient."""
    if a.dtype == tl.float64:
        quotient = a / b
    else:
        quotient = tl.div_rn(a, b)
    return quotient


@triton.jit
def weight(k: tl.constexpr, coefficients, sample, present, FORM: tl.constexpr, COMPUTE: tl.constexpr):
    """Weight k of the map. The order of operations is part of the contract."""
    if FORM == "affine":
        result = number(coefficients[k], sample, present, COMPUTE)
    else:
        a = number(coefficients[0], sample, present, COMPUTE)
        b = number(coefficients[1], sample, present, COMPUTE)
        a_last = number(coefficients[2], sample, present, COMPUTE)
        b_last = number(coefficients[3], sample, present, COMPUTE)
        gamma = number(coefficients[4], sample, present, COMPUTE)
        one = tl.full(sample.shape, 1.0, COMPUTE)
        if FORM == "bdia":  # BDIA eq. 24
            if k == 0:
                result = gamma
            elif k == 1:
                result = a - divide(gamma, a_last)
            else:
                result = b + gamma * divide(b_last, a_last)
        else:  # BDIA eq. 28; a product keeps the sign of zero where Triton's minus may not
            if k == 0:
                result = divide(one, gamma)
            elif k == 1:
                result = divide(one, a_last) - divide(a, gamma)
            else:
                result = (divide(b, gamma) + divide(b_last, a_last)) * -1.0
    return result


@triton.jit(do_not_specialize=["batch", "blocks", "seed", "step", "sample_id"])
def multistep(
    out,
    inputs,
    conditional,
    sizes,
    batch,
    elements,
    blocks,
    coefficients,
    guidance_scale,
    noise_weight,
    seed: tl.int64,
    step: tl.int64,
    sample_id: tl.int64,
    key_tensors,
    x0,
    x0_coefficients,
    x0_weight,
    clip,
    scaled,
    next_scale,
    TERMS: tl.constexpr,
    FORM: tl.constexpr,
    COUNTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """out = sum of w_k x_k, then + x0_weight x0, then + noise_weight n; what is None does not take place."""
    sample, present, first, element, inside = locate(elements, batch, blocks, ROWS, COLUMNS, INDEX)
    for k in tl.static_range(TERMS):
        x = load(inputs[k], sizes, sample, element, inside, COMPUTE)
        if k == TERMS - 1 and conditional is not None:
            cond = load(conditional, sizes, sample, element, inside, COMPUTE)
            x = x + number(guidance_scale, sample, present, COMPUTE) * (cond - x)
        term = weight(k, coefficients, sample, present, FORM, COMPUTE) * x
        y = term if k == 0 else y + term
        if x0 is not None:
            term = number(x0_coefficients[k], sample, present, COMPUTE) * x
            denoised = term if k == 0 else denoised + term
    if x0 is not None:
        if clip is not None:
            high = number(clip, sample, present, COMPUTE)
            low = high * -1.0
            denoised = tl.where(denoised > high, high, tl.where(denoised < low, low, denoised))
        y = y + number(x0_weight, sample, present, COMPUTE) * denoised
    if noise_weight is not None:
        w = number(noise_weight, sample, present, COMPUTE)
        n = draw(seed, step, sample_id, key_tensors, sample, present, first, True, COUNTS, COLUMNS)
        y = tl.where(w != 0.0, y + w * n.to(COMPUTE), y)
    store(out, sizes, sample, element, inside, y)
    if x0 is not None:
        store(x0, sizes, sample, element, inside, denoised)
    if scaled is not None:
        y = number(next_scale, sample, present, COMPUTE) * y
        store(scaled, sizes, sample, element, inside, y)


def launch_multistep(
    outs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    coefficients: Sequence[Number],
    guidance_scale: Number | None = None,
    *,
    form: str = "affine",
    noise_weight: Number | None = None,
    key: tuple[Integer, Integer, Integer] | None = None,
    x0_coefficients: Sequence[Number] = (),
    x0_weight: Number | None = None,
    clip: Number | None = None,
    next_scale: Number | None = None,
) -> None:
    """Write the step's results to `outs`: (out,), (out, x0) or (out, x0, next). A tensor more than terms is eps_cond."""
    first = tensors[0]
    device = first.device
    terms = FORM_TERMS.get(form, len(coefficients))
    guided = len(tensors) == terms + 1
    float64 = any(x.dtype == torch.float64 for x in tensors)
    compute = torch.float64 if float64 else torch.float32
    per_sample = key is not None

    def argument(value: Number | None) -> Argument | None:
        nonlocal per_sample
        if value is None:
            return None
        if isinstance(value, Tensor):
            checks.check_number(value, first)
            per_sample = per_sample or value.dim() == 1
        return number_argument(value, compute, device)

    noise_key = NO_KEY if key is None else make_key(*key, first)
    arguments = {
        "coefficients": tuple(argument(x) for x in coefficients),
        "guidance_scale": argument(guidance_scale) if guided else None,
        "noise_weight": argument(noise_weight) if key is not None else None,
        "x0_coefficients": tuple(argument(x) for x in x0_coefficients),
        "x0_weight": argument(x0_weight),
        "clip": argument(clip),
        "next_scale": argument(next_scale),
    }
    layout = lay_out([*outs, *tensors], per_sample=per_sample, in_order=key is not None)
    written, read = layout.operands[: len(outs)], layout.operands[len(outs) :]
    layout.launch(
        multistep,
        out=written[0],
        x0=written[1] if len(outs) > 1 else None,
        scaled=written[2] if len(outs) > 2 else None,
        inputs=tuple(read[:terms]),
        conditional=read[terms] if guided else None,
        seed=noise_key.seed,
        step=noise_key.step,
        sample_id=noise_key.sample_id,
        key_tensors=noise_key.tensors,
        COUNTS=noise_key.counts,
        TERMS=terms,
        FORM=form,
        COMPUTE=tl.float64 if float64 else tl.float32,
        **arguments,
    )
