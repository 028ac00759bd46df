"""DDIM and DDIM inversion: the probability-flow ODE with one evaluation per step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from bicm_diffusion.samplers.loop import Loop, Model, Options, Row, transfer
from bicm_diffusion.samplers.prediction import Level, Prediction, folded, read
from bicm_diffusion.samplers.signature import sampler
from bicm_diffusion.schedules import Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack


@sampler(Loop)
def ddim_sample(model: Model, z: Tensor, schedule: Schedule, **options: Unpack[Options]) -> Tensor:
    """Return z_0 from z = z_N by DDIM, z_{i-1} = a_i·z_i + b_i·eps(z_i, i) (BDIA eq. 6).

    z: (B, …), any floating dtype; the result has its shape and dtype. Takes N evaluations of the model, at
    `schedule.times`; options: those of every sampler, see `Options`. Where alpha is 1 this is Euler's method.
    Raises ValueError for an unknown prediction.

    >>> import torch
    >>> from bicm_diffusion import vp_schedule
    >>> ddim_sample(lambda z, times: z, torch.ones(1, 2), vp_schedule(4)).shape
    torch.Size([1, 2])
    """
    loop, scaled = Loop("ddim_sample", model, z, schedule, **options), None
    rows = loop.rows(down, range(1, schedule.steps + 1), (-1, 0))
    for i in loop.steps(range(schedule.steps, 0, -1)):
        output = loop.evaluate(i, z, scaled)
        z, scaled = loop.advance([z, output], rows[i], then=i - 1 if i > 1 else None)
        loop.report(i - 1, z, output)
    return z


@sampler(Loop)
def ddim_invert(model: Model, z: Tensor, schedule: Schedule, **options: Unpack[Options]) -> Tensor:
    """Return approximately z_N from z = z_0 by DDIM inversion, z_i = (z_{i-1} - b_i·eps(z_{i-1}, i))/a_i (BDIA eq. 8).

    z: (B, …), any floating dtype; the result has its shape and dtype. Takes N evaluations of the model, at
    `schedule.times`; options: those of every sampler, see `Options`.
    It is not exact: it uses the predicted noise at z_{i-1} for that at z_i.
    Raises ValueError for an unknown prediction.

    >>> import torch
    >>> from bicm_diffusion import vp_schedule
    >>> ddim_invert(lambda z, times: z, torch.ones(1, 2), vp_schedule(4)).shape
    torch.Size([1, 2])
    """
    loop, scaled = Loop("ddim_invert", model, z, schedule, **options), None
    rows = loop.rows(up, range(1, schedule.steps + 1), (-1, 0))
    for i in loop.steps(range(1, schedule.steps + 1)):
        output = loop.evaluate(i, z, scaled)
        z, scaled = loop.advance([z, output], rows[i], then=i + 1 if i < schedule.steps else None)
        loop.report(i, z, output)
    return z


def down(prediction: Prediction, below: Level, here: Level) -> Row:
    """Weights of z_i and the output at z_i in z_{i-1}."""
    return folded(read(prediction, here), *transfer(here, below))


def up(prediction: Prediction, below: Level, here: Level) -> Row:
    """Weights of z_{i-1} and the output there in z_i; the model gets z_{i-1} with the time of z_i."""
    return folded(read(prediction, here), *transfer(below, here))


def up_from(prediction: Prediction, below: Level, here: Level) -> Row:
    """The same where the model got the time of z_{i-1}."""
    return folded(read(prediction, below), *transfer(below, here))
