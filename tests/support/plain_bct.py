"""The BCT loss written plainly, as the paper prints it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bicm_diffusion import Levels
from bicm_diffusion.consistency.objective import DROPOUT
from bicm_kernels import fold_in, normal

T_MIN = 0.002


def broadcast(t: Tensor) -> Tensor:
    return t[:, None, None]


def leap(model: nn.Module, x: Tensor, t: Tensor, u: Tensor, dropout: int | None) -> Tensor:
    """BCM eq. 20."""
    if dropout is not None:
        torch.manual_seed(dropout)
    s = 0.25 + broadcast(t * t)
    output = model(x / s.sqrt(), t, u)
    return (0.25 + broadcast(t * u)) / s * x + 0.5 * broadcast(t - u) / s.sqrt() * output


def distance(a: Tensor, b: Tensor, c: float) -> Tensor:
    """BCM eq. 11."""
    return ((a - b).flatten(1).square().sum(1) + c * c).sqrt() - c


def plain_loss(
    model: nn.Module,
    x: Tensor,
    levels: Levels,
    *,
    seed: int,
    step: int,
    c: float,
    direct: bool = False,
    thaw: bool = False,
) -> dict[str, Tensor]:
    """BCM eq. 9 as it is printed; `thaw` lets the outer network learn too, which it must not."""
    low, high, partner = (level.to(x.dtype) for level in levels)
    end = torch.full_like(low, T_MIN)
    z = normal(x.shape, seed=seed, step=step, dtype=x.dtype)
    dropout = int(fold_in(fold_in(seed, DROPOUT), step))
    frozen = model if thaw else copy.deepcopy(model).requires_grad_(False)
    x_low, x_high, x_partner = (x + broadcast(t) * z for t in (low, high, partner))
    goal = leap(model, x_low, low, end, dropout).detach()
    consistency = distance(leap(model, x_high, high, end, dropout), goal, c) / (high - low)
    if direct:
        goal = leap(model, x_partner, partner, end, dropout).detach()
    moved = leap(model, x_low, low, partner, dropout)
    trajectory = distance(leap(frozen, moved, partner, end, dropout), goal, c) / (low - partner).abs()
    return {"consistency": consistency.mean(), "trajectory": trajectory.mean()}
