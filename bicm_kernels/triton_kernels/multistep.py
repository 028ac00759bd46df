"""Sampler updates: one kernel for an affine map of a few tensors plus keyed noise; ops choose its weights."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicm_kernels.triton_kernels import checks
from bicm_kernels.triton_kernels.checks import Integer, Number
from bicm_kernels.triton_kernels.keys import NO_KEY, Argument, make_key, number, number_argument
from bicm_kernels.triton_kernels.noise import draw
from bicm_kernels.triton_kernels.operands import lay_out, load, locate, store
from bicm_kernels.triton_kernels.preconditioning_kernels import bcm, c_in, cm
from bicm_kernels.triton_kernels.rounding import divide


@triton.jit
def numbers(arguments, sample, present, COMPUTE: tl.constexpr):
    """Several numbers for each row of a tile."""
    loaded = ()
    for k in tl.static_range(len(arguments)):
        loaded += (number(arguments[k], sample, present, COMPUTE),)  # type: ignore[assignment]
    return loaded


@triton.jit
def form_weights(raw, FORM: tl.constexpr):
    """From coefficients to weights. The order of operations is part of the contract."""
    if FORM == "affine":
        weights = raw
    elif FORM == "bcm":
        weights = bcm(raw[0], raw[1], raw[2], False)
    elif FORM == "cm":
        weights = cm(raw[0], raw[1], raw[2], False)
    elif FORM == "bcm_scaled":
        weights = bcm(raw[0], raw[1], raw[2], True)
    elif FORM == "cm_scaled":
        weights = cm(raw[0], raw[1], raw[2], True)
    elif FORM == "input":
        weights = (c_in(raw[0], raw[1]),)
    else:
        a, b, a_last, b_last, gamma = raw[0], raw[1], raw[2], raw[3], raw[4]
        if FORM == "bdia":  # BDIA eq. 24
            weights = (gamma, a - divide(gamma, a_last), b + gamma * divide(b_last, a_last))
        else:  # BDIA eq. 28; a product keeps the sign of zero, which Triton's minus may not
            one = tl.full(gamma.shape, 1.0, gamma.dtype)
            weights = (
                divide(one, gamma),
                divide(one, a_last) - divide(a, gamma),
                (divide(b, gamma) + divide(b_last, a_last)) * -1.0,
            )
    return weights


@triton.jit
def fold(tiles, weights, TERMS: tl.constexpr):
    """The sum of w_k x_k from the left."""
    y = weights[0] * tiles[0]
    for k in tl.static_range(1, TERMS):
        y = y + weights[k] * tiles[k]
    return y


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
    SECOND: tl.constexpr,
    SIGMA: tl.constexpr,
    COUNTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    INDEX: tl.constexpr,
):
    """out = sum of w_k x_k, then + x0_weight x0, then + noise_weight n; terms that are None are skipped.

    SECOND: one input, and its weight is the form's second. SIGMA: next_scale is a level, whose c_in scales.
    """
    sample, present, first, element, inside = locate(elements, batch, blocks, ROWS, COLUMNS, INDEX)
    tiles = ()
    for k in tl.static_range(TERMS):
        x = load(inputs[k], sizes, sample, element, inside, COMPUTE)
        if k == TERMS - 1 and conditional is not None:
            cond = load(conditional, sizes, sample, element, inside, COMPUTE)
            x = x + number(guidance_scale, sample, present, COMPUTE) * (cond - x)
        tiles += (x,)  # type: ignore[assignment]
    raw = numbers(coefficients, sample, present, COMPUTE)
    weights = form_weights(raw, FORM)
    if SECOND:
        weights = (weights[1],)
    y = fold(tiles, weights, TERMS)
    if x0 is not None:
        denoised = fold(tiles, numbers(x0_coefficients, sample, present, COMPUTE), TERMS)
        if clip is not None:
            high = number(clip, sample, present, COMPUTE)
            low = high * -1.0
            denoised = tl.where(denoised > high, high, tl.where(denoised < low, low, denoised))
        y = y + number(x0_weight, sample, present, COMPUTE) * denoised
    if noise_weight is not None:
        w = number(noise_weight, sample, present, COMPUTE)
        n = draw(seed, step, sample_id, key_tensors, sample, present, first, True, COUNTS, COLUMNS, GROUP)
        y = tl.where(w != 0.0, y + w * n.to(COMPUTE), y)
    store(out, sizes, sample, element, inside, y)
    if x0 is not None:
        store(x0, sizes, sample, element, inside, denoised)
    if scaled is not None:
        scale = number(next_scale, sample, present, COMPUTE)
        if SIGMA:
            scale = c_in(scale, raw[2])
        y = scale * y
        store(scaled, sizes, sample, element, inside, y)


#: How many tensors a form weights, and how many coefficients it takes.
SHAPES = dict.fromkeys(("bdia", "bdia_inverse"), (3, 5)) | {"input": (1, 2)}
SHAPES |= dict.fromkeys(("bcm", "cm", "bcm_scaled", "cm_scaled"), (2, 3))


def terms_of(form: str, coefficients: Sequence[Number]) -> int:
    """How many tensors are weighted."""
    terms, count = SHAPES.get(form, (len(coefficients), len(coefficients)))
    checks.require(len(coefficients) == count, f"expected {count} coefficients")
    return terms


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
    derivative: str | None = None,
    next_scale_is_sigma: bool = False,
) -> None:
    """Write a step's results to `outs`: out, then x0 where there are its coefficients, then next where it is scaled.

    A tensor more than there are terms is eps_cond, the partner of the one before it. `derivative` names the tensor,
    "x" or "F", whose weight alone multiplies the one input.
    """
    first = tensors[0]
    terms = terms_of(form, coefficients) if derivative is None else 1
    guided = len(tensors) == terms + 1
    checks.check_states(tensors, terms)
    checks.require(not guided or guidance_scale is not None, "a pair of predictions needs a guidance scale")
    float64 = torch.float64 in [x.dtype for x in tensors]
    compute = torch.float64 if float64 else torch.float32

    def argument(value: Number | None) -> Argument | None:
        return None if value is None else number_argument(value, compute, first)

    weights = tuple([number_argument(value, compute, first) for value in coefficients])
    x0_weights = tuple([number_argument(value, compute, first) for value in x0_coefficients])
    scalars: dict[str, Any] = {
        "guidance_scale": argument(guidance_scale) if guided else None,
        "noise_weight": argument(noise_weight) if key is not None else None,
        "x0_weight": argument(x0_weight),
        "clip": argument(clip),
        "next_scale": argument(next_scale),
    }
    placed = [x for x in (*weights, *x0_weights, *scalars.values()) if x is not None and len(x) == 2]
    differ = any(stride for _, stride in placed)
    noise_key = NO_KEY if key is None else make_key(*key, first)
    layout = lay_out([*outs, *tensors], per_sample=differ or key is not None, in_order=key is not None)
    written, read = layout.operands[: len(outs)], layout.operands[len(outs) :]
    layout.launch(
        multistep,
        out=written[0],
        x0=written[1] if x0_coefficients else None,
        scaled=None if next_scale is None else written[-1],
        inputs=tuple(read[:terms]),
        conditional=read[terms] if guided else None,
        seed=noise_key.seed,
        step=noise_key.step,
        sample_id=noise_key.sample_id,
        key_tensors=noise_key.tensors,
        COUNTS=noise_key.counts,
        TERMS=terms,
        FORM=form,
        SECOND=derivative == "F",
        SIGMA=next_scale_is_sigma,
        COMPUTE=tl.float64 if float64 else tl.float32,
        coefficients=weights,
        x0_coefficients=x0_weights,
        **scalars,
    )


FORMS = {
    "affine_step": "affine",
    "ddim_step": "affine",
    "bdia_step": "bdia",
    "bdia_inverse_step": "bdia_inverse",
}


def noise_arguments(
    noise_weight: Number | None = None,
    seed: Integer | None = None,
    step: Integer | None = None,
    sample_id: Integer | None = None,
) -> dict[str, Any]:
    """The noise that a schema's last arguments specify; none if the weight is the number 0."""
    if seed is None or (isinstance(noise_weight, float) and noise_weight == 0.0):
        return {}
    incomplete = noise_weight is None or step is None or sample_id is None
    checks.require(not incomplete, "incomplete noise key")
    return {"noise_weight": noise_weight, "key": (seed, step, sample_id)}


def form_step(form: str) -> tuple[Callable[..., Tensor], Callable[..., None]]:
    """An op that returns its result and one that writes it, for numbers and for tensors alike."""

    def returning(
        tensors: list[Tensor], coefficients: list[Number], guidance_scale: Number | None, *noise: Any
    ) -> Tensor:
        out = torch.empty_like(tensors[0])
        launch_multistep((out,), tensors, coefficients, guidance_scale, form=form, **noise_arguments(*noise))
        return out

    def writing(
        tensors: list[Tensor],
        coefficients: list[Number],
        guidance_scale: Number | None,
        *noise: Any,
        out: Tensor,
    ) -> None:
        checks.check_outputs((out,), tensors)
        launch_multistep((out,), tensors, coefficients, guidance_scale, form=form, **noise_arguments(*noise))

    return returning, writing


def launch_denoised(
    outs: Sequence[Tensor],
    tensors: list[Tensor],
    x0_weights: list[Number],
    weights: list[Number],
    guidance_scale: Number | None,
    x0_weight: Number | None,
    clip: Number | None,
    noise_weight: Number | None,
    next_scale: Number | None,
    *key: Any,
) -> None:
    checks.require(len(x0_weights) == len(weights), "as many x0_weights as weights")
    launch_multistep(
        outs,
        tensors,
        weights,
        guidance_scale,
        x0_coefficients=x0_weights,
        x0_weight=0.0 if x0_weight is None else x0_weight,
        clip=clip,
        next_scale=next_scale,
        **noise_arguments(noise_weight, *key),
    )


def denoised_step(tensors: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The update, the denoised sample, and the next evaluation's input or an empty tensor."""
    first = tensors[0]
    outs = [torch.empty_like(first) for _ in range(2 if arguments[6] is None else 3)]
    launch_denoised(outs, tensors, *arguments)
    return outs[0], outs[1], outs[2] if len(outs) > 2 else first.new_empty((0,))


def denoised_step_out(tensors: list[Tensor], *arguments: Any, **outputs: Tensor) -> None:
    """The same into tensors that the caller gives: out, x0 and next."""
    outs = [outputs[name] for name in ("out", "x0", "next")[: 2 if arguments[6] is None else 3]]
    checks.check_outputs(outs, tensors)
    launch_denoised(outs, tensors, *arguments)


def add_noise(x: Tensor, scale: Number, sigma: Number, *key: Integer | None) -> Tensor:
    """The affine step of one tensor."""
    out = torch.empty_like(x)
    launch_multistep((out,), [x], [scale], **noise_arguments(sigma, *key))
    return out


def implementations() -> dict[str, Callable[..., Any]]:
    """Every overload of the family by the name of its schema."""
    table: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        name: form_step(form) for name, form in FORMS.items()
    }
    table["denoised_step"] = (denoised_step, denoised_step_out)
    found: dict[str, Callable[..., Any]] = {"add_noise": add_noise, "add_noise.tensor": add_noise}
    for name, (returning, writing) in table.items():
        found |= {name: returning, f"{name}.tensor": returning}
        found |= {f"{name}.out": writing, f"{name}.tensor_out": writing}
    return found
