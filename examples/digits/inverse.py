"""Inverse problems on digits, every solver's results, and their errors."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bicm_diffusion import ConsistencySchedule, karras_schedule, vp_time
from bicm_diffusion.inverse import (
    Downsample,
    Mask,
    cm_inversion_sample,
    cm_posterior_sample,
    dps_sample,
    freedom_sample,
    lgd_sample,
    mpgd_sample,
)
from bicm_kernels import fold_in, normal
from examples.digits import classifiers
from examples.digits.consistency_measurements import frechet_distance, squared_error
from examples.digits.consistency_network import ConsistencyNetwork
from examples.digits.data import CLASSES, SIDE, Digits, load_split
from examples.digits.network import NO_LABEL, Denoiser
from examples.digits.recognition import features, probabilities

T_MIN, T_MAX = 0.002, 20.0
STARTS = 104
#: Where the consistency model is inverted.
LEVELS = (T_MAX, 4.0, 1.5, 0.6, 0.25)


@dataclass(frozen=True)
class Size:
    """The size of a run: images, sampling steps, gradient steps per level of CM inversion."""

    images: int = 297
    steps: int = 50
    iterations: int = 10


QUICK = Size(images=10, steps=5, iterations=2)


class Models(NamedTuple):
    """The networks: a noise predictor of a VP process and a consistency model, both without labels."""

    denoiser: Denoiser
    consistency: ConsistencyNetwork

    def noise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the noise in x = x0 + sigma·n: the VP network's input is x/√(1 + sigma²)."""
        z = x / (1.0 + sigma * sigma).sqrt()[:, None, None, None]
        return self.denoiser(z, vp_time(sigma), _unlabelled(x))

    def jump(self, scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Return F of the consistency model."""
        return self.consistency(scaled, t, u, labels=_unlabelled(scaled))


def _unlabelled(x: Tensor) -> Tensor:
    return torch.full(x.shape[:1], NO_LABEL)


@dataclass(frozen=True)
class Problem:
    """An operator and its measurement; `size` is about the inverse of the largest eigenvalue of A·Aᵀ."""

    name: str
    operator: Callable[[Tensor], Tensor]
    y: Tensor
    truth: Tensor | None
    size: float
    distance: str = "half_squared"

    @property
    def linear(self) -> bool:
        """Whether the measurement comes from an image."""
        return self.truth is not None


def problems(digits: Digits) -> list[Problem]:
    """Return down-sampling by 2, inpainting of the lower half, and a classifier's target class."""
    halved, seen = Downsample(2), Mask((torch.arange(SIDE) < SIDE // 2)[:, None].expand(SIDE, SIDE))
    images = digits.images
    return [
        Problem("down-sampling ×2", halved, halved(images), images, 4.0),
        Problem("inpainting", seen, seen(images), images, 1.0),
        Problem("a class", classifiers.guide(), torch.arange(len(images)) % CLASSES, None, 1.0, "cross_entropy"),
    ]


Solve = Callable[[Models, Problem, Size, int], Tensor]


@dataclass(frozen=True)
class Solver:
    """A solver with its options; base: its networks."""

    name: str
    base: str
    solve: Solve


def started(problem: Problem, seed: int) -> Tensor:
    """Return the noise that every solver starts from."""
    return T_MAX * normal((len(problem.y), 1, SIDE, SIDE), seed=fold_in(seed, STARTS))


def growing(problem: Problem) -> Callable[[float, float], float]:
    """Return ζ of a gradient through a network, which shrinks like 1/σ²: a larger step where σ is large."""
    return lambda s, below: problem.size * (1.0 - (below / s) ** 2) * (1.0 + s * s / 0.36)


def walking(function: Callable[..., Tensor], constant: bool = False, **options: Any) -> Solve:
    """Return a solver on a schedule."""

    def solve(models: Models, problem: Problem, size: Size, seed: int) -> Tensor:
        more = {"consistency_model": models.jump} if function is cm_posterior_sample else {}
        given = {"operator": problem.operator, "y": problem.y, "distance": problem.distance, "seed": seed}
        schedule = karras_schedule(size.steps, t_min=T_MIN, t_max=T_MAX)
        scale = problem.size if constant else growing(problem)
        return function(models.noise, started(problem, seed), schedule, scale=scale, **given, **more, **options)

    return solve


def inverting(tau: float) -> Solve:
    """Return CM inversion with noise τ."""

    def solve(models: Models, problem: Problem, size: Size, seed: int) -> Tensor:
        given: dict[str, Any] = {"operator": problem.operator, "y": problem.y, "seed": seed, "tau": tau}
        given |= {"distance": problem.distance, "iterations": size.iterations}
        levels = ConsistencySchedule(LEVELS)
        return cm_inversion_sample(
            models.jump, started(problem, seed), levels, rate=lambda t: problem.size * (t * t + 0.25), **given
        )

    return solve


#: LGD and FreeDoM as in their papers; repeated steps in the middle of the schedule.
SOLVERS = (
    Solver("DPS", "denoiser", walking(dps_sample)),
    Solver("LGD", "denoiser", walking(lgd_sample)),
    Solver("FreeDoM", "denoiser", walking(freedom_sample, repeats=2, repeat_range=(0.2, 5.0))),
    Solver("MPGD", "denoiser", walking(mpgd_sample, constant=True)),
    Solver("CM posterior", "denoiser and CM", walking(cm_posterior_sample)),
    Solver("CM inversion", "CM", inverting(0.0)),
)
#: CM-DIS, Table 2: where the distance is measured. At the posterior mean, at a sample, at a sample with noise.
ABLATIONS = (
    Solver("posterior mean", "denoiser", walking(dps_sample)),
    *(
        Solver(f"CM posterior, τ = {tau}", "denoiser and CM", walking(cm_posterior_sample, tau=tau))
        for tau in (0.0, 0.1, 0.3)
    ),
    *(Solver(f"CM inversion, τ = {tau}", "CM", inverting(tau)) for tau in (0.0, 0.1, 0.3)),
)


@dataclass(frozen=True)
class Outcome:
    """One solver's results on one problem; figures that do not apply are NaN.

    residual: root mean square of A(x0) - y. error: mean squared difference from the measured image, as if the
    range were [0, 1]. seen, judged, recognised: fractions assigned to the wanted class by the guiding classifier, by
    one that no solver used, and by a support vector machine. frechet: distance of features from those of the training
    images. seconds; memory: the peak in MiB above that before the run.
    """

    images: Tensor
    residual: float
    error: float
    seen: float
    judged: float
    recognised: float
    frechet: float
    seconds: float
    memory: float


def outcome(solver: Solver, models: Models, problem: Problem, size: Size, seed: int) -> Outcome:
    """Return a solver's result on a problem from one seed's noise."""
    start = time.perf_counter()
    images, memory = with_peak(lambda: solver.solve(models, problem, size, seed))
    seconds = time.perf_counter() - start
    residual = error = seen = judged = recognised = math.nan
    if problem.truth is not None:
        residual = (problem.operator(images) - problem.y).double().square().mean().sqrt().item()
        error = squared_error(images, problem.truth)
    else:
        wanted = problem.y
        seen, judged = (classifiers.share(c, images, wanted) for c in (classifiers.guide(), classifiers.judge()))
        recognised = float((probabilities(images).argmax(axis=1) == wanted.numpy()).mean())
    frechet = frechet_distance(features(images), features(load_split().train.images))
    return Outcome(images, residual, error, seen, judged, recognised, frechet, seconds, memory)


def with_peak(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return a result and the peak memory in MiB above that before, on Linux; NaN elsewhere."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
        before = _kilobytes(status, "VmRSS")
    except (OSError, AttributeError):
        return function(), math.nan
    result = function()
    return result, (_kilobytes(status, "VmHWM") - before) / 1024


def _kilobytes(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))
