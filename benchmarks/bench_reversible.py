"""Exact BDIA steps against the same integer arithmetic in PyTorch, without checks of overflow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bicm_kernels as bk
from benchmarks.cases import Case

NUMBERS = {"a": 0.98, "b": 0.03, "a_last": 0.97, "b_last": 0.04}
BITS = 32


def encode(x: Tensor) -> Tensor:
    """``fixed_point_encode`` on the default grid."""
    return bk.fixed_point_encode(x)


def torch_encode(x: Tensor) -> Tensor:
    """rint(2^32 x)."""
    return (x.double() * 2.0**BITS).round().to(torch.int64)


def unit_step(eps: Tensor, q_last: Tensor, q: Tensor, info: Tensor, **numbers: Any) -> Tensor:
    """``bdia_exact_step`` at gamma = 1."""
    return bk.bdia_exact_step(q_last, q, eps, info, **numbers)[0]


def increment(eps: Tensor, q: Tensor, *, gamma: float, a: float, b: float, a_last: float, b_last: float) -> Tensor:
    """The integer that a step adds."""
    z = q.double() * 2.0**-BITS
    weighed = (a - gamma / a_last) * z + (b + gamma * (b_last / a_last)) * eps.double()
    return (weighed * 2.0**BITS).round().to(torch.int64)


def torch_unit_step(eps: Tensor, q_last: Tensor, q: Tensor, info: Tensor, **numbers: Any) -> Tensor:
    """The same in tensor operations."""
    return q_last + increment(eps, q, gamma=1.0, **numbers)


def guided_step(
    eps: Tensor, cond: Tensor, q_last: Tensor, q: Tensor, info: Tensor, *, guidance_scale: float, **numbers: Any
) -> Tensor:
    """``bdia_exact_step`` at gamma = 1 with a pair of predictions."""
    return bk.bdia_exact_step(q_last, q, (eps, cond), info, guidance_scale=guidance_scale, **numbers)[0]


def torch_guided_step(
    eps: Tensor, cond: Tensor, q_last: Tensor, q: Tensor, info: Tensor, *, guidance_scale: float, **numbers: Any
) -> Tensor:
    """The same in tensor operations."""
    eps, cond = eps.double(), cond.double()
    return q_last + increment(eps + guidance_scale * (cond - eps), q, gamma=1.0, **numbers)


def buffered_step(
    eps: Tensor, q_last: Tensor, q: Tensor, info: Tensor, *, n: int, m: int, **numbers: Any
) -> tuple[Tensor, Tensor]:
    """``bdia_exact_step`` at gamma = n/m."""
    return bk.bdia_exact_step(q_last, q, eps, info, gamma=(n, m), **numbers)


def torch_buffered_step(
    eps: Tensor, q_last: Tensor, q: Tensor, info: Tensor, *, n: int, m: int, **numbers: Any
) -> tuple[Tensor, Tensor]:
    """The information buffer's arithmetic in tensor operations."""
    info = info * m + torch.remainder(q_last, m)
    scaled = torch.div(q_last, m, rounding_mode="floor") * n + torch.remainder(info, n)
    return scaled + increment(eps, q, gamma=n / m, **numbers), torch.div(info, n, rounding_mode="floor")


CASES = (
    Case("fixed_point_encode", encode, torch_encode, tensors=1, reads=1, writes=0, state_passes=1),
    Case(
        "bdia_exact_step",
        unit_step,
        torch_unit_step,
        tensors=1,
        reads=1,
        writes=0,
        states=3,
        state_passes=3,
        coefficients=NUMBERS,
    ),
    Case(
        "bdia_exact_step_guided",
        guided_step,
        torch_guided_step,
        tensors=2,
        reads=2,
        writes=0,
        states=3,
        state_passes=3,
        coefficients={**NUMBERS, "guidance_scale": 3.0},
    ),
    Case(
        "bdia_exact_step_9_10",
        buffered_step,
        torch_buffered_step,
        tensors=1,
        reads=1,
        writes=0,
        states=3,
        state_passes=5,
        coefficients={**NUMBERS, "n": 9, "m": 10},
    ),
)
