"""Measurements of the consistency model: its samples and real digits, reconstructions, and times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bicm_diffusion.consistency.schedules import ConsistencySchedule
from bicm_diffusion.interpolation import slerp
from bicm_diffusion.samplers.consistency import consistency_invert, consistency_sample
from bicm_kernels import fold_in, normal
from examples.digits import eager
from examples.digits.consistency_network import ConsistencyNetwork
from examples.digits.data import CLASSES, SIDE, Digits, load_split
from examples.digits.measurements import medians
from examples.digits.network import NO_LABEL
from examples.digits.recognition import features, probabilities

T_MAX = 20.0
CONFIDENT = 0.9
# Sets of as many samples as there are held-out digits, because the Fréchet distance depends on the sample size.
SETS = 5
STARTS = 103
# Chosen on the training images, as in the papers.
SAMPLING = {
    "1 evaluation": ConsistencySchedule((T_MAX,)),
    "2 evaluations, ancestral": ConsistencySchedule((T_MAX, 0.8)),
    "3 evaluations, zigzag": ConsistencySchedule((T_MAX,), ((0.7, 1.2),)),
    "4 evaluations, combined": ConsistencySchedule((T_MAX, 0.8), ((0.4, 1.2),)),
}
INVERSION = {
    "1 evaluation": ConsistencySchedule((T_MAX, 0.05)),
    "2 evaluations": ConsistencySchedule((T_MAX, 0.3, 0.01)),
    "3 evaluations": ConsistencySchedule((T_MAX, 1.5, 0.2, 0.01)),
    "4 evaluations": ConsistencySchedule((T_MAX, 4.0, 1.2, 0.3, 0.01)),
}
# From noise to data: the paper's single leap, and two of them.
ONE_LEAP, TWO_LEAPS = (SAMPLING[name] for name in ("1 evaluation", "2 evaluations, ancestral"))
INTERPOLATION = INVERSION["3 evaluations"]


class Implementation(NamedTuple):
    """The samplers used: the fused ones or the eager ones."""

    sample: Callable[..., Tensor]
    invert: Callable[..., Tensor]
    slerp: Callable[..., Tensor]


FUSED = Implementation(consistency_sample, consistency_invert, slerp)
EAGER = Implementation(eager.sample, eager.invert, eager.slerp)


@dataclass(frozen=True)
class SampleFigures:
    """Figures of images: confident fraction, classes, Fréchet distances of pixels and of a classifier's features.

    confident: fraction classified with confidence >= 0.9, as the wanted class if there is one.
    classes: the number of classes with at least one confidently classified image.
    """

    confident: float
    classes: int
    pixels: float
    features: float


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return |μ₁ - μ₂|² + tr(C₁ + C₂ - 2(C₁C₂)^½) of two sets of features, (N, …) and (M, …), in float64.

    >>> round(frechet_distance(torch.eye(3), torch.eye(3) + 1.0), 6)
    3.0
    """
    a, b = (x.double().flatten(1).numpy() for x in (first, second))
    mean = a.mean(0) - b.mean(0)
    left, right = np.cov(a.T), np.cov(b.T)
    # The product of two covariances has real eigenvalues, at least 0 up to rounding.
    roots = np.sqrt(np.linalg.eigvals(left @ right).real.clip(0.0))
    return float(mean @ mean + np.trace(left) + np.trace(right) - 2.0 * roots.sum())


def judge(images: Tensor, labels: Tensor) -> SampleFigures:
    """Return the figures of images (B, 1, 8, 8) in sets of as many as there are held-out digits.

    labels: (B,), the wanted classes, or `NO_LABEL` for any. Distances are to the training images, means over the sets.
    """
    train, count = load_split().train.images, len(load_split().held_out.images)
    images = images.clamp(-1, 1)
    odds = probabilities(images)
    found = odds.argmax(axis=1)
    sure = odds.max(axis=1) >= CONFIDENT
    wanted = (labels.numpy() == NO_LABEL) | (labels.numpy() == found)
    sets = images[: len(images) // count * count].split(count)
    return SampleFigures(
        float((sure & wanted).mean()),
        len(np.unique(found[sure])),
        float(np.mean([frechet_distance(part, train) for part in sets])),
        float(np.mean([frechet_distance(features(part), features(train)) for part in sets])),
    )


def draw(
    network: ConsistencyNetwork,
    labels: Tensor,
    schedule: ConsistencySchedule,
    *,
    seed: int,
    by: Implementation = FUSED,
) -> Tensor:
    """Return one digit per label (B,), `NO_LABEL` for any: (B, 1, 8, 8)."""
    noise = schedule.levels[0] * normal((len(labels), 1, SIDE, SIDE), seed=fold_in(seed, STARTS))
    return by.sample(network, noise, schedule, seed=seed, extra_args={"labels": labels})


def sample_labels(*, labelled: bool) -> Tensor:
    """Return the labels of `SETS` sets of samples, classes in turn or `NO_LABEL`."""
    count = SETS * len(load_split().held_out.labels)
    return torch.arange(count) % CLASSES if labelled else torch.full((count,), NO_LABEL)


def to_noise(
    network: ConsistencyNetwork,
    digits: Digits,
    schedule: ConsistencySchedule,
    *,
    seed: int,
    by: Implementation = FUSED,
) -> Tensor:
    """Return the noise of real digits at the schedule's highest level."""
    return by.invert(network, digits.images, schedule, seed=seed, extra_args={"labels": digits.labels})


def reconstruct(
    network: ConsistencyNetwork,
    digits: Digits,
    schedule: ConsistencySchedule,
    *,
    seed: int,
    back: ConsistencySchedule = TWO_LEAPS,
    by: Implementation = FUSED,
) -> Tensor:
    """Return real digits inverted to noise by the schedule, and reconstructed by `back`."""
    noise = to_noise(network, digits, schedule, seed=seed, by=by)
    return by.sample(network, noise, back, extra_args={"labels": digits.labels})


def squared_error(images: Tensor, real: Tensor) -> float:
    """Return the mean squared error of images, clipped and rescaled to [0, 1]."""
    return (images.clamp(-1, 1) - real).div(2).double().square().mean().item()


def without_labels(digits: Digits) -> Digits:
    """Return the digits with `NO_LABEL` for every label."""
    return Digits(digits.images, torch.full_like(digits.labels, NO_LABEL))


def time_sampling(
    network: ConsistencyNetwork, schedule: ConsistencySchedule, count: int, *, repeats: int
) -> tuple[float, float]:
    """Return seconds per image, fused and eager: medians of `repeats` batches of `count`, including the network."""
    labels = torch.full((count,), NO_LABEL)
    fused, plain = medians(
        (lambda: draw(network, labels, schedule, seed=0), lambda: draw(network, labels, schedule, seed=0, by=EAGER)),
        repeats,
    )
    return fused / count, plain / count


def evaluate(network: ConsistencyNetwork) -> dict[str, float]:
    """Return figures of a run's progress: of samples without labels, and of reconstructed held-out digits."""
    labels = sample_labels(labelled=False)
    held_out = without_labels(load_split().held_out)
    figures: dict[str, float] = {}
    for name in ("1 evaluation", "3 evaluations, zigzag"):
        found = judge(draw(network, labels, SAMPLING[name], seed=0), labels)
        figures |= {f"recognised, {name}": found.confident, f"Fréchet, {name}": found.pixels}
    for name in ("1 evaluation", "2 evaluations"):
        images = reconstruct(network, held_out, INVERSION[name], seed=0)
        figures[f"error, {name}"] = squared_error(images, held_out.images)
    return figures
