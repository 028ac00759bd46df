"""The consistency model's sampling in plain PyTorch, for the check: nothing fused, formulas as printed.

It shares only the keyed noise with the fused code, so that the pictures can be the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.consistency.schedules import ConsistencySchedule
from bicm_diffusion.keys import CONSISTENCY_INVERSION, CONSISTENCY_SAMPLING
from bicm_kernels import fold_in, normal


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    x: Tensor,
    schedule: ConsistencySchedule,
    *,
    seed: int = 0,
    extra_args: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return samples at t_min by BCM's Alg. 2, 3 or 4, depending on the schedule."""
    key, evaluations = fold_in(seed, CONSISTENCY_SAMPLING), 0
    t = schedule.levels[0]
    for u in (*schedule.levels[1:], schedule.t_min):
        x, t, evaluations = _leap(model, x, t, u, schedule, extra_args), u, evaluations + 1
    for noise, level in schedule.zigzags:
        x = x + noise * normal(x.shape, seed=key, step=evaluations - 1, dtype=x.dtype)
        x = _leap(model, x, noise, level, schedule, extra_args)
        x = _leap(model, x, level, schedule.t_min, schedule, extra_args)
        evaluations += 2
    return x


@torch.no_grad()
def invert(
    model: Callable[..., Tensor],
    x: Tensor,
    schedule: ConsistencySchedule,
    *,
    seed: int = 0,
    extra_args: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return clean samples inverted to the schedule's first level by BCM's Alg. 5."""
    t, *higher = reversed(schedule.levels)
    x = x + t * normal(x.shape, seed=fold_in(seed, CONSISTENCY_INVERSION), dtype=x.dtype)
    for u in higher:
        x, t = _leap(model, x, t, u, schedule, extra_args), u
    return x


def slerp(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Return the interpolation of BCM eq. 15, sample by sample, for samples that are neither parallel nor opposite."""
    results = []
    for a, b, alpha in zip(first, second, weight.tolist(), strict=True):
        cosine = (torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())).item()
        psi = math.acos(cosine)
        results.append((math.sin((1 - alpha) * psi) * a + math.sin(alpha * psi) * b) / math.sin(psi))
    return torch.stack(results)


def _leap(
    model: Callable[..., Tensor],
    x: Tensor,
    t: float,
    u: float,
    schedule: ConsistencySchedule,
    extra_args: Mapping[str, Any] | None,
) -> Tensor:
    """BCM eq. 20."""
    variance = schedule.sigma_data**2 + t**2
    times, targets = (torch.full((len(x),), level, dtype=x.dtype) for level in (t, u))
    output = model(x / math.sqrt(variance), times, targets, **(extra_args or {}))
    c_skip = (schedule.sigma_data**2 + t * u) / variance
    c_out = schedule.sigma_data * (t - u) / math.sqrt(variance)
    return c_skip * x + c_out * output
