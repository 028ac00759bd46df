"""DDPM's discrete schedules: tables of alpha bar over the training steps, and the sampler's subset of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bicm_diffusion.schedules.schedule import Schedule, check_steps

Betas = Literal["linear", "scaled_linear", "cosine"]
Spacing = Literal["leading", "linspace", "trailing"]

COSINE_OFFSET = 0.008
MAX_COSINE_BETA = 0.999
#: The tolerance of a product of float32 numbers against alpha bar.
ROUNDING = 1e-6


def _linear(count: int, start: float, end: float) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64)


def _scaled_linear(count: int, start: float, end: float) -> Tensor:
    return torch.linspace(math.sqrt(start), math.sqrt(end), count, dtype=torch.float64) ** 2


def _cosine(count: int, _: float, __: float) -> Tensor:
    shifted = (torch.arange(count + 1, dtype=torch.float64) / count + COSINE_OFFSET) / (1 + COSINE_OFFSET)
    levels = (shifted * (math.pi / 2)).cos() ** 2
    return (1 - levels[1:] / levels[:-1]).clamp(max=MAX_COSINE_BETA)


_BETAS: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "cosine": _cosine,
}


def _leading(steps: int, train_steps: int) -> Tensor:
    return torch.arange(steps) * (train_steps // steps)


def _linspace(steps: int, train_steps: int) -> Tensor:
    # By NumPy, as in diffusers: torch forms the upper half from its end, and ties of its numbers round otherwise.
    return _whole(np.linspace(0, train_steps - 1, steps))


def _trailing(steps: int, train_steps: int) -> Tensor:
    # NumPy's range may have one number more, where its width rounds down.
    return _whole(np.arange(train_steps, 0, -train_steps / steps)[:steps][::-1]) - 1


def _whole(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers.round().astype(np.int64))


_SPACINGS: dict[str, Callable[[int, int], Tensor]] = {
    "leading": _leading,
    "linspace": _linspace,
    "trailing": _trailing,
}


def ddpm_alpha_bar(
    betas: Betas = "linear", *, train_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Tensor:
    """Return alpha bar, the product of (1 - beta) up to each training step: (train_steps,), float64, falling.

    betas: "linear" between beta_start and beta_end; "scaled_linear", whose square roots are linear (Stable Diffusion,
    with 0.00085 and 0.012); "cosine", alpha bar(t) = cos²((t + 0.008)/1.008·π/2) with betas of at most 0.999, which
    ignores beta_start and beta_end. z = sqrt(alpha bar)·x + sqrt(1 - alpha bar)·n.
    Raises ValueError for an unknown name or a value out of range.

    >>> ddpm_alpha_bar("linear", train_steps=2, beta_start=0.1, beta_end=0.2)
    tensor([0.9000, 0.7200], dtype=torch.float64)
    """
    if betas not in _BETAS:
        raise ValueError(f"betas: expected one of {', '.join(_BETAS)}, got {betas!r}")
    if train_steps < 1:
        raise ValueError(f"train_steps: expected an integer of at least 1, got {train_steps}")
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise ValueError(f"beta_start, beta_end: expected 0 < start <= end < 1, got {beta_start} and {beta_end}")
    return (1 - _BETAS[betas](train_steps, beta_start, beta_end)).cumprod(0)


def ddpm_timesteps(
    steps: int, spacing: Spacing = "leading", *, train_steps: int = 1000, steps_offset: int = 0
) -> Tensor:
    """Return the training steps of a sampler: (steps,), int64, ascending, in [0, train_steps).

    spacing: "leading" counts multiples of train_steps // steps from 0 (plus steps_offset, 1 in Stable Diffusion);
    "linspace" is uniform from 0 to the last one; "trailing" counts back from the last one.
    Raises ValueError for an unknown name or a value out of range.

    >>> [ddpm_timesteps(4, s, train_steps=100).tolist() for s in ("leading", "linspace", "trailing")]
    [[0, 25, 50, 75], [0, 33, 66, 99], [24, 49, 74, 99]]
    """
    if spacing not in _SPACINGS:
        raise ValueError(f"spacing: expected one of {', '.join(_SPACINGS)}, got {spacing!r}")
    check_steps(steps, train_steps)
    if steps_offset and spacing != "leading":
        raise ValueError(f"steps_offset: only leading spacing has one, got {steps_offset} with {spacing!r}")
    visited = _SPACINGS[spacing](steps, train_steps) + steps_offset
    if steps_offset < 0 or int(visited[-1]) >= train_steps:
        raise ValueError(
            f"steps_offset: expected a value that keeps steps in [0, {train_steps}), got {steps_offset} "
            f"and a last step of {int(visited[-1])}"
        )
    return visited


def ddpm_schedule(
    steps: int,
    *,
    betas: Betas = "linear",
    spacing: Spacing = "leading",
    train_steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    steps_offset: int = 0,
    final_alpha_bar: float = 1.0,
) -> Schedule:
    """Return the schedule of a DDPM-trained network: times are its training steps, alpha = sqrt(alpha bar).

    Index 0 is below the lowest training step used: final_alpha_bar is alpha bar there, 1 for clean data. Where it
    is that of a training step, 0 as in diffusers' set_alpha_to_one=False, that step is its time; elsewhere its time is
    -1, and samplers do not call the network there. For spacing, betas and the rest see `ddpm_timesteps` and
    `ddpm_alpha_bar`; the tables are float64.
    Raises ValueError for a value out of range.

    >>> schedule = ddpm_schedule(4, betas="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    >>> schedule.times
    (-1.0, 1.0, 251.0, 501.0, 751.0)
    """
    visited = ddpm_timesteps(steps, spacing, train_steps=train_steps, steps_offset=steps_offset)
    table = ddpm_alpha_bar(betas, train_steps=train_steps, beta_start=beta_start, beta_end=beta_end)
    levels = [final_alpha_bar, *table[visited].tolist()]
    if not levels[1] < final_alpha_bar <= 1.0:
        raise ValueError(f"final_alpha_bar: expected a value in ({levels[1]}, 1], got {final_alpha_bar}")
    alpha = tuple(math.sqrt(x) for x in levels)
    sigma = tuple(math.sqrt(1 - x) for x in levels)
    final = _training_step(final_alpha_bar, table[: int(visited[0])])
    return Schedule((float(final), *map(float, visited.tolist())), alpha, sigma, asked=final >= 0)


def _training_step(alpha_bar: float, table: Tensor) -> int:
    """The training step with this alpha bar, up to float32's rounding; -1 where there is none."""
    found = ((table - alpha_bar).abs() < ROUNDING).nonzero().flatten().tolist()
    return found[0] if found else -1
