"""A sampler's step, without the network, against the equations as written in the papers.

Ours is the launch of `bicm_diffusion.samplers` between two evaluations of the model, with the weights of
a step in the middle of the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from bicm_diffusion import Preconditioned, Schedule, karras_schedule, vp_schedule
from bicm_diffusion.samplers.bdia import euler_weights
from bicm_diffusion.samplers.ddim import down
from bicm_diffusion.samplers.edict import down_weights, mixed_weights
from bicm_diffusion.samplers.loop import Loop, Row
from bicm_diffusion.samplers.prediction import Prediction
from bicm_kernels import denoised_step

GUIDANCE = 7.5
INDEX, STEPS = 25, 50
GAMMA, MIX, DATA = 0.96, 0.93, 0.5
VP, EDM = vp_schedule(STEPS), karras_schedule(STEPS)


def silent(z: Tensor, times: Tensor) -> Tensor:
    """A network that the benchmarks never call."""
    return z


def loop_of(schedule: Schedule, prediction: Prediction = "noise", guidance_scale: float | None = None) -> Loop:
    """A run of a sampler."""
    return Loop("benchmark", silent, torch.empty(1, 1), schedule, prediction=prediction, guidance_scale=guidance_scale)


PLAIN, GUIDED = loop_of(VP), loop_of(VP, guidance_scale=GUIDANCE)
CLEAN, RAW = loop_of(EDM, "x0"), loop_of(EDM, Preconditioned(sigma_data=DATA))
ONE = range(INDEX, INDEX + 1)


def row(loop: Loop, formula: Callable[..., Row], *numbers: Any, above: bool = False) -> Row:
    """The weights of the step in the middle."""
    return loop.rows(formula, ONE, (-1, 0, 1) if above else (-1, 0), *numbers)[INDEX]


DDIM_ROW, EULER_ROW, RAW_ROW = row(PLAIN, down), row(CLEAN, down), row(RAW, down)
BDIA_ROW = (GAMMA, *row(PLAIN, euler_weights, GAMMA, above=True))
EDICT_ROWS = row(PLAIN, down_weights), row(PLAIN, mixed_weights, MIX)


def ours_ddim(z: Tensor, eps: Tensor) -> Tensor:
    """One launch."""
    return PLAIN.advance([z, eps], DDIM_ROW)[0]


def ours_bdia(z_last: Tensor, z: Tensor, eps: Tensor) -> Tensor:
    """One launch."""
    return PLAIN.advance([z_last, z, eps], BDIA_ROW)[0]


def ours_bdia_guided(z_last: Tensor, z: Tensor, eps_uncond: Tensor, eps_cond: Tensor) -> Tensor:
    """One launch."""
    return GUIDED.advance([z_last, z, (eps_uncond, eps_cond)], BDIA_ROW)[0]


def ours_edict(z: Tensor, y: Tensor, eps_y: Tensor, eps_inter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches, one before each evaluation."""
    (of_z, _, of_eps), mixed = EDICT_ROWS
    z_inter, _ = PLAIN.advance([z, eps_y], (of_z, of_eps))
    y, z, _ = denoised_step([z_inter, y, eps_inter], mixed[:3], mixed[3:6], x0_weight=mixed[6])
    return z_inter, z, y


def ours_euler(x: Tensor, denoised: Tensor) -> Tensor:
    """One launch."""
    return CLEAN.advance([x, denoised], EULER_ROW)[0]


def ours_euler_raw(x: Tensor, F: Tensor) -> tuple[Tensor, Tensor | None]:
    """One launch, which also computes the network's next input."""
    return RAW.advance([x, F], RAW_ROW, then=INDEX - 1)


def ddim(z: Tensor, eps: Tensor) -> Tensor:
    """BDIA eq. 5: through the predicted sample."""
    x0 = (z - VP.sigma[INDEX] * eps) / VP.alpha[INDEX]
    return VP.alpha[INDEX - 1] * x0 + VP.sigma[INDEX - 1] * eps


def bdia(z_last: Tensor, z: Tensor, eps: Tensor) -> Tensor:
    """BDIA eq. 24."""
    a, b, a_last, b_last = VP.a[INDEX], VP.b[INDEX], VP.a[INDEX + 1], VP.b[INDEX + 1]
    return GAMMA * z_last - GAMMA * (z / a_last - (b_last / a_last) * eps) + (a * z + b * eps)


def bdia_guided(z_last: Tensor, z: Tensor, eps_uncond: Tensor, eps_cond: Tensor) -> Tensor:
    """Classifier-free guidance, then BDIA eq. 24."""
    return bdia(z_last, z, eps_uncond + GUIDANCE * (eps_cond - eps_uncond))


def edict(z: Tensor, y: Tensor, eps_y: Tensor, eps_inter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """BDIA eq. 9 to 12."""
    a, b = VP.a[INDEX], VP.b[INDEX]
    z_inter = a * z + b * eps_y
    y_inter = a * y + b * eps_inter
    z = MIX * z_inter + (1 - MIX) * y_inter
    return z_inter, z, MIX * y_inter + (1 - MIX) * z


def euler(x: Tensor, denoised: Tensor) -> Tensor:
    """A step of EDM's Algorithm 1 without its second half."""
    t, t_next = EDM.sigma[INDEX], EDM.sigma[INDEX - 1]
    return x + (t_next - t) * ((x - denoised) / t)


def euler_raw(x: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """EDM's denoiser (eq. 7), the step, and the network's next input."""
    t, t_next = EDM.sigma[INDEX], EDM.sigma[INDEX - 1]
    total, total_next = DATA**2 + t**2, DATA**2 + t_next**2
    x = euler(x, DATA**2 / total * x + DATA * t / total**0.5 * F)
    return x, 1 / total_next**0.5 * x


CASES = (
    Case("sampler_ddim", ours_ddim, ddim, tensors=2, reads=2, writes=1),
    Case("sampler_bdia", ours_bdia, bdia, tensors=3, reads=3, writes=1),
    Case("sampler_bdia_guided", ours_bdia_guided, bdia_guided, tensors=4, reads=4, writes=1),
    Case("sampler_edict", ours_edict, edict, tensors=4, reads=4, writes=3),
    Case("sampler_euler", ours_euler, euler, tensors=2, reads=2, writes=1),
    Case("sampler_euler_raw", ours_euler_raw, euler_raw, tensors=2, reads=2, writes=2),
)
