"""EDM's noise levels: a power grid between two noise levels, variance-exploding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bicm_diffusion.schedules.schedule import Schedule, check_steps

T_MIN = 0.002
T_MAX = 80.0


def power_grid(count: int, low: float, high: float, rho: float) -> Tensor:
    """Return `count` levels (count,) float64 from low to high, uniform in their power 1/rho; both ends are exact.

    >>> power_grid(3, 0.0, 1.0, 2.0)
    tensor([0.0000, 0.2500, 1.0000], dtype=torch.float64)
    """
    first, last = low ** (1 / rho), high ** (1 / rho)
    levels = (first + torch.arange(count, dtype=torch.float64) / (count - 1) * (last - first)) ** rho
    levels[0], levels[-1] = low, high  # the powers round, and a sampler starts exactly at the highest
    return levels


def karras_levels(count: int, *, t_min: float = T_MIN, t_max: float = T_MAX, rho: float = 7.0) -> Tensor:
    """Return EDM's grid of noise levels t_1 = t_min < … < t_N = t_max, (N,) float64 (EDM 5; BCM eq. 14).

    t_n = (t_min^(1/rho) + (n - 1)/(N - 1)·(t_max^(1/rho) - t_min^(1/rho)))^rho, n = 1 … N; both ends are exact, and one
    level is t_max alone. rho = 7 is EDM's, 1 is uniform. 0 <= t_min < t_max, and the levels are denser near t_min.
    Raises TypeError for a count that is not an integer, ValueError unless N >= 1, 0 <= t_min < t_max and rho > 0.

    >>> karras_levels(3, t_min=1.0, t_max=16.0, rho=2.0)
    tensor([ 1.0000,  6.2500, 16.0000], dtype=torch.float64)
    """
    check_steps(count, name="count")
    if not 0.0 <= t_min < t_max < math.inf:
        raise ValueError(f"t_min, t_max: expected 0 <= t_min < t_max, got {t_min} and {t_max}")
    if not 0.0 < rho < math.inf:
        raise ValueError(f"rho: expected a positive value, got {rho}")
    return power_grid(count, t_min, t_max, rho)


def karras_schedule(
    steps: int,
    *,
    t_min: float = T_MIN,
    t_max: float = T_MAX,
    rho: float = 7.0,
    final_sigma: float | None = 0.0,
) -> Schedule:
    """Return EDM's schedule: alpha = 1, `steps` levels of `karras_levels`, then final_sigma; times are the sigmas.

    final_sigma in [0, t_min) is index 0, so that every level of the grid is the start of one step; None ends the grid
    on t_min itself, with `steps` intervals in between. All tables are float64.
    Raises ValueError for a value out of range.

    >>> karras_schedule(3, t_min=1.0, t_max=16.0, rho=2.0).sigma
    (0.0, 1.0, 6.25, 16.0)
    """
    if final_sigma is not None and not 0.0 <= final_sigma < t_min:
        raise ValueError(f"final_sigma: expected None or a value in [0, t_min), got {final_sigma}")
    check_steps(steps)
    levels = steps if final_sigma is not None else steps + 1
    grid = karras_levels(levels, t_min=t_min, t_max=t_max, rho=rho).tolist()
    sigmas = tuple(grid if final_sigma is None else [final_sigma, *grid])
    return Schedule(sigmas, (1.0,) * len(sigmas), sigmas)
