"""EDM's noise levels: a power grid between two noise levels, variance-exploding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bicm_diffusion.schedules.schedule import Schedule, check_steps


def power_grid(count: int, low: float, high: float, rho: float) -> Tensor:
    """Return `count` levels (count,) float64 from low to high, uniform in their power 1/rho; both ends are exact.

    >>> power_grid(3, 0.0, 1.0, 2.0)
    tensor([0.0000, 0.2500, 1.0000], dtype=torch.float64)
    """
    first, last = low ** (1 / rho), high ** (1 / rho)
    levels = (first + torch.arange(count, dtype=torch.float64) / (count - 1) * (last - first)) ** rho
    levels[0], levels[-1] = low, high  # the powers round, and a sampler starts at the highest itself
    return levels


def karras_sigmas(steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Return EDM's grid of noise levels (steps,), float64, ascending from sigma_min to sigma_max.

    sigma_i = (sigma_min^(1/rho) + i/(steps - 1)·(sigma_max^(1/rho) - sigma_min^(1/rho)))^rho, i = 0 … steps - 1;
    both ends are exact, and one step is sigma_max alone. rho = 7 is EDM's and consistency training's (BCM eq. 14), 1 is
    uniform.
    Raises ValueError unless steps ≥ 1, 0 ≤ sigma_min < sigma_max and rho > 0, all finite.

    >>> karras_sigmas(3, sigma_min=1.0, sigma_max=16.0, rho=2.0)
    tensor([ 1.0000,  6.2500, 16.0000], dtype=torch.float64)
    """
    check_steps(steps)
    if not 0.0 <= sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min, sigma_max: expected 0 <= sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    if not 0.0 < rho < math.inf:
        raise ValueError(f"rho: expected a value above 0, got {rho}")
    return power_grid(steps, sigma_min, sigma_max, rho)


def karras_schedule(
    steps: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    final_sigma: float | None = 0.0,
) -> Schedule:
    """Return EDM's schedule: alpha = 1, `steps` levels of `karras_sigmas`, then final_sigma; times are the sigmas.

    final_sigma in [0, sigma_min) is index 0, so that every level of the grid is left by one step; None ends the grid
    on sigma_min itself, with `steps` intervals between. All tables are float64.
    Raises ValueError for a value out of range.

    >>> karras_schedule(3, sigma_min=1.0, sigma_max=16.0, rho=2.0).sigma
    (0.0, 1.0, 6.25, 16.0)
    """
    if final_sigma is not None and not 0.0 <= final_sigma < sigma_min:
        raise ValueError(f"final_sigma: expected None or a value in [0, sigma_min), got {final_sigma}")
    check_steps(steps)
    levels = steps if final_sigma is not None else steps + 1
    grid = karras_sigmas(levels, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho).tolist()
    sigmas = tuple(grid if final_sigma is None else [final_sigma, *grid])
    return Schedule(sigmas, (1.0,) * len(sigmas), sigmas)
