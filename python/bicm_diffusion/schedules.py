"""Variance-preserving noise schedules and the DDIM coefficient tables made from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

BETA_MIN = 0.1
BETA_MAX = 20.0


def vp_alpha_sigma(times: Tensor, *, beta_min: float = BETA_MIN, beta_max: float = BETA_MAX) -> tuple[Tensor, Tensor]:
    """Return alpha(t) and sigma(t) of the linear-beta variance-preserving process z = alpha·x + sigma·n.

    times: any shape, in [0, 1], 0 = data; the results have its shape and dtype. alpha² + sigma² is 1.
    Equation: ln alpha(t) = -(beta_max - beta_min)·t²/4 - beta_min·t/2, the limit of DDPM's 1000 linear betas.

    >>> alpha, sigma = vp_alpha_sigma(torch.tensor([0.0, 1.0], dtype=torch.float64))
    >>> sigma[0].item(), alpha[1].item() < 0.01
    (0.0, True)
    """
    log_alpha = -(beta_max - beta_min) / 4 * times * times - beta_min / 2 * times
    return log_alpha.exp(), (-(2 * log_alpha).expm1()).sqrt()


@dataclass(frozen=True)
class Schedule:
    """A sampling grid i = 0 (data) … N (noisiest): alpha_i, sigma_i and the coefficients of BDIA eq. 6.

    times: what the model is told at index i; alpha, sigma: z_i = alpha_i·x + sigma_i·n. Each holds N + 1
    floats, N ≥ 1. a[i] = alpha_{i-1}/alpha_i and b[i] = sigma_{i-1} - sigma_i·a[i] for i = 1 … N; no step
    leaves index 0, so a[0] and b[0] are NaN.
    Raises ValueError unless the lengths agree, alpha > 0, sigma ≥ 0 and sigma/alpha grows with i.

    >>> schedule = Schedule(times=(0.0, 1.0), alpha=(1.0, 0.6), sigma=(0.0, 0.8))
    >>> schedule.steps, round(schedule.a[1], 3), round(schedule.b[1], 3)
    (1, 1.667, -1.333)
    """

    times: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    a: tuple[float, ...] = field(init=False, repr=False)
    b: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lengths = (len(self.times), len(self.alpha), len(self.sigma))
        if len(set(lengths)) != 1 or lengths[0] < 2:
            raise ValueError(f"times, alpha, sigma: expected one length of at least 2, got lengths {lengths}")
        _check_levels(self.alpha, self.sigma)
        alpha, sigma = self.alpha, self.sigma
        a = (math.nan, *(alpha[i - 1] / alpha[i] for i in range(1, len(alpha))))
        b = (math.nan, *(sigma[i - 1] - sigma[i] * a[i] for i in range(1, len(sigma))))
        object.__setattr__(self, "a", a)
        object.__setattr__(self, "b", b)

    @property
    def steps(self) -> int:
        """The number N of steps between data and noise."""
        return len(self.times) - 1


def _check_levels(alpha: tuple[float, ...], sigma: tuple[float, ...]) -> None:
    for name, values, bad in (("alpha", alpha, min(alpha) <= 0), ("sigma", sigma, min(sigma) < 0)):
        if bad or not all(map(math.isfinite, values)):
            raise ValueError(f"{name}: expected finite values, alpha > 0 and sigma >= 0, got {values}")
    ratio = [s / r for s, r in zip(sigma, alpha, strict=True)]
    if any(high <= low for low, high in pairwise(ratio)):
        raise ValueError(f"sigma: sigma/alpha must grow with the index, got {ratio}")


def vp_schedule(
    steps: int,
    *,
    final_time: float = 0.0,
    beta_min: float = BETA_MIN,
    beta_max: float = BETA_MAX,
) -> Schedule:
    """Return the linear-beta variance-preserving schedule on uniform times from final_time to 1.

    steps: N ≥ 1. final_time in [0, 1) is index 0; 0 ends on clean data, sigma_0 = 0. All tables are float64.
    Raises ValueError for a value out of range.

    >>> schedule = vp_schedule(50)
    >>> schedule.steps, schedule.sigma[0], round(schedule.sigma[50], 4)
    (50, 0.0, 1.0)
    """
    if steps < 1:
        raise ValueError(f"steps: expected an integer of at least 1, got {steps}")
    if not 0.0 <= final_time < 1.0:
        raise ValueError(f"final_time: expected a value in [0, 1), got {final_time}")
    times = torch.linspace(final_time, 1.0, steps + 1, dtype=torch.float64)
    alpha, sigma = vp_alpha_sigma(times, beta_min=beta_min, beta_max=beta_max)
    return Schedule(tuple(times.tolist()), tuple(alpha.tolist()), tuple(sigma.tolist()))
