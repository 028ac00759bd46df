"""Data whose noise prediction and whose exact flow are known: a Gaussian and a mixture of two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

from bicm_diffusion import Schedule, vp_alpha_sigma

Levels = Callable[[Tensor], tuple[Tensor, Tensor]]


def ve_levels(times: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha and sigma where the times are noise levels."""
    return torch.ones_like(times), times


def column(numbers: Tensor, z: Tensor) -> Tensor:
    """Numbers (B,) in the shape in which they meet z."""
    return numbers.reshape(-1, *[1] * (z.dim() - 1))


@dataclass(frozen=True)
class Mixture:
    """Every element on its own: x = ±mean with equal odds, plus std times a normal. A Gaussian where mean is 0."""

    std: float = 0.7
    mean: float = 0.0
    levels: Levels = vp_alpha_sigma

    def __call__(self, z: Tensor, times: Tensor, **_: Any) -> Tensor:
        """E[n | z], in float64 or float32; every element on its own, so that it is batch-invariant."""
        alpha, sigma = (column(x, z) for x in self.levels(times.double()))
        variance = alpha**2 * self.std**2 + sigma**2
        centre = alpha * self.mean
        kind = torch.float64 if z.dtype == torch.float64 else torch.float32
        wide = z.double()
        return (sigma * (wide - centre * torch.tanh(centre * wide / variance)) / variance).to(kind)

    def output(self, kind: str, z: Tensor, times: Tensor) -> Tensor:
        """What a network of another kind predicts: "v" or "x0"."""
        alpha, sigma = (column(x, z) for x in self.levels(times.double()))
        eps = self(z, times)
        x0 = (z - sigma * eps) / alpha
        return x0 if kind == "x0" else alpha * eps - sigma * x0

    def flow(self, z: float, schedule: Schedule, start: int, stop: int) -> float:
        """Where the probability flow takes z from one index to another: it keeps every quantile."""

        def below(z: float, i: int) -> float:
            alpha, sigma = schedule.alpha[i], schedule.sigma[i]
            scale = (alpha**2 * self.std**2 + sigma**2) ** 0.5
            return sum(norm.cdf((z - sign * alpha * self.mean) / scale) for sign in (-1, 1)) / 2

        quantile = below(z, start)
        return brentq(lambda x: below(x, stop) - quantile, -50, 50, xtol=1e-14, rtol=1e-15)


def noise(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Seeded standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Callable[..., Tensor]:
    """A small random network of z (B, width) and the time: not batch-invariant, and in the given dtype."""
    draw = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(width, width, generator=draw).to(dtype) / width**0.5 for _ in range(2))

    def model(z: Tensor, times: Tensor, shift: float = 0.0) -> Tensor:
        hidden = torch.tanh(z.to(dtype) @ first + times.to(dtype)[:, None] + shift)
        return torch.tanh(hidden @ second)

    return model
