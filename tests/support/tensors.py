"""Dtypes, random tensors and layouts that tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

#: The fixtures `same_bits` and `threads`.
Bits = Callable[[Tensor, Tensor], None]
Threads = Callable[[int], Any]


def random(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
    "cut out": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 0))[..., 1:, 1:-2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "samples last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every other sample": lambda x: torch.stack([x, -x], dim=1).flatten(0, 1)[::2],
    "expanded batch": lambda x: x[:1].expand_as(x),
    "expanded inside": lambda x: x[:, :, :1].expand_as(x),
    "one number": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "negated view": lambda x: torch.complex(x, -x).conj().imag if x.dtype in (F32, F64) else x,
}
