"""The expected error of floating-point round trips: roundings, propagated through a method's steps in a linear model.

The model predicts the noise of unit Gaussian data, eps = sigma/(alpha² + sigma²)·z, so that a step is a matrix for two
states. The error is larger for a network that is less smooth than such a denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeAlias

import torch

from bicm_diffusion.samplers.loop import traced, transfer
from bicm_diffusion.samplers.notices import InexactInversionWarning, warn
from bicm_diffusion.samplers.prediction import Level, Number
from bicm_diffusion.schedules import Schedule

#: The float path warns above this expected error, in units of the states' size; the largest error
#: of an image's many elements is some three times as large.
VISIBLE = 3e-4

Matrix: TypeAlias = tuple[float, float, float, float]
Vector: TypeAlias = tuple[float, float]


def warn_of_bdia(schedule: Schedule, gamma: Number, dtype: torch.dtype, *, alone: bool) -> None:
    """Warn where BDIA's inversion is expected to lose visible detail; alone: it starts from an image, not a pair."""
    if isinstance(gamma, float):
        _warn("BDIA", _bdia, schedule, gamma, dtype, alone)


def warn_of_obelm(schedule: Schedule, dtype: torch.dtype, *, alone: bool) -> None:
    """Warn where O-BELM's inversion is expected to lose visible detail."""
    _warn("O-BELM", _obelm, schedule, 1.0, dtype, alone)


def warn_of_edict(schedule: Schedule, p: Number, dtype: torch.dtype, *, alone: bool) -> None:
    """Warn where EDICT's inversion is expected to lose visible detail."""
    if isinstance(p, float):
        _warn("EDICT", _edict, schedule, p, dtype, alone)


Maps: TypeAlias = Callable[[Schedule, float], tuple[Vector, Sequence[Matrix]]]


def _warn(method: str, maps: Maps, schedule: Schedule, factor: float, dtype: torch.dtype, alone: bool) -> None:
    if traced():
        return
    loss = expected_loss(maps, schedule, factor, alone) * torch.finfo(dtype).eps
    if loss <= VISIBLE:
        return
    trip = "an image's round trip to noise" if alone else "a retrace to the noise"
    warn(
        f"{method} in {dtype} over {schedule.steps} steps with exact=False: {trip} loses at most about {loss:.0e} "
        "of the states' size with a smooth network, more with another; exact=True loses nothing",
        InexactInversionWarning,
    )


@lru_cache(64)
def expected_loss(maps: Maps, schedule: Schedule, factor: float, alone: bool) -> float:
    """Return the error of a round trip, in units of the states' size and the dtype's eps; may be infinite.

    alone: from an image to noise and back; otherwise from noise to data and back, whose second half is the inversion.
    """
    state, steps = maps(schedule, factor)
    # A rounding error is relative to the rounded number: a state's usual size, plus the deviation that the first,
    # inexact step of an inversion causes in it, which grows during the inversion.
    usual = [math.hypot(a, s) for a, s in zip(schedule.alpha, schedule.sigma, strict=True)]
    usual, sizes = usual[len(usual) - len(steps) - 1 :], []
    for k, (p, q, r, s) in enumerate((*steps, (1.0, 0.0, 0.0, 1.0))):
        sizes.append(max(usual[k], abs(state[0]), abs(state[1])) if alone else usual[k])
        state = (p * state[0] + q * state[1], r * state[0] + s * state[1])
    if alone:
        steps, sizes = [_inverse(m) for m in reversed(steps)], sizes[::-1]
    aa = bb = sizes[0] * sizes[0]
    ab = 0.0
    for (p, q, r, s), size in zip(steps, sizes[1:], strict=True):
        aa, ab, bb = (
            p * p * aa + 2 * p * q * ab + q * q * bb + size * size,
            p * r * aa + (p * s + q * r) * ab + q * s * bb,
            r * r * aa + 2 * r * s * ab + s * s * bb + size * size,
        )
    loss = math.sqrt(max(aa if alone else max(aa, bb), 0.0)) / usual[0 if alone else -1]
    return loss if math.isfinite(loss) else math.inf


def _inverse(m: Matrix) -> Matrix:
    det = m[0] * m[3] - m[1] * m[2]
    return m[3] / det, -m[1] / det, -m[2] / det, m[0] / det


def _level(schedule: Schedule, i: int) -> Level:
    return Level(schedule.times[i], schedule.alpha[i], schedule.sigma[i])


def _noise(level: Level) -> float:
    """The weight of a state in the noise predicted there."""
    alpha, sigma = float(level.alpha), float(level.sigma)
    return sigma / (alpha * alpha + sigma * sigma)


def _moved(schedule: Schedule, i: int, j: int) -> float:
    """The factor of a state in DDIM's step from index i to index j."""
    here, there = _level(schedule, i), _level(schedule, j)
    a, b = transfer(here, there)
    return float(a + b * _noise(here))


def _second(schedule: Schedule) -> float:
    """z_1 from z_0 = 1 by DDIM inversion."""
    a, b = transfer(_level(schedule, 0), _level(schedule, 1))
    return float(a + b * _noise(_level(schedule, 1)))


def _bdia(schedule: Schedule, gamma: float) -> tuple[Vector, Sequence[Matrix]]:
    """(z_{i-1}, z_i) to (z_i, z_{i+1}) by BDIA eq. 28."""
    inner = range(1, schedule.steps)
    moves = [_moved(schedule, i, i + 1) - _moved(schedule, i, i - 1) / gamma for i in inner]
    return (1.0, _second(schedule)), [(0.0, 1.0, 1.0 / gamma, move) for move in moves]


def _obelm(schedule: Schedule, _: float) -> tuple[Vector, Sequence[Matrix]]:
    """The same by O-BELM's inverse."""
    maps = []
    for i in range(1, schedule.steps):
        h, h_next = schedule.width(i), schedule.width(i + 1)
        ratio = (h / h_next) ** 2
        below, here, above = schedule.alpha[i - 1 : i + 2]
        current = (1.0 - ratio) / here - (h + ratio * h_next) * _noise(_level(schedule, i))
        maps.append((0.0, 1.0, above / (ratio * below), -current * above / ratio))
    return (1.0, _second(schedule)), maps


def _edict(schedule: Schedule, p: float) -> tuple[Vector, Sequence[Matrix]]:
    """(z_{i-1}, y_{i-1}) to (z_i, y_i) by EDICT's inverse."""
    maps = []
    for i in range(1, schedule.steps + 1):
        here = _level(schedule, i)
        a, b = map(float, transfer(here, _level(schedule, i - 1)))
        columns = []
        for z, y in ((1.0, 0.0), (0.0, 1.0)):
            y_inter = (y - (1.0 - p) * z) / p
            z_inter = (z - (1.0 - p) * y_inter) / p
            y_up = (y_inter - b * _noise(here) * z_inter) / a
            columns.append(((z_inter - b * _noise(here) * y_up) / a, y_up))
        (zz, yz), (zy, yy) = columns
        maps.append((zz, zy, yz, yy))
    return (1.0, 1.0), maps
