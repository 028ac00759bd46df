"""The noise that other libraries draw with torch, drawn faster."""

from __future__ import annotations

import torch
from torch import Tensor

from bicm_kernels import generator_normal


def randn_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the numbers of `torch.randn_like(x, dtype=dtype)`, from torch's default generator, left in the same state.

    x: any shape, floating or complex dtype, layout and device. Faster for contiguous float32 on the CPU.

    >>> _ = torch.manual_seed(0)
    >>> noise = randn_like(torch.ones(1, 32))
    >>> _ = torch.manual_seed(0)
    >>> torch.equal(noise, torch.randn_like(noise))
    True
    """
    if not x.is_contiguous():
        return torch.randn_like(x, dtype=dtype)  # drawn in the order of memory
    return generator_normal(x.shape, dtype=dtype or x.dtype, device=x.device)


def skip_randn_like(x: Tensor, dtype: torch.dtype | None = None) -> None:
    """Leave torch's default generator as `torch.randn_like(x, dtype=dtype)` leaves it.

    x: any shape, floating or complex dtype, layout and device. Faster for contiguous float32 and float64 on the CPU.

    >>> _ = torch.manual_seed(0)
    >>> skip_randn_like(torch.ones(1, 32))
    >>> following = torch.randn(2)
    >>> _ = torch.manual_seed(0)
    >>> _, again = torch.randn(1, 32), torch.randn(2)
    >>> torch.equal(following, again)
    True
    """
    if not x.is_contiguous():
        torch.randn_like(x, dtype=dtype)
        return
    generator_normal(x.shape, dtype=dtype or x.dtype, device=x.device, dropped=True)
