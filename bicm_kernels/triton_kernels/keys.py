"""Per-sample arguments: numbers in the compute type, and the key of a sample's noise.

A number is (value, None) or (tensor, stride), the stride 0 for one number and otherwise from one sample to the next. The
integers of a key are passed beside their tensors, so that a new seed or step compiles nothing.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Number = float | Tensor
Integer = int | Tensor
Argument = tuple[object, int | None]

WORD = 2**32


@triton.jit
def number(argument, sample, present, COMPUTE: tl.constexpr):
    """A number for each row of a tile, (ROWS, 1)."""
    if argument[1] is None:
        value = tl.full(sample.shape, argument[0], COMPUTE)
    else:
        value = tl.load(argument[0] + sample * argument[1], mask=present, other=1).to(COMPUTE)
    return value


@triton.jit
def integer(value, argument, sample, present):
    """An int64 for each row of a tile, (ROWS, 1)."""
    if argument is None:
        result = tl.full(sample.shape, value, tl.int64)
    else:
        result = tl.load(argument[0] + sample * argument[1], mask=present, other=0)
    return result


def number_argument(value: Number, compute: torch.dtype, device: torch.device) -> Argument:
    """What a kernel takes for a float, a 0-d or a (B,) tensor."""
    if isinstance(value, Tensor):
        if value.device == device:
            return (value, value.stride(0) if value.dim() else 0)
        value = value.item()
    if compute == torch.float64:  # a float argument is a float32 to Triton
        return (torch.full((), value, dtype=compute, device=device), 0)
    return (value, None)


def on_device(value: Integer, device: torch.device) -> Integer:
    """A 0-d tensor of the host, which a kernel on another device cannot read, as an int."""
    return value if not isinstance(value, Tensor) or value.device == device else int(value.item())


class Key(NamedTuple):
    """The integers of a noise key: three values, three tensors, and whether a sample's place is added to its id."""

    seed: int
    step: int
    sample_id: int
    tensors: tuple[tuple[Tensor, int] | None, ...]
    counts: bool


NO_KEY = Key(0, 0, 0, (None, None, None), False)


def make_key(seed: Integer, step: Integer, sample_id: Integer, batch: int, device: torch.device) -> Key:
    """The key of a batch's noise. One seed per sample leaves nothing for the sample's id to tell apart: it is 0."""
    if isinstance(seed, Tensor) and seed.dim() == 1:
        sample_id = 0
        counts = False
    else:
        counts = not (isinstance(sample_id, Tensor) and sample_id.dim() == 1)
    parts = [on_device(value, device) for value in (seed, step, sample_id)]
    values = [0 if isinstance(part, Tensor) else part for part in parts]
    tensors = [(x, x.stride(0) if x.dim() else 0) if isinstance(x, Tensor) else None for x in parts]
    return Key(values[0], values[1], values[2], tuple(tensors), counts)
