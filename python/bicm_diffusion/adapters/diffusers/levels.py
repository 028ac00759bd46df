"""Noise levels of the exponential solvers: alpha and sigma, their ratio, and predictions from a model's output."""

from __future__ import annotations

import math

import torch

Level = tuple[float, float]  # alpha and sigma of a level

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")

#: Below this alpha, predicting x0 from the noise loses more than a bit.
LEAST_SIGNAL = 0.5
#: Below this one, the weights that compensate it leave float32's range: the original runs.
NO_SIGNAL = 1e-15


def level_of(sigma: float, flow: bool) -> Level:
    """Alpha and sigma of a variance-preserving state or of flow matching, from the scheduler's sigma."""
    if flow:
        return 1.0 - sigma, sigma
    alpha = 1.0 / math.sqrt(sigma * sigma + 1.0)
    return alpha, sigma * alpha


def log_ratio(level: Level) -> float:
    """Half the logarithm of the signal-to-noise ratio, infinite without noise."""
    alpha, sigma = level
    if sigma == 0.0:
        return math.inf
    return math.log(alpha) - math.log(sigma) if alpha else -math.inf


def step_of_no_length(to: Level, here: Level) -> bool:
    """Whether two levels are equal in float32, where the originals divide zero by zero."""
    levels = torch.tensor([to, here], dtype=torch.float32).log()
    there, now = (levels[:, 0] - levels[:, 1]).tolist()
    return bool(there == now)


def reading_x0(prediction: str, sigma: float, level: Level) -> tuple[float, float]:
    """Weights of sample and output in x0."""
    alpha, noise = level
    if prediction == "epsilon":
        return 1.0 / alpha, -noise / alpha
    if prediction == "sample":
        return 0.0, 1.0
    return (alpha, -noise) if prediction == "v_prediction" else (1.0, -sigma)


def reading_noise(prediction: str, level: Level) -> tuple[float, float]:
    """Weights of sample and output in the predicted noise, where a solver asks for the noise itself."""
    alpha, noise = level
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "v_prediction":
        return noise, alpha  # of flow sigmas too, whose squares do not add up to 1
    return 1.0 / noise, -alpha / noise


def noise_of_x0(prediction: str, sigma: float, level: Level) -> tuple[float, float]:
    """The same, where a solver reads x0 and derives the noise from it."""
    if prediction == "epsilon":
        return 0.0, 1.0
    of_sample, of_output = reading_x0(prediction, sigma, level)
    alpha, noise = level
    if prediction == "flow_prediction":
        noise = sigma  # as the original divides, for all levels
    return (1.0 - alpha * of_sample) / noise, -alpha * of_output / noise


def near_x0(prediction: str, level: Level, flow: bool) -> float:
    """The sum of the weights of sample and output in x0, without its loss, where epsilon makes them nearly cancel.

    Then x0 = near (m + g (s - m)) with g = 1/(alpha near), in terms no larger than x0 itself.
    """
    if prediction != "epsilon":
        return 0.0
    alpha, noise = level
    if alpha < NO_SIGNAL:
        return math.nan
    return 1.0 if flow else alpha / (1.0 + noise)
