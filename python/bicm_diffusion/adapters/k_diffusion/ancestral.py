"""The two levels of an ancestral step: its deterministic target, and the level of the noise added to it."""

from __future__ import annotations

import math

from torch import Tensor


def ancestral_ratios(level: float, below: float, eta: float) -> tuple[float, float]:
    """Return σ_down/σ and σ_up of a step from one level to another.

    >>> ancestral_ratios(2.0, 1.0, 0.0), ancestral_ratios(2.0, 1.0, 1.0)[0]
    ((0.5, 0.0), 0.25)
    """
    if below > level:
        raise ValueError(f"sigmas: expected levels that do not rise, got {level} and then {below}")
    if below == level:
        return 1.0, 0.0
    ratio = below / level
    up = min(1.0, eta * math.sqrt(1.0 - ratio * ratio))
    # (σ_down/σ')² = 1 - η²·(1 - ρ) without its difference, which at η = 1 is ρ.
    kept = 0.0 if up == 1.0 else (1.0 - eta) * (1.0 + eta) + eta * eta * ratio * ratio
    return ratio * math.sqrt(kept), below * up


def with_noise(
    tensors: list[Tensor], weights: list[float], noise: Tensor, s_noise: float | Tensor, deviation: float
) -> None:
    """Add noise of a standard deviation to an update's terms; it is drawn even if unused, to advance generators."""
    if isinstance(s_noise, Tensor):
        noise = noise * s_noise
    else:
        deviation *= s_noise
    if deviation != 0.0:
        tensors.append(noise)
        weights.append(deviation)
