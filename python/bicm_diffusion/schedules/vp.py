"""The variance-preserving process with linear betas in continuous time."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.schedules.schedule import Schedule, check_steps

Times = Tensor | float | Sequence[float]

BETA_MIN = 0.1
BETA_MAX = 20.0


def vp_alpha_sigma(times: Times, *, beta_min: float = BETA_MIN, beta_max: float = BETA_MAX) -> tuple[Tensor, Tensor]:
    """Return alpha(t) and sigma(t) of the linear-beta variance-preserving process z = alpha·x + sigma·n.

    times: a tensor of any shape, in [0, 1], 0 = data; the results have its shape and dtype. A number or a sequence of
    them is taken as float64. alpha² + sigma² is 1. Raises TypeError for anything else, and ValueError for numbers out
    of range; the values of a tensor are not checked.
    Equation: ln alpha(t) = -(beta_max - beta_min)·t²/4 - beta_min·t/2, the limit of DDPM's 1000 linear betas.

    >>> alpha, sigma = vp_alpha_sigma(torch.tensor([0.0, 1.0], dtype=torch.float64))
    >>> sigma[0].item(), alpha[1].item() < 0.01
    (0.0, True)
    """
    times = _as_tensor("times", times, 1.0, "in [0, 1]")
    log_alpha = -(beta_max - beta_min) / 4 * times * times - beta_min / 2 * times
    return log_alpha.exp(), (-(2 * log_alpha).expm1()).sqrt()


def vp_time(ratio: Times, *, beta_min: float = BETA_MIN, beta_max: float = BETA_MAX) -> Tensor:
    """Return the time t at which sigma(t)/alpha(t) has a given value: a VP network's time at a VE noise level.

    ratio: as the times of `vp_alpha_sigma`, whose inverse this is, but ≥ 0 and finite; the result has its shape and
    dtype. With l = ln(1 + ratio²), t = 2l/(beta_min + sqrt(beta_min² + 2(beta_max - beta_min)·l)).

    >>> alpha, sigma = vp_alpha_sigma(torch.tensor([0.25], dtype=torch.float64))
    >>> vp_time(sigma / alpha)
    tensor([0.2500], dtype=torch.float64)
    """
    ratio = _as_tensor("ratio", ratio, sys.float_info.max, "finite and at least 0")
    doubled = (ratio * ratio).log1p()
    # Where the square overflows. The clamp keeps the derivative of what is not chosen finite.
    large = ratio > math.sqrt(torch.finfo(doubled.dtype).max) / 2
    doubled = torch.where(large, 2 * ratio.clamp_min(1.0).log(), doubled)
    return 2 * doubled / (beta_min + (beta_min**2 + 2 * (beta_max - beta_min) * doubled).sqrt())


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
    check_steps(steps)
    if not 0.0 <= final_time < 1.0:
        raise ValueError(f"final_time: expected a value in [0, 1), got {final_time}")
    times = torch.linspace(final_time, 1.0, steps + 1, dtype=torch.float64)
    alpha, sigma = vp_alpha_sigma(times, beta_min=beta_min, beta_max=beta_max)
    return Schedule(tuple(times.tolist()), tuple(alpha.tolist()), tuple(sigma.tolist()))


def _as_tensor(name: str, values: Times, most: float, expected: str) -> Tensor:
    """Numbers as a tensor; raises unless they are in [0, most]. A tensor is not read, which may wait for a device."""
    if isinstance(values, Tensor):
        return values
    try:
        found = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        kinds = "a tensor, a number or a sequence of numbers"
        raise TypeError(f"{name}: expected {kinds}, got {described(values)}") from None
    inside = (found >= 0.0) & (found <= most)
    if not torch.compiler.is_compiling() and not inside.all():  # a traced graph reads no values
        wrong = found[~inside]
        raise ValueError(f"{name}: expected values {expected}, got {float(wrong[0])}")
    return torch.as_tensor(values, dtype=torch.float64)  # on the default device
