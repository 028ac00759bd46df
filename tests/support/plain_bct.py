"""The BCT loss written plainly, as the paper prints it, and a small network and batch for it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bicm_diffusion import Levels, LevelTable, draw_levels, karras_levels
from bicm_diffusion.keys import DROPOUT
from bicm_kernels import fold_in, normal

SHAPE = (6, 3, 4)
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
    from_above: bool = False,
) -> dict[str, Tensor]:
    """BCM eq. 9 as it is printed; `thaw` lets the outer network learn too, which it must not.

    from_above: the leap of the trajectory term starts from t_{n+1}.
    """
    low, high, partner = (level.to(x.dtype) for level in levels)
    end = torch.full_like(low, T_MIN)
    z = normal(x.shape, seed=seed, step=step, dtype=x.dtype)
    dropout = int(fold_in(fold_in(fold_in(seed, DROPOUT), step), 0))
    frozen = model if thaw else copy.deepcopy(model).requires_grad_(False)
    x_low, x_high, x_partner = (x + broadcast(t) * z for t in (low, high, partner))
    goal = leap(model, x_low, low, end, dropout).detach()
    consistency = distance(leap(model, x_high, high, end, dropout), goal, c) / (high - low)
    if direct:
        goal = leap(model, x_partner, partner, end, dropout).detach()
    moved = leap(model, *((x_high, high) if from_above else (x_low, low)), partner, dropout)
    trajectory = distance(leap(frozen, moved, partner, end, dropout), goal, c) / (low - partner).abs()
    return {"consistency": consistency.mean(), "trajectory": trajectory.mean()}


class Network(nn.Module):
    """A small network that depends on everything it is given, in the precision of its parameters."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(SHAPE[1] * SHAPE[2] + 2, 16)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(16, SHAPE[1] * SHAPE[2])
        self.masks: list[Tensor] = []

    def forward(self, scaled: Tensor, t: Tensor, u: Tensor, shift: float = 0.0) -> Tensor:
        times = torch.stack([t, u], dim=1).log().to(scaled.dtype) / 4
        h = self.dropout(self.first(torch.cat([scaled.flatten(1), times], dim=1)).tanh() + 2)
        self.masks.append(h.detach() == 0)
        return self.second(h).reshape(scaled.shape) + shift


def network(*, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Network(dropout=dropout).to(dtype)


def problem(dtype: torch.dtype = torch.float64, key: int = 7) -> tuple[Tensor, Levels]:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(key), dtype=torch.float64).to(dtype)
    return x, draw_levels(LevelTable(karras_levels(21)), SHAPE[0], seed=key, step=3)


def gradients(loss: Tensor, model: nn.Module) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])
