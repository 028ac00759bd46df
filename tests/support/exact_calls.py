"""States and buffers of the exact steps that tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.tensors import random


def states(*shape: int, seed: int = 0, bits: int = 62) -> Tensor:
    return torch.randint(-(2**bits), 2**bits, shape, generator=torch.Generator().manual_seed(seed))


Q, NEXT, INFO = (states(3, 4, seed=k, bits=40) for k in range(3))
EPS = random(3, 4)
