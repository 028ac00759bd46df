"""Per-sample arguments: numbers in the compute type, and the key of a sample's noise.

A number is (value,), the three parts of a float64's bits, or (tensor, stride), the stride 0 for one number, or else
from sample to sample. The integers of a key are passed beside their tensors, so that a new seed compiles nothing.
Triton 3.6 can neither count nor compare with None a tuple that holds a None: kernels tell such forms by their length,
or by a constant beside them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicm_kernels.triton_kernels import checks
from bicm_kernels.triton_kernels.checks import Integer, Number

Argument = tuple[object] | tuple[Tensor, int] | tuple[float, float, float]

#: How many bits of a float64 stand below its first and below its second part.
HIGH, MIDDLE = tl.constexpr(42), tl.constexpr(21)


@triton.jit
def load_rows(pointer, stride, sample, present, other: tl.constexpr):
    """A tensor's value for each row of a tile, shaped as `sample`.

    One row is loaded as a scalar: of a tensor of one element, Triton 3.7 has a thread load it for all its elements.
    """
    if sample.numel == 1:
        value = tl.load(pointer + tl.sum(sample) * stride, mask=tl.max(present.to(tl.int32)) > 0, other=other)
        result = tl.full(sample.shape, value, value.dtype)
    else:
        result = tl.load(pointer + sample * stride, mask=present, other=other)
    return result


@triton.jit
def number(argument, sample, present, COMPUTE: tl.constexpr):
    """A number for each row of a tile, (ROWS, 1); 0 for one that is None."""
    if argument is None:
        value = tl.full(sample.shape, 0.0, COMPUTE)
    elif len(argument) == 1:
        value = tl.full(sample.shape, argument[0], COMPUTE)
    elif len(argument) == 3:
        bits = tl.full((), argument[0], tl.float32).to(tl.int32).to(tl.int64) << HIGH
        bits |= tl.full((), argument[1], tl.float32).to(tl.int32).to(tl.int64) << MIDDLE
        bits |= tl.full((), argument[2], tl.float32).to(tl.int32)
        value = tl.full(sample.shape, bits.to(tl.float64, bitcast=True), COMPUTE)
    else:
        value = load_rows(argument[0], argument[1], sample, present, 1).to(COMPUTE)
    return value


@triton.jit
def integer(value, tensor, sample, present):
    """An int64 for each row of a tile, (ROWS, 1)."""
    if tensor is None:
        result = tl.full(sample.shape, value, tl.int64)
    else:
        result = load_rows(tensor[0], tensor[1], sample, present, 0)
    return result


def number_argument(value: Number, compute: torch.dtype, like: Tensor) -> Argument:
    """The kernel argument for a float, a 0-d or a (B,) tensor."""
    if isinstance(value, Tensor):
        checks.check_number(value, like)
        if value.device == like.device:
            return value, value.stride(0) if value.dim() else 0
        value = value.item()  # of the host, which kernels cannot read
    return bits_of(float(value)) if compute == torch.float64 else (value,)


def bits_of(value: float) -> tuple[float, float, float]:
    """A float64 in three whole numbers of at most 22 bits: to Triton a float is a float32, and no new one compiles."""
    (bits,) = struct.unpack("<Q", struct.pack("<d", value))
    low, middle = 2**MIDDLE.value, 2 ** (HIGH.value - MIDDLE.value)
    return float(bits >> HIGH.value), float((bits >> MIDDLE.value) % middle), float(bits % low)


def integer_argument(value: Integer, device: torch.device) -> tuple[int, tuple[Tensor, int] | None]:
    """The kernel argument for an int, a 0-d or a (B,) tensor: a value and a tensor with its stride."""
    if not isinstance(value, Tensor):
        return value, None
    if value.device != device:
        return int(value.item()), None
    return 0, (value, value.stride(0) if value.dim() else 0)


class Key(NamedTuple):
    """Three integers, each a value or a tensor, and whether a sample's place is added to its id."""

    seed: int
    step: int
    sample_id: int
    tensors: tuple[tuple[Tensor, int] | None, ...]
    counts: bool


NO_KEY = Key(0, 0, 0, (None, None, None), False)


def make_key(seed: Integer, step: Integer, sample_id: Integer, like: Tensor) -> Key:
    """The key of the noise of a batch like ``like``. With a seed for each sample, its id is 0."""
    checks.check_key(seed, step, sample_id, like)
    counts = not (isinstance(sample_id, Tensor) and sample_id.dim() == 1)
    if isinstance(seed, Tensor) and seed.dim() == 1:
        sample_id, counts = 0, False
    parts = [integer_argument(value, like.device) for value in (seed, step, sample_id)]
    values = [value for value, _ in parts]
    return Key(values[0], values[1], values[2], tuple(tensor for _, tensor in parts), counts)
