"""DDIM and BDIA-DDIM, both ways along the probability-flow ODE: noise to data and data to noise.

Every sampler is a loop over the indices of a `Schedule`: one call of the model and one fused step op per
index, with float64 coefficients that the op rounds once. No gradients are recorded. The shared arguments:

model: called as `model(z, times, **extra_args)` with z (B, …) and times (B,), float64 for a float64 state and
    float32 otherwise; returns the predicted noise (B, …), or (eps_uncond, eps_cond) with a guidance_scale.
guidance_scale: e = eps_uncond + guidance_scale·(eps_cond - eps_uncond), formed inside the step op.
callback: called with a `StepInfo` after every step.
progress: True shows a progress bar (needs tqdm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypedDict

import torch
from torch import Tensor

from bicm_diffusion.schedules import Schedule
from bicm_kernels import bdia_inverse_step, bdia_step, ddim_step

Prediction: TypeAlias = Tensor | tuple[Tensor, Tensor]
Model: TypeAlias = Callable[..., Prediction]


@dataclass(frozen=True)
class StepInfo:
    """What a callback sees: the index just reached, the state there, and the prediction that led to it."""

    index: int
    z: Tensor
    eps: Prediction


class StatePair(NamedTuple):
    """Two neighbouring states of a BDIA trajectory: where it stands, and where it stood one index earlier.

    BDIA carries two states, so a trajectory can be retraced exactly only from both.
    """

    z: Tensor
    previous: Tensor


Callback: TypeAlias = Callable[[StepInfo], object]


@torch.no_grad()
def ddim_sample(
    model: Model,
    z: Tensor,
    schedule: Schedule,
    *,
    guidance_scale: float | Tensor | None = None,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Return z_0 from z = z_N by DDIM, z_{i-1} = a_i·z_i + b_i·eps(z_i, i) (BDIA eq. 6).

    z: (B, …), any floating dtype; the result has its shape and dtype. Takes N evaluations of the model.

    >>> from bicm_diffusion import vp_schedule
    >>> ddim_sample(lambda z, times: z, torch.ones(1, 2), vp_schedule(4)).shape
    torch.Size([1, 2])
    """
    for i in _indices(range(schedule.steps, 0, -1), progress):
        eps = _predict(model, z, schedule, i, extra_args)
        z = ddim_step(z, eps, a=schedule.a[i], b=schedule.b[i], guidance_scale=guidance_scale)
        _report(callback, i - 1, z, eps)
    return z


@torch.no_grad()
def ddim_invert(
    model: Model,
    z: Tensor,
    schedule: Schedule,
    *,
    guidance_scale: float | Tensor | None = None,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Return about z_N from z = z_0 by DDIM inversion, z_i = (z_{i-1} - b_i·eps(z_{i-1}, i))/a_i (eq. 8).

    z: (B, …), any floating dtype; the result has its shape and dtype. Takes N evaluations of the model.
    It is not exact: the noise in z_i is taken to be the noise in z_{i-1}.

    >>> from bicm_diffusion import vp_schedule
    >>> ddim_invert(lambda z, times: z, torch.ones(1, 2), vp_schedule(4)).shape
    torch.Size([1, 2])
    """
    for i in _indices(range(1, schedule.steps + 1), progress):
        eps = _predict(model, z, schedule, i, extra_args)
        z = _ddim_inverse_step(z, eps, schedule, i, guidance_scale)
        _report(callback, i, z, eps)
    return z


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
    for i in _indices(range(start, 0, -1), progress):
        eps = _predict(model, current, schedule, i, extra_args)
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
        _report(callback, i - 1, current, eps)
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
    for i in _indices(range(start, schedule.steps), progress):
        eps = _predict(model, current, schedule, max(i, 1), extra_args)
        if i == 0:
            last = _ddim_inverse_step(current, eps, schedule, 1, guidance_scale)
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
        _report(callback, i + 1, current, eps)
    return StatePair(current, following)


def _ddim_inverse_step(
    z: Tensor, eps: Prediction, schedule: Schedule, i: int, guidance_scale: float | Tensor | None
) -> Tensor:
    a, b = 1.0 / schedule.a[i], -schedule.b[i] / schedule.a[i]
    return ddim_step(z, eps, a=a, b=b, guidance_scale=guidance_scale)


class _Coefficients(TypedDict):
    a: float
    b: float
    a_last: float
    b_last: float


def _bdia_coefficients(schedule: Schedule, i: int) -> _Coefficients:
    return {"a": schedule.a[i], "b": schedule.b[i], "a_last": schedule.a[i + 1], "b_last": schedule.b[i + 1]}


def _predict(model: Model, z: Tensor, schedule: Schedule, i: int, extra_args: Mapping[str, Any] | None) -> Prediction:
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    times = torch.full(z.shape[:1], schedule.times[i], dtype=dtype, device=z.device)
    return model(z, times, **(extra_args or {}))


def _check_pair(z: Tensor, other: Tensor) -> None:
    if z.shape != other.shape or z.dtype != other.dtype:
        given = f"{tuple(z.shape)} {z.dtype} and {tuple(other.shape)} {other.dtype}"
        raise ValueError(f"z: expected a pair of one shape and dtype, got {given}")


def _report(callback: Callback | None, index: int, z: Tensor, eps: Prediction) -> None:
    if callback is not None:
        callback(StepInfo(index, z, eps))


def _indices(indices: range, progress: bool) -> Iterable[int]:
    if not progress:
        return indices
    from tqdm import tqdm  # an optional dependency: samplers without a bar need only torch

    return tqdm(indices, unit="step")
