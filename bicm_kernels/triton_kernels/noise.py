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
from bicm_kernels.triton_kernels.checks import Integer
from bicm_kernels.triton_kernels.keys import integer, integer_argument, make_key
from bicm_kernels.triton_kernels.operands import WARPS, device_of, lay_out, locate, store
from bicm_kernels.triton_kernels.philox import box_muller, high_word, low_word, philox, uniform_from_bits

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

    A thread makes GROUP neighbours, as many as its widest load brings, so that number meets element there.
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


def launch_noise(out: Tensor, seed: Integer, step: Integer, sample_id: Integer, *, normal: bool) -> None:
    """Fill `out` (B, ...) with keyed noise."""
    checks.check_outputs((out,), ())
    key = make_key(seed, step, sample_id, out)
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


def normal(out: Tensor, seed: Integer, step: Integer, sample_id: Integer) -> None:
    """Fill `out` (B, ...) with keyed normal numbers."""
    launch_noise(out, seed, step, sample_id, normal=True)


def uniform(out: Tensor, seed: Integer, step: Integer, sample_id: Integer) -> None:
    """Fill `out` (B, ...) with keyed uniform numbers."""
    launch_noise(out, seed, step, sample_id, normal=False)


def fold_in(seed: Tensor, data: Tensor) -> Tensor:
    """New seeds from int64 tensors, 0-d or (B,)."""
    shaped = seed if seed.dim() >= data.dim() else data
    checks.require(shaped.dim() <= 1, "seed and data must be 0-d or (B,)")
    for x in (seed, data):
        checks.check_integer(x, shaped.reshape(-1))
    out = torch.empty_like(shaped)
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
    return {
        "normal": normal,
        "normal.tensor": normal,
        "uniform": uniform,
        "uniform.tensor": uniform,
        "fold_in": fold_in,
    }
