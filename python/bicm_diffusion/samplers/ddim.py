"""DDIM, and DDIM inversion: the probability-flow ODE at one evaluation a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.samplers.loop import Callback, Model, Prediction, indices, predict, report
from bicm_diffusion.schedules import Schedule
from bicm_kernels import ddim_step


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
    for i in indices(range(schedule.steps, 0, -1), progress):
        eps = predict(model, z, schedule, i, extra_args)
        z = ddim_step(z, eps, a=schedule.a[i], b=schedule.b[i], guidance_scale=guidance_scale)
        report(callback, i - 1, z, eps)
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
    for i in indices(range(1, schedule.steps + 1), progress):
        eps = predict(model, z, schedule, i, extra_args)
        z = ddim_inverse_step(z, eps, schedule, i, guidance_scale)
        report(callback, i, z, eps)
    return z


def ddim_inverse_step(
    z: Tensor, eps: Prediction, schedule: Schedule, i: int, guidance_scale: float | Tensor | None
) -> Tensor:
    a, b = 1.0 / schedule.a[i], -schedule.b[i] / schedule.a[i]
    return ddim_step(z, eps, a=a, b=b, guidance_scale=guidance_scale)
