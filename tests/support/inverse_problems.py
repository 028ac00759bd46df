"""A bent denoiser, a consistency model, an operator, and the inverse solvers' algorithms written plainly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion import ConsistencySchedule, Schedule, karras_schedule
from bicm_diffusion.inverse import cm_posterior_sample, dps_sample, freedom_sample, lgd_sample, mpgd_sample
from bicm_diffusion.keys import ANCESTRAL, AROUND, CM_INVERSION, TRAVEL
from bicm_kernels import fold_in, normal
from tests.support.closed_forms import noise

STD = 0.5
SCHEDULE = karras_schedule(6, t_min=0.05, t_max=10.0)
LEVELS = ConsistencySchedule((10.0, 2.0, 0.5))
SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dps": (dps_sample, {}),
    "lgd": (lgd_sample, {}),
    "lgd, three draws": (lgd_sample, {"draws": 3, "radius": 0.2}),
    "freedom": (freedom_sample, {"repeats": 3, "repeat_range": (0.1, 5.0)}),
    "mpgd": (mpgd_sample, {}),
    "cm posterior": (cm_posterior_sample, {"tau": 0.1}),
}


def wide(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def clean(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser, bent so that nothing is linear; every element on its own, so that it is batch-invariant."""
    level = wide(t, x)
    return x * STD**2 / (STD**2 + level**2) / (1.0 + 0.1 * (x / (1.0 + level)) ** 2)


def jump(x: Tensor, t: Tensor) -> Tensor:
    """A consistency model of another shape than the denoiser."""
    level = wide(t, x)
    return x * STD / (STD**2 + level**2) ** 0.5 / (1.0 + 0.2 * (x / (1.0 + level)) ** 2)


def operator(x0: Tensor) -> Tensor:
    return x0[:, :2] ** 2 + x0[:, 1:3]


def drawn(x: Tensor, purpose: int, step: int, *folds: int) -> Tensor:
    key = fold_in(3, purpose)
    for fold in folds:
        key = fold_in(key, fold)
    return normal(x.shape, seed=key, step=step).to(x.dtype)


def plain(name: str, z: Tensor, y: Tensor, schedule: Schedule, mean_at: Any = clean) -> Tensor:
    """The algorithms as they are written (DPS Alg. 1, LGD, FreeDoM, MPGD, CM-DIS Alg. 2), in units of x0."""
    x = z / schedule.alpha[-1]
    options = SOLVERS[name][1]
    for i in range(schedule.steps, 0, -1):
        sigma, below = (schedule.sigma[k] / schedule.alpha[k] for k in (i, i - 1))
        alpha = schedule.alpha[i]
        low, high = options.get("repeat_range", (math.inf, math.inf))
        for repeat in range(options.get("repeats", 1) if low <= sigma <= high else 1):
            if repeat:
                x = x + math.sqrt(sigma**2 - below**2) * drawn(x, TRAVEL, i, repeat)
            x = x.detach().requires_grad_()
            t = torch.full(x.shape[:1], sigma, dtype=x.dtype)
            mean = mean_at(x, t)
            if name == "mpgd":
                mean = mean.detach().requires_grad_()
            points = [jump(x, t) if name == "cm posterior" else mean]
            radius = {"lgd": sigma / math.sqrt(1 + sigma**2), "lgd, three draws": 0.2, "cm posterior": 0.1}.get(name)
            if radius is not None:
                points = [points[0] + radius * drawn(x, AROUND, i, k) for k in range(options.get("draws", 1))]
            norms = torch.stack([(operator(p) - y).flatten(1).norm(dim=1) for p in points])
            distance = -torch.log(torch.exp(-norms).mean(0)).sum()
            (g,) = torch.autograd.grad(distance, mean if name == "mpgd" else x)
            n = drawn(x, ANCESTRAL, i, *[repeat] if repeat else [])
            if name == "mpgd":
                mean = mean - 0.3 * g
            ratio = (below / sigma) ** 2
            x = (mean + ratio * (x - mean) + below * math.sqrt(sigma**2 - below**2) / sigma * n).detach()
            if name != "mpgd":
                # The derivative in z = alpha·x, and a correction of z' = alpha'·x'.
                x = x - 0.3 * g / alpha / schedule.alpha[i - 1]
    return x * schedule.alpha[0]


def problem(**others: Any) -> dict[str, Any]:
    y = 0.3 * noise(4, 2, 5, seed=1).abs()
    return {"operator": operator, "y": y, "scale": 0.3, "seed": 3, **others}


def extras(name: str) -> dict[str, Any]:
    own = {"consistency_model": jump, "parameterization": "x0"} if name == "cm posterior" else {}
    return {**SOLVERS[name][1], **own}


def plain_inversion(z: Tensor, y: Tensor) -> Tensor:
    """CM-DIS Alg. 4 with three iterations, η = 0.2·(t + 0.5) and τ = 0.1."""
    x = z
    for place, t in enumerate(LEVELS.levels):
        times = torch.full(z.shape[:1], t, dtype=z.dtype)
        for k in range(3):
            x = x.detach().requires_grad_()
            point = jump(x, times) + 0.1 * drawn(x, AROUND, place, k)
            (g,) = torch.autograd.grad((operator(point) - y).flatten(1).norm(dim=1).sum(), x)
            x = x - 0.2 * (t + 0.5) * g
        x = jump(x, times).detach()
        if place < 2:
            x = x + math.sqrt(LEVELS.levels[place + 1] ** 2 - 0.002**2) * drawn(x, CM_INVERSION, place)
    return x
