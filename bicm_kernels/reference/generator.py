"""Draws from torch's own generators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def generator_normal(
    shape: Sequence[int],
    *,
    generator: Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """What torch.randn draws."""
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)
