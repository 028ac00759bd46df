"""Torch's own noise, drawn faster: for code whose numbers have to stay those of a torch.Generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from bicm_kernels import backend, generator_check, reference
from bicm_kernels.ops.arguments import dynamo

#: How many words of its generator torch.randn makes a number of, from 16 numbers on.
WORDS = {torch.float32: 1, torch.float64: 2}
_skips_like_torch: bool | None = None


def generator_normal(
    shape: Sequence[int],
    *,
    generator: Generator | list[Generator] | tuple[Generator, ...] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    dropped: bool = False,
) -> Tensor:
    """The numbers that ``torch.randn`` draws from a generator, which is left in the same state; faster on the CPU.

    Args:
        shape: the result's shape.
        generator: None is torch's default one; a list or tuple of shape[0] has one for each sample (1, *shape[1:]).
        dtype: torch's default, if None; float32 is what is faster, from 16 numbers on.
        device: where the result lies.
        dropped: True for numbers that nobody needs: the generator's state moves, and the result is empty. That is
            faster than a draw, for float32 and float64, from a single generator.

    Raises:
        RuntimeError, TypeError: what ``torch.randn`` raises.
        ValueError: if there are not as many generators as samples.

    MT19937 (Matsumoto & Nishimura 1998) and Box-Muller, rounded as torch rounds them. That was compared with torch
    before the first draw; where the bits differ, and for whatever is not covered, this is ``torch.randn``.

    >>> import torch, bicm_kernels as bk
    >>> noise = bk.generator_normal((4, 8), generator=torch.Generator().manual_seed(0))
    >>> torch.equal(noise, torch.randn((4, 8), generator=torch.Generator().manual_seed(0)))
    True
    """
    kind = torch.get_default_dtype() if dtype is None else dtype
    on_host = device is None or getattr(device, "type", device) == "cpu"
    if on_host and not dynamo() and backend.draws_like_torch():
        if dropped and _skip(shape, generator, kind):
            return torch.empty(0, dtype=kind)
        if kind is torch.float32:
            noise = backend.lane.generator_normal(shape, generator)
            if noise is not None:
                return noise.new_empty(0) if dropped else noise
    return reference.generator_normal(shape, generator=generator, dtype=dtype, device=device, dropped=dropped)


def _skip(shape: Sequence[int], generator: Any, dtype: torch.dtype) -> bool:
    """Move a generator's state past the numbers, where the native library can."""
    words, count = WORDS.get(dtype), math.prod(shape)
    if words is None or count < 16 or not _skips():
        return False
    # The last 16 numbers are drawn anew where they are no whole block.
    return bool(backend.lane.generator_skip(words * (count + (16 if count % 16 else 0)), generator))


def _skips() -> bool:
    """Whether the native library leaves the states that torch leaves; compared with torch once."""
    global _skips_like_torch
    if _skips_like_torch is None:
        _skips_like_torch = generator_check.agree_on_words(backend.lane.generator_skip, WORDS)
    return bool(_skips_like_torch)
