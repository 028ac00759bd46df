"""The keyed noise itself: normal and uniform numbers into a tensor of any dtype and layout, and new seeds."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicm_kernels.triton_kernels.checks import check_integer, check_key, check_output
from bicm_kernels.triton_kernels.keys import Integer, integer, make_key
from bicm_kernels.triton_kernels.operands import device_of, lay_out, locate, store
from bicm_kernels.triton_kernels.philox import box_muller, high_word, low_word, philox, uniform_from_bits

FOLD_BLOCK = 256


@triton.jit
def draw(
    seed, step, sample_id, key_tensors, sample, present, first, NORMAL: tl.constexpr, COUNTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The numbers (ROWS, COLUMNS) of a tile, float32: a quad of Philox makes four neighbours."""
    seed = integer(seed, key_tensors[0], sample, present)
    step = integer(step, key_tensors[1], sample, present)
    identity = integer(sample_id, key_tensors[2], sample, present)
    if COUNTS:
        identity += sample
    quad = (first // 4).to(tl.int64) + tl.arange(0, COLUMNS // 4)[None, :]
    r0, r1, r2, r3 = philox(
        low_word(quad), high_word(quad), low_word(identity), low_word(step), low_word(seed), high_word(seed)
    )
    if NORMAL:
        n0, n1 = box_muller(r0, r1)
        n2, n3 = box_muller(r2, r3)
    else:
        n0, n1 = uniform_from_bits(r0), uniform_from_bits(r1)
        n2, n3 = uniform_from_bits(r2), uniform_from_bits(r3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


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
    INDEX: tl.constexpr,
):
    sample, present, first, element, inside = locate(elements, batch, blocks, ROWS, COLUMNS, INDEX)
    numbers = draw(seed, step, sample_id, key_tensors, sample, present, first, NORMAL, COUNTS, COLUMNS)
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
    check_output("out", out)
    check_key(seed, step, sample_id, out)
    layout = lay_out([out], per_sample=True, in_order=True)
    key = make_key(seed, step, sample_id, out.device)
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
