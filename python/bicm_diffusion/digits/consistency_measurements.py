"""What is measured of the consistency model: its samples beside real digits, and reconstructions of real digits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bicm_diffusion.consistency.schedules import ConsistencySchedule
from bicm_diffusion.digits.consistency_network import ConsistencyNetwork
from bicm_diffusion.digits.data import Digits, load_split
from bicm_diffusion.digits.network import NO_LABEL
from bicm_diffusion.digits.recognition import probabilities
from bicm_diffusion.samplers.consistency import consistency_invert, consistency_sample
from bicm_kernels import normal

T_MAX = 20.0
CONFIDENT = 0.9
# Chosen on the training images, as the papers chose theirs.
SAMPLING = {
    "1 step": ConsistencySchedule((T_MAX,)),
    "2 steps, ancestral": ConsistencySchedule((T_MAX, 1.2)),
    "3 steps, zigzag": ConsistencySchedule((T_MAX,), ((0.2, 0.8),)),
    "4 steps, combined": ConsistencySchedule((T_MAX, 1.2), ((0.2, 0.8),)),
}
INVERSION = {
    "1 step": ConsistencySchedule((T_MAX, 0.07)),
    "2 steps": ConsistencySchedule((T_MAX, 1.5, 0.07)),
    "3 steps": ConsistencySchedule((T_MAX, 4.0, 1.0, 0.07)),
    "4 steps": ConsistencySchedule((T_MAX, 8.0, 3.0, 1.0, 0.07)),
}


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return |μ₁ - μ₂|² + tr(C₁ + C₂ - 2(C₁C₂)^½) of two sets of features, (N, k) and (M, k), in float64.

    >>> frechet_distance(torch.eye(3), torch.eye(3) + 1.0) - 3.0 < 1e-6
    True
    """
    a, b = (x.double().flatten(1).numpy() for x in (first, second))
    mean = a.mean(0) - b.mean(0)
    left, right = np.cov(a.T), np.cov(b.T)
    # The product of two covariances has real eigenvalues, at least 0 up to rounding.
    roots = np.sqrt(np.linalg.eigvals(left @ right).real.clip(0.0))
    return float(mean @ mean + np.trace(left) + np.trace(right) - 2.0 * roots.sum())


def draw(network: ConsistencyNetwork, labels: Tensor, schedule: ConsistencySchedule, *, seed: int) -> Tensor:
    """Return one digit per label (B,), `NO_LABEL` for any: (B, 1, 8, 8)."""
    noise = schedule.levels[0] * normal((len(labels), 1, 8, 8), seed=seed)
    return consistency_sample(network, noise, schedule, seed=seed, extra_args={"labels": labels})


def reconstruct(
    network: ConsistencyNetwork, digits: Digits, schedule: ConsistencySchedule, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the noise behind real digits, divided by its level, and the digits that one leap makes of it."""
    extra_args = {"labels": digits.labels}
    noise = consistency_invert(network, digits.images, schedule, seed=seed, extra_args=extra_args)
    back = consistency_sample(network, noise, ConsistencySchedule(schedule.levels[:1]), extra_args=extra_args)
    return noise / schedule.levels[0], back


def squared_error(images: Tensor, real: Tensor) -> float:
    """Return the mean squared error of images clipped to their range, as if that were [0, 1]."""
    return (images.clamp(-1, 1) - real).div(2).double().square().mean().item()


@torch.no_grad()
def evaluate(network: ConsistencyNetwork, *, count: int = 500) -> dict[str, float]:
    """Return a few figures that tell how a run goes; samples without labels, and held-out digits."""
    split = load_split()
    labels = torch.full((count,), NO_LABEL)
    figures = {}
    for name in ("1 step", "3 steps, zigzag"):
        images = draw(network, labels, SAMPLING[name], seed=0)
        figures[f"recognised, {name}"] = float((probabilities(images).max(axis=1) >= CONFIDENT).mean())
        figures[f"Fréchet, {name}"] = frechet_distance(images.clamp(-1, 1), split.train.images)
    held_out = Digits(split.held_out.images, labels[: len(split.held_out.labels)])
    for name in ("1 step", "2 steps", "4 steps"):
        _, images = reconstruct(network, held_out, INVERSION[name], seed=0)
        figures[f"error, {name}"] = squared_error(images, held_out.images)
    return figures
