"""A sampling grid: the noise levels of a sampler, and the DDIM coefficients between adjacent ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.rational import nearest

#: The tolerance of alpha + sigma = 1 in a flow's levels.
FLOW_ROUNDING = 1e-6


@dataclass(frozen=True)
class Schedule:
    """A sampling grid i = 0 (data) … N (noisiest): alpha_i, sigma_i and the coefficients of BDIA eq. 6.

    times: the model's time argument at index i; alpha, sigma: z_i = alpha_i·x + sigma_i·n. Each holds N + 1
    floats, N ≥ 1. a[i] = alpha_{i-1}/alpha_i and b[i] = sigma_{i-1} - sigma_i·a[i] for i = 1 … N; no step
    starts at index 0, so a[0] and b[0] are NaN. table: times, alpha and sigma as one float64 tensor (3, N + 1),
    from which traced loops read, so that one graph serves every schedule of N steps. ratios: int64 (2, N + 1), for
    i = 1 … N - 1 the nearest fraction n/m, m ≤ 1024, of (h_i/h_{i+1})², h_i the width of interval i in sigma/alpha.
    asked: whether a model may be called at index 0 where sigma_0 > 0; False where times[0] is not a time of the model.
    clean: whether index 0 is clean data, sigma_0 = 0, where no model is called. lowest: the lowest index at which a
    model is called, 0 or 1. flow: whether alpha + sigma = 1 for all levels, where the noisiest level may have alpha_N =
    0. Sequences of numbers are converted to tuples of floats. Raises TypeError for anything else, and ValueError unless
    the lengths agree, alpha > 0 (except a flow's alpha_N), sigma ≥ 0 and sigma/alpha grows with i.

    >>> schedule = Schedule(times=(0.0, 1.0), alpha=(1.0, 0.6), sigma=(0.0, 0.8))
    >>> schedule.steps, round(schedule.a[1], 3), round(schedule.b[1], 3)
    (1, 1.667, -1.333)
    """

    times: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    asked: bool = True
    flow: bool = False
    a: tuple[float, ...] = field(init=False, repr=False, compare=False)
    b: tuple[float, ...] = field(init=False, repr=False, compare=False)
    table: Tensor = field(init=False, repr=False, compare=False)
    ratios: Tensor = field(init=False, repr=False, compare=False)
    clean: bool = field(init=False, repr=False, compare=False)
    lowest: int = field(init=False, repr=False, compare=False)
    #: Where alpha_N = 0: the same levels in the variables of dz/dt = v, alpha = 1 and sigma = t, which are all finite.
    straight: Schedule | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("times", "alpha", "sigma"):
            object.__setattr__(self, name, as_floats(name, getattr(self, name)))
        lengths = (len(self.times), len(self.alpha), len(self.sigma))
        if len(set(lengths)) != 1 or lengths[0] < 2:
            raise ValueError(f"times, alpha, sigma: expected one length of at least 2, got lengths {lengths}")
        _check_levels(self.alpha, self.sigma, self.flow)
        alpha, sigma = self.alpha, self.sigma
        a = (math.nan, *(_quotient(alpha[i - 1], alpha[i]) for i in range(1, len(alpha))))
        b = (math.nan, *(sigma[i - 1] - sigma[i] * a[i] for i in range(1, len(sigma))))
        object.__setattr__(self, "a", a)
        object.__setattr__(self, "b", b)
        object.__setattr__(self, "table", torch.tensor([self.times, alpha, sigma], dtype=torch.float64))
        object.__setattr__(self, "clean", sigma[0] == 0.0)
        object.__setattr__(self, "lowest", 0 if self.asked and sigma[0] > 0.0 else 1)
        pairs = [(1, 1), *(nearest((self.width(i) / self.width(i + 1)) ** 2) for i in range(1, self.steps)), (1, 1)]
        object.__setattr__(self, "ratios", torch.tensor(pairs).T)
        whole = (1.0,) * len(alpha)
        straight = None if alpha[-1] else Schedule(self.times, whole, sigma, self.asked)
        object.__setattr__(self, "straight", straight)

    @property
    def steps(self) -> int:
        """The number N of steps between data and noise."""
        return len(self.times) - 1

    def width(self, i: int) -> float:
        """The width h_i of interval i, sigma_i/alpha_i - sigma_{i-1}/alpha_{i-1}, i = 1 … N."""
        return _quotient(self.sigma[i], self.alpha[i]) - self.sigma[i - 1] / self.alpha[i - 1]


def to_ve(schedule: Schedule) -> Schedule:
    """Return the variance-exploding form of a schedule: alpha = 1, sigma = sigma_i/alpha_i, the times kept.

    A state is converted by z_ve = z/alpha_i; the two forms describe one trajectory. Raises TypeError unless it is a
    `Schedule`, ValueError for one with alpha_N = 0.

    >>> to_ve(Schedule(times=(0.0, 1.0), alpha=(1.0, 0.6), sigma=(0.0, 0.8))).sigma
    (0.0, 1.3333333333333335)
    """
    _check_signal(schedule)
    ratio = (s / a for a, s in zip(schedule.alpha, schedule.sigma, strict=True))
    return Schedule(schedule.times, (1.0,) * (schedule.steps + 1), tuple(ratio), schedule.asked)


def to_vp(schedule: Schedule) -> Schedule:
    """Return the variance-preserving form of a schedule: alpha² + sigma² = 1 at equal sigma/alpha, the times kept.

    A state is converted by z_vp = z/sqrt(alpha_i² + sigma_i²); the two forms describe one trajectory.
    Raises TypeError unless it is a `Schedule`, ValueError for one with alpha_N = 0.

    >>> to_vp(Schedule(times=(0.0, 1.0), alpha=(1.0, 1.0), sigma=(0.0, 0.75))).alpha
    (1.0, 0.8)
    """
    _check_signal(schedule)
    norms = [math.hypot(a, s) for a, s in zip(schedule.alpha, schedule.sigma, strict=True)]
    alpha = tuple(a / norm for a, norm in zip(schedule.alpha, norms, strict=True))
    sigma = tuple(s / norm for s, norm in zip(schedule.sigma, norms, strict=True))
    return Schedule(schedule.times, alpha, sigma, schedule.asked)


def check_steps(steps: Any, most: int | None = None, *, name: str = "steps") -> None:
    """Raise unless a number of steps (or of what has this name) is an integer in [1, most]; None is no bound."""
    if not isinstance(steps, int | Integral):
        raise TypeError(f"{name}: expected an integer, got {described(steps)}")
    if int(steps) < 1 or (most is not None and int(steps) > most):
        limit = "of at least 1" if most is None else f"in [1, {most}]"
        raise ValueError(f"{name}: expected an integer {limit}, got {steps}")


def _check_signal(schedule: object) -> None:
    """Raise unless it is a schedule all of whose levels have a signal."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule: expected a Schedule, got {described(schedule)}")
    if not schedule.alpha[-1]:
        raise ValueError(f"schedule: expected alpha > 0, got alpha = 0 at index {schedule.steps}")


def as_floats(name: str, numbers: object, expected: str = "N + 1 numbers") -> tuple[float, ...]:
    """Return a sequence of numbers, a tensor too, as a tuple of floats; raise TypeError for anything else."""
    if isinstance(numbers, Tensor):
        numbers = numbers.tolist()
    try:
        return tuple(map(float, numbers))  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected {expected}, got {described(numbers)}") from None


def _quotient(x: float, alpha: float) -> float:
    return x / alpha if alpha else math.inf


def _check_levels(alpha: tuple[float, ...], sigma: tuple[float, ...], flow: bool) -> None:
    for i, (a, s) in enumerate(zip(alpha, sigma, strict=True)):
        if flow and not abs(a + s - 1.0) <= FLOW_ROUNDING:
            raise ValueError(f"alpha, sigma: expected alpha + sigma = 1 of a flow, got {a} and {s} at index {i}")
    for i, value in enumerate(alpha):
        if not math.isfinite(value) or value < 0 or (value == 0 and not (flow and i == len(alpha) - 1)):
            hint = "; let the times end before alpha is 0" if value == 0 else ""
            raise ValueError(f"alpha: expected finite values above 0, got {value} at index {i}{hint}")
    for i, value in enumerate(sigma):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"sigma: expected finite values of at least 0, got {value} at index {i}")
    ratio = [_quotient(s, r) for s, r in zip(sigma, alpha, strict=True)]
    for i, (low, high) in enumerate(pairwise(ratio)):
        if high <= low:
            hint = "; index 0 is data" if ratio[0] > ratio[-1] else ""
            raise ValueError(
                f"sigma: sigma/alpha must grow with the index, got {low} at index {i} and {high} at {i + 1}{hint}"
            )
