"""BDIA-DDIM both ways: two states make the trajectory retraceable, sample to noise and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from bicm_diffusion.samplers.ddim import ddim_inverse_step
from bicm_diffusion.samplers.loop import Callback, Model, indices, predict, report
from bicm_diffusion.schedules import Schedule
from bicm_kernels import bdia_inverse_step, bdia_step, ddim_step


class StatePair(NamedTuple):
    """Two neighbouring states of a BDIA trajectory: where it stands, and where it stood one index earlier.

    BDIA carries two states, so a trajectory can be retraced exactly only from both.
    """

    z: Tensor
    previous: Tensor


@torch.no_grad()
def bdia_sample(
    model: Model,
    z: Tensor | StatePair,
    schedule: Schedule,
    *,
    gamma: float | Tensor = 1.0,
    guidance_scale: float | Tensor | None = None,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> StatePair:
    """Return (z_0, z_1) by BDIA-DDIM (BDIA eq. 24), from z_N or the pair (z_N, z_{N-1}) of `bdia_invert`.

    z: (B, …), any floating dtype; from z_N alone the first step is DDIM. gamma: a float or (B,), in [0, 1];
    0 is DDIM. Takes N evaluations of the model, N - 1 from a pair.
    `bdia_invert` of the returned pair retraces the trajectory to z_N, up to rounding.
    Raises ValueError where the states of a pair differ in shape or dtype.

    >>> from bicm_diffusion import vp_schedule
    >>> bdia_sample(lambda z, times: z, torch.ones(1, 2), vp_schedule(4)).z.shape
    torch.Size([1, 2])
    """
    top = schedule.steps
    if isinstance(z, StatePair):
        last, current, start = z.z, z.previous, top - 1
        _check_pair(last, current)
    else:
        last, current, start = z, z, top
    for i in indices(range(start, 0, -1), progress):
        eps = predict(model, current, schedule, i, extra_args)
        if i == top:
            following = ddim_step(current, eps, a=schedule.a[i], b=schedule.b[i], guidance_scale=guidance_scale)
        else:
            following = bdia_step(
                last,
                current,
                eps,
                **_bdia_coefficients(schedule, i),
                gamma=gamma,
                guidance_scale=guidance_scale,
            )
        last, current = current, following
        report(callback, i - 1, current, eps)
    return StatePair(current, last)


@torch.no_grad()
def bdia_invert(
    model: Model,
    z: Tensor | StatePair,
    schedule: Schedule,
    *,
    gamma: float | Tensor = 1.0,
    guidance_scale: float | Tensor | None = None,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> StatePair:
    """Return (z_N, z_{N-1}) by BDIA-DDIM inversion (BDIA eq. 28), from z_0 or `bdia_sample`'s (z_0, z_1).

    z: (B, …), any floating dtype; a real image z_0 alone gets its z_1 by DDIM inversion with eps(z_0, 1).
    gamma: a float or (B,), in (0, 1]; rounding errors grow like gamma^-N. Takes N evaluations of the model,
    N - 1 from a pair. `bdia_sample` of the returned pair retraces the trajectory to z_0, up to rounding.
    Raises ValueError where the states of a pair differ in shape or dtype.

    >>> from bicm_diffusion import vp_schedule
    >>> bdia_invert(lambda z, times: z, torch.ones(1, 2), vp_schedule(4)).z.shape
    torch.Size([1, 2])
    """
    if isinstance(z, StatePair):
        following, current, start = z.z, z.previous, 1
        _check_pair(following, current)
    else:
        following, current, start = z, z, 0
    for i in indices(range(start, schedule.steps), progress):
        eps = predict(model, current, schedule, max(i, 1), extra_args)
        if i == 0:
            last = ddim_inverse_step(current, eps, schedule, 1, guidance_scale)
        else:
            last = bdia_inverse_step(
                following,
                current,
                eps,
                **_bdia_coefficients(schedule, i),
                gamma=gamma,
                guidance_scale=guidance_scale,
            )
        following, current = current, last
        report(callback, i + 1, current, eps)
    return StatePair(current, following)


class _Coefficients(TypedDict):
    a: float
    b: float
    a_last: float
    b_last: float


def _bdia_coefficients(schedule: Schedule, i: int) -> _Coefficients:
    return {"a": schedule.a[i], "b": schedule.b[i], "a_last": schedule.a[i + 1], "b_last": schedule.b[i + 1]}


def _check_pair(z: Tensor, other: Tensor) -> None:
    if z.shape != other.shape or z.dtype != other.dtype:
        given = f"{tuple(z.shape)} {z.dtype} and {tuple(other.shape)} {other.dtype}"
        raise ValueError(f"z: expected a pair of one shape and dtype, got {given}")
