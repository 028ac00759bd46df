"""The keyed noise itself: normal and uniform numbers into a tensor of any dtype and layout, and new seeds."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicm_kernels.triton_kernels import checks
from bicm_kernels.triton_kernels.checks import Integer, Number
from bicm_kernels.triton_kernels.keys import Key, integer, integer_argument, make_key, number, number_argument
from bicm_kernels.triton_kernels.operands import WARPS, device_of, lay_out, load, locate, store
from bicm_kernels.triton_kernels.philox import box_muller, high_word, low_word, philox, uniform_from_bits
from bicm_kernels.triton_kernels.preconditioning_kernels import bcm, c_in, cm

FOLD_BLOCK = 256


@triton.jit
def draw_quad(quad, sample_id, step, seed, NORMAL: tl.constexpr):
    """The four numbers of every quad, float32."""
    r0, r1, r2, r3 = philox(
        low_word(quad), high_word(quad), low_word(sample_id), low_word(step), low_word(seed), high_word(seed)
    )
    if NORMAL:
        n0, n1 = box_muller(r0, r1)
        n2, n3 = box_muller(r2, r3)
    else:
        n0, n1 = uniform_from_bits(r0), uniform_from_bits(r1)
        n2, n3 = uniform_from_bits(r2), uniform_from_bits(r3)
    return n0, n1, n2, n3


@triton.jit
def draw(
    seed,
    step,
    sample_id,
    key_tensors,
    sample,
    present,
    first,
    NORMAL: tl.constexpr,
    COUNTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The numbers (ROWS, COLUMNS) of a tile, float32.

    A thread makes GROUP adjacent numbers, as many as its widest load, so that each number is on its element's thread.
    """
    seed = integer(seed, key_tensors[0], sample, present)
    step = integer(step, key_tensors[1], sample, present)
    sample_id = integer(sample_id, key_tensors[2], sample, present)
    if COUNTS:
        sample_id += sample
    group = tl.arange(0, COLUMNS // GROUP)[None, :]
    quad = (first // 4).to(tl.int64) + group * (GROUP // 4)
    a0, a1, a2, a3 = draw_quad(quad, sample_id, step, seed, NORMAL)
    if GROUP == 8:
        b0, b1, b2, b3 = draw_quad(quad + 1, sample_id, step, seed, NORMAL)
        a0, a1 = tl.interleave(a0, b0), tl.interleave(a1, b1)
        a2, a3 = tl.interleave(a2, b2), tl.interleave(a3, b3)
    return tl.interleave(tl.interleave(a0, a2), tl.interleave(a1, a3))


@triton.jit(do_not_specialize=["batch", "blocks", "seed", "step", "sample_id"])
def noise(
    out,
    sizes,
    batch,
    elements,
    blocks,
    seed: tl.int64,
    step: tl.int64,
    sample_id: tl.int64,
    key_tensors,
    NORMAL: tl.constexpr,
    COUNTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    INDEX: tl.constexpr,
):
    sample, present, first, element, inside = locate(elements, batch, blocks, ROWS, COLUMNS, INDEX)
    numbers = draw(seed, step, sample_id, key_tensors, sample, present, first, NORMAL, COUNTS, COLUMNS, GROUP)
    store(out, sizes, sample, element, inside, numbers)


@triton.jit
def add_level(x, n, sigma):
    """x + sigma n; a level of zero draws nothing."""
    return tl.where(sigma != 0.0, x + sigma * n, x)


@triton.jit(do_not_specialize=["batch", "blocks", "seed", "step", "sample_id", "last_place"])
def pair(
    low,
    high,
    x,
    x_hat,
    network,
    mask,
    places,
    last_place,
    sizes,
    batch,
    elements,
    blocks,
    sigma_low,
    sigma_high,
    sigma_data,
    end,
    seed: tl.int64,
    step: tl.int64,
    sample_id: tl.int64,
    key_tensors,
    FORM: tl.constexpr,
    SCALES: tl.constexpr,
    COUNTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    INDEX: tl.constexpr,
):
    """One noise at two levels on x, or on x_hat where a mask is given and true; a row reads one of them.

    Or on the sample predicted from x at the low level and the network's output.
    """
    sample, present, first, element, inside = locate(elements, batch, blocks, ROWS, COLUMNS, INDEX)
    generated, place = present, sample
    if places is not None:
        place = tl.load(places[0] + sample * places[1], mask=present, other=-1)
        generated = place >= 0
        place = tl.minimum(tl.maximum(place, 0), last_place)
    if mask is not None:
        generated = tl.load(mask[0] + sample * mask[1], mask=present, other=0) != 0
    if x_hat is None:
        y = load(x, sizes, sample, element, inside, COMPUTE)
    else:
        y = tl.where(
            generated,
            load(x_hat, sizes, sample, element, inside & generated, COMPUTE),
            load(x, sizes, sample, element, inside & (generated == 0), COMPUTE),
        )
    n = draw(seed, step, sample_id, key_tensors, sample, present, first, True, COUNTS, COLUMNS, GROUP).to(COMPUTE)
    first_level = number(sigma_low, sample, present, COMPUTE)
    second_level = number(sigma_high, sample, present, COMPUTE)
    if network is not None:
        least = number(end, sample, present, COMPUTE)
        deviation = number(sigma_data, sample, present, COMPUTE)
        if FORM == "cm":
            c_skip, c_out = cm(first_level, least, deviation, False)
        else:
            c_skip, c_out = bcm(first_level, least, deviation, False)
        F = load(network, sizes, place, element, inside & generated, COMPUTE)
        y = tl.where(generated, c_skip * add_level(y, n, first_level) + c_out * F, y)
    noisy_low, noisy_high = add_level(y, n, first_level), add_level(y, n, second_level)
    if SCALES:
        data = number(sigma_data, sample, present, COMPUTE)
        noisy_low, noisy_high = c_in(first_level, data) * noisy_low, c_in(second_level, data) * noisy_high
    store(low, sizes, sample, element, inside, noisy_low)
    store(high, sizes, sample, element, inside, noisy_high)


@triton.jit(do_not_specialize=["count", "seed", "data"])
def fold(
    out, count, seed: tl.int64, seed_tensor, data: tl.int64, data_tensor, BLOCK: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    seeds = integer(seed, seed_tensor, place, inside)
    datas = integer(data, data_tensor, place, inside)
    ones = tl.full(place.shape, 0xFFFFFFFF, tl.uint32)
    low, high, _, _ = philox(low_word(datas), high_word(datas), ones, ones, low_word(seeds), high_word(seeds))
    folded = ((high & 0x7FFFFFFF).to(tl.int64) << 32) | low.to(tl.int64)
    tl.store(out + place, folded, mask=inside)


def given_key(seed: Integer | None, step: Integer | None, sample_id: Integer | None, like: Tensor) -> Key:
    """The key of an op that always draws."""
    checks.require(seed is not None and step is not None and sample_id is not None, "incomplete noise key")
    assert seed is not None and step is not None and sample_id is not None
    return make_key(seed, step, sample_id, like)


def launch_noise(
    out: Tensor, seed: Integer | None, step: Integer | None, sample_id: Integer | None, *, normal: bool
) -> None:
    """Fill `out` (B, ...) with keyed noise."""
    checks.check_outputs((out,), ())
    key = given_key(seed, step, sample_id, out)
    layout = lay_out([out], per_sample=True, in_order=True)
    layout.launch(
        noise,
        out=layout.operands[0],
        seed=key.seed,
        step=key.step,
        sample_id=key.sample_id,
        key_tensors=key.tensors,
        NORMAL=normal,
        COUNTS=key.counts,
    )


def normal(out: Tensor, seed: Integer | None, step: Integer | None, sample_id: Integer | None) -> None:
    """Fill `out` (B, ...) with keyed normal numbers."""
    launch_noise(out, seed, step, sample_id, normal=True)


def uniform(out: Tensor, seed: Integer | None, step: Integer | None, sample_id: Integer | None) -> None:
    """Fill `out` (B, ...) with keyed uniform numbers."""
    launch_noise(out, seed, step, sample_id, normal=False)


def noisy_pair(
    x: Tensor,
    x_hat: Tensor | None,
    mask: Tensor | None,
    sigma_low: Number,
    sigma_high: Number,
    sigma_data: Number | None,
    seed: Integer | None,
    step: Integer | None,
    sample_id: Integer | None,
) -> tuple[Tensor, Tensor]:
    """(x + sigma_low n, x + sigma_high n), with x_hat in place of x where the mask is true; with sigma_data, scaled."""
    checks.require((x_hat is None) == (mask is None), "x_hat goes with a mask")
    checks.require(x_hat is None or x_hat.dtype == x.dtype, "x_hat differs from x in dtype")
    return launch_pair(x, sigma_low, sigma_high, (seed, step, sample_id), x_hat, mask, sigma_data)


def generated_pair(
    x: Tensor,
    F: Tensor,
    mask: Tensor | None,
    sigma_low: Number,
    sigma_high: Number,
    sigma_min: Number,
    sigma_data: Number,
    cm: bool,
    scales: bool,
    seed: Integer | None,
    step: Integer | None,
    sample_id: Integer | None,
) -> tuple[Tensor, Tensor]:
    """The pair of the network's predictions at the low level, where the mask is true."""
    key, form = (seed, step, sample_id), "cm" if cm else "bcm"
    return launch_pair(x, sigma_low, sigma_high, key, F, mask, sigma_data, sigma_min, form=form, scales=scales)


def launch_pair(
    x: Tensor,
    sigma_low: Number,
    sigma_high: Number,
    whole_key: tuple[Integer | None, Integer | None, Integer | None],
    x_hat: Tensor | None,
    mask: Tensor | None,
    sigma_data: Number | None,
    end: Number | None = None,
    *,
    form: str = "",
    scales: bool = True,
) -> tuple[Tensor, Tensor]:
    """A pair of x and x_hat; with a form, x_hat is the network's output."""
    placed = False
    if form and x_hat is not None and mask is not None and mask.dtype == torch.int64:
        placed = True
        checks.check_states([x], 1)
        checks.check_states([x_hat], 1)
        fits = x_hat.shape[1:] == x.shape[1:] and x_hat.device == x.device and len(x_hat) > 0
        checks.require(fits, "tensors differ in shape or device")
        if len(x) == 1:  # layouts of one sample have no stride between samples
            x_hat, mask, placed = x_hat[mask.clamp(0, len(x_hat) - 1)], mask >= 0, False
    states = [x] if x_hat is None else [x, x_hat]
    if not placed:
        checks.check_states(states, 1)
    if mask is not None:
        fits = x_hat is not None and mask.shape == x.shape[:1] and mask.device == x.device
        checks.require(fits and (placed or mask.dtype == torch.bool), "mask must be a (B,) bool tensor beside x_hat")
    low, high = torch.empty_like(x), torch.empty_like(x)
    key = given_key(*whole_key, x)
    wide = torch.float64 in [state.dtype for state in states]
    compute = torch.float64 if wide else torch.float32
    layout = lay_out([low, high, *states], per_sample=True, in_order=True)
    layout.launch(
        pair,
        low=layout.operands[0],
        high=layout.operands[1],
        x=layout.operands[2],
        x_hat=layout.operands[-1] if mask is not None and not form else None,
        network=layout.operands[-1] if form else None,
        mask=None if mask is None or placed else (mask.view(torch.uint8), mask.stride(0)),
        places=(mask, mask.stride(0)) if mask is not None and placed else None,
        last_place=len(x_hat) - 1 if x_hat is not None and placed else 0,
        sigma_low=number_argument(sigma_low, compute, x),
        sigma_high=number_argument(sigma_high, compute, x),
        sigma_data=None if sigma_data is None else number_argument(sigma_data, compute, x),
        end=None if end is None else number_argument(end, compute, x),
        FORM=form,
        SCALES=scales and sigma_data is not None,
        seed=key.seed,
        step=key.step,
        sample_id=key.sample_id,
        key_tensors=key.tensors,
        COUNTS=key.counts,
        COMPUTE=tl.float64 if wide else tl.float32,
    )
    return low, high


def fold_in(seed: Tensor, data: Tensor) -> Tensor:
    """New seeds from int64 tensors, 0-d or (B,)."""
    shape = (seed if seed.dim() >= data.dim() else data).shape
    checks.require(len(shape) <= 1, "seed and data must be 0-d or (B,)")
    out = torch.empty(shape, dtype=torch.int64, device=data.device if seed.is_cpu else seed.device)
    for x in (seed, data):
        checks.check_integer(x, out.reshape(-1))
    if out.numel() == 0:
        return out
    parts = [integer_argument(x, out.device) for x in (seed, data)]
    with device_of(out):
        fold[(triton.cdiv(out.numel(), FOLD_BLOCK),)](
            out,
            out.numel(),
            *parts[0],
            *parts[1],
            BLOCK=FOLD_BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return out


def implementations() -> dict[str, Callable[..., Any]]:
    """Every overload of the family by the name of its schema."""
    found: dict[str, Callable[..., Any]] = {"fold_in": fold_in}
    for function in (normal, uniform, noisy_pair, generated_pair):
        found |= {function.__name__: function, f"{function.__name__}.tensor": function}
    return found
