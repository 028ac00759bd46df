"""Draws from torch's own generators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def torch_randn(
    shape: Sequence[int],
    *,
    generator: Generator | list[Generator] | tuple[Generator, ...] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """torch.randn; with several generators, a sample from each."""
    if not isinstance(generator, list | tuple):
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)
    if not shape or len(generator) != shape[0]:
        raise ValueError(f"generator: expected one for each of the samples of {tuple(shape)}, got {len(generator)}")
    sample = (1, *shape[1:])
    rows = [torch.randn(sample, generator=one, dtype=dtype, device=device) for one in generator]
    return torch.cat(rows) if rows else torch.randn(shape, dtype=dtype, device=device)
