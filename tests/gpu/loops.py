"""Whole sampling loops on a device, with networks whose every operation rounds alike everywhere."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion import (
    ConsistencySchedule,
    ExactPair,
    Preconditioned,
    bdia_edit,
    bdia_invert,
    bdia_sample,
    consistency_sample,
    ddim_invert,
    ddim_sample,
    edict_invert,
    edict_sample,
    edm_sample,
    karras_schedule,
    obelm_invert,
    obelm_sample,
    sign_masked,
    vp_schedule,
)
from bicm_diffusion.adapters import consistency_models, edm, k_diffusion

Loop = Callable[[Tensor], Any]

STEPS = 7
SCHEDULE = vp_schedule(STEPS)
LEVELS = karras_schedule(STEPS)
SIGMAS = torch.tensor(LEVELS.sigma[::-1], dtype=torch.float32)
LEAPS = ConsistencySchedule((80.0, 2.0), ((0.05, 1.0),))
GAMMA = Fraction(9, 10)


def model(z: Tensor, times: Tensor, shift: float = 0.25) -> Tensor:
    """Clamped, so that no compiler has a product and a sum to join, and another in every sample."""
    return z.clamp(-1.0, 1.0).where(times.reshape(-1, *[1] * (z.dim() - 1)) > 0.3, z.abs().clamp(max=shift))


def pair(z: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    return model(z, times), model(z, times, 0.5)


def denoiser(x: Tensor, sigma: Tensor, *_: Any) -> Tensor:
    return x.clamp(-1.0, 1.0).where(sigma.reshape(-1, *[1] * (x.dim() - 1)) > 0.3, x)


def two_level(x: Tensor, t: Tensor, u: Tensor) -> Tensor:
    return denoiser(x, t).where(u.reshape(-1, *[1] * (x.dim() - 1)) > 0.1, x.abs())


def opened(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result."""
    if isinstance(result, ExactPair):
        return result.q, result.previous_q, result.info, result.overflow, result.z
    return (result,) if isinstance(result, Tensor) else tuple(result)


def floats(sampler: Any, **options: Any) -> Loop:
    return lambda z: tuple(sampler(model, z, SCHEDULE, exact=False, **options))


def exact(sampler: Any, **options: Any) -> Loop:
    return lambda z: sampler(model, z, SCHEDULE, **options)


def k_sampler(sampler: Any, **churn: float) -> Loop:
    def loop(z: Tensor) -> Tensor:
        noise = {"noise_sampler": k_diffusion.keyed_noise_sampler(z, SIGMAS, seed=3)} if churn else {}
        return sampler(denoiser, 80 * z, SIGMAS, disable=True, **churn, **noise)

    return loop


#: Loops of floats: they wait for nothing.
FLOATS: dict[str, Loop] = {
    "ddim_sample": lambda z: ddim_sample(model, z, SCHEDULE),
    "ddim_sample guided": lambda z: ddim_sample(pair, z, SCHEDULE, guidance_scale=1.5),
    "ddim_sample raw": lambda z: ddim_sample(model, z, SCHEDULE, prediction=Preconditioned("bcm")),
    "ddim_invert": lambda z: ddim_invert(model, z, SCHEDULE, prediction="v"),
    "edm_sample euler": lambda z: edm_sample(model, z, LEVELS, solver="euler", prediction="x0"),
    "edm_sample heun": lambda z: edm_sample(model, z, LEVELS, prediction=Preconditioned()),
    "bdia_sample floats": floats(bdia_sample, gamma=0.9),
    "bdia_invert floats": floats(bdia_invert, gamma=0.9),
    "bdia_sample heun floats": floats(bdia_sample, gamma=0.9, increments="heun"),
    "obelm_sample floats": floats(obelm_sample),
    "edict_sample floats": floats(edict_sample),
    "edict_invert floats": floats(edict_invert),
    "consistency_sample": lambda z: consistency_sample(two_level, 80 * z, LEAPS, seed=2),
    "sign_masked": lambda z: sign_masked(torch.abs, z, [0.8, 0.3], mask=z > 0, seed=4),
    "k-diffusion euler": k_sampler(k_diffusion.sample_euler, s_churn=4.0),
    "k-diffusion heun": k_sampler(k_diffusion.sample_heun),
    "k-diffusion dpmpp_2m": k_sampler(k_diffusion.sample_dpmpp_2m),
    "EDM": lambda z: edm.edm_sampler(denoiser, z, num_steps=STEPS, dtype=torch.float32),
    "EDM in float64": lambda z: edm.edm_sampler(denoiser, z, num_steps=STEPS),
    "consistency models": lambda z: consistency_models.sample_onestep(denoiser, 80 * z, SIGMAS),
}

#: Loops on integers: only at their end do they ask whether a sample left its range.
EXACT: dict[str, Loop] = {
    "bdia_sample": exact(bdia_sample, gamma=GAMMA),
    "bdia_sample, ratio 1": exact(bdia_sample, gamma=1),
    "bdia_sample heun": exact(bdia_sample, gamma=GAMMA, increments="heun"),
    "bdia_edit": exact(bdia_edit, gamma=GAMMA, source={"shift": 0.25}, target={"shift": 0.5}),
    "obelm_sample": exact(obelm_sample),
    "edict_sample": exact(edict_sample),
}

#: From noise to data and back, every bit.
ROUND_TRIPS: dict[str, tuple[Any, Any]] = {
    "bdia": (exact(bdia_sample, gamma=GAMMA), lambda p: bdia_invert(model, p, SCHEDULE, gamma=GAMMA)),
    "bdia, ratio 1": (exact(bdia_sample, gamma=1), lambda p: bdia_invert(model, p, SCHEDULE, gamma=1)),
    "obelm": (exact(obelm_sample), lambda p: obelm_invert(model, p, SCHEDULE)),
    "edict": (exact(edict_sample), lambda p: edict_invert(model, p, SCHEDULE)),
}

LOOPS = FLOATS | EXACT


def start(device: str) -> Tensor:
    """Noise that integers of 32 fractional bits hold to the bit."""
    noise = torch.randn(3, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    return (torch.round(noise * 2**20) / 2**20).to(device)
