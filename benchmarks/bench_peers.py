"""Peers' own steps, as their packages publish them, beside the adapters that replace them; the network costs nothing.

A diffusers step is `step` in the middle of a schedule and then `scale_model_input`, as pipelines call them. The
samplers of k-diffusion and EDM are runs of four levels, because a run's set-up is part of them. EDM is no package: its
sampler and its loss stand here as formulas.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor

from benchmarks.bench_objectives import answering
from benchmarks.cases import SEED, Case, Results, column
from bicm_diffusion import denoising_loss
from bicm_diffusion.adapters import edm, k_diffusion

STEPS, INDEX = 20, 10
LEVELS = (5.0, 3.2, 1.9, 1.0)
#: EDM's levels: the sampler forms them from their number.
EDM_STEPS, SIGMA_MIN, SIGMA_MAX, RHO, DATA = 4, 0.002, 80.0, 7.0, 0.5
KEY: dict[str, Any] = {"seed": SEED, "step": 0}


@cache
def scheduler(name: str, accelerated: bool) -> Any:
    """A scheduler of diffusers before its loop."""
    import diffusers

    from bicm_diffusion.adapters.diffusers import accelerate_scheduler

    made = getattr(diffusers, f"{name}Scheduler")()
    made = accelerate_scheduler(made) if accelerated else made
    made.set_timesteps(STEPS)
    if hasattr(made, "scale_model_input"):
        made.scale_model_input(torch.zeros(1), made.timesteps[INDEX])  # a step before it warns
    return made


def diffusers_step(name: str, accelerated: bool, x: Tensor, output: Tensor, *earlier: Tensor) -> Results:
    """The step in the middle, then the next input, which is the state itself in schedulers that scale by one."""
    made = scheduler(name, accelerated)
    made._step_index = INDEX
    if earlier:
        made.model_outputs, made.lower_order_nums = [None, *earlier], 2
    after: Tensor = made.step(output, made.timesteps[INDEX], x).prev_sample
    if not hasattr(made, "scale_model_input"):
        return after
    scaled: Tensor = made.scale_model_input(after, made.timesteps[INDEX + 1])
    return after if scaled is after else (after, scaled)


@cache
def published() -> ModuleType:
    """k-diffusion's samplers without what they do not need: its package imports torchvision, CLIP and more."""
    found = importlib.util.find_spec("k_diffusion")
    assert found is not None and found.submodule_search_locations is not None
    package = ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations)
    stubs: dict[str, Any] = {"k_diffusion": package}
    for name in ("torchdiffeq", "torchsde", "torchvision"):
        if importlib.util.find_spec(name) is None:
            stubs |= {name: MagicMock(), f"{name}.transforms": MagicMock()}
    with patch.dict(sys.modules, stubs):
        return importlib.import_module("k_diffusion.sampling")


def k_run(sampler: Callable[..., Tensor], x: Tensor, first: Tensor, other: Tensor) -> Tensor:
    """A run with a network that returns two stored outputs in turn."""
    turns = iter([first, other] * len(LEVELS))
    return sampler(lambda x, sigma: next(turns), x, torch.tensor(LEVELS), disable=True)


def ours_k(name: str, x: Tensor, first: Tensor, other: Tensor) -> Tensor:
    """Our sampler with k-diffusion's signature."""
    return k_run(getattr(k_diffusion, name), x, first, other)


def their_k(name: str, x: Tensor, first: Tensor, other: Tensor) -> Tensor:
    """k-diffusion's sampler."""
    return k_run(getattr(published(), name), x, first, other)


def ours_edm(x: Tensor, first: Tensor, other: Tensor) -> Tensor:
    """Our sampler with EDM's signature, state in float64."""
    turns = iter([first, other] * EDM_STEPS)
    return edm.edm_sampler(lambda *_: next(turns), x, num_steps=EDM_STEPS)


def heun(x: Tensor, first: Tensor, other: Tensor) -> Tensor:
    """EDM Alg. 2 without churn: state in float64, and noise drawn in every step, as in the published sampler."""
    turns = iter([first, other] * EDM_STEPS)
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    levels = [(high + i / (EDM_STEPS - 1) * (low - high)) ** RHO for i in range(EDM_STEPS)]
    state = x.double() * levels[0]
    for t, after in zip(levels, [*levels[1:], 0.0], strict=True):
        raised = state + 0.0 * torch.randn_like(state)
        slope = (raised - next(turns).double()) / t
        state = raised + (after - t) * slope
        if after > 0:
            slope_after = (state - next(turns).double()) / after
            state = raised + (after - t) * (0.5 * slope + 0.5 * slope_after)
    return state


def ours_edm_loss(output: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """`denoising_loss` with a network that returns a stored output."""
    return denoising_loss(answering(output), x, t.double(), **KEY).total


def edm_loss(output: Tensor, x: Tensor, t: Tensor, draw: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
    """EDM eq. 2, 7 and its weight, as written; the network's input is formed and not used."""
    t = column(t, x)
    total = DATA**2 + t**2
    noisy = x + draw(x) * t
    _ = (noisy / total.sqrt()).to(x.dtype)
    denoised = DATA**2 / total * noisy + DATA * t / total.sqrt() * output.float()
    return (total / (t * DATA) ** 2 * (denoised - x) ** 2).mean()


def of_diffusers(label: str, name: str, *, tensors: int = 2, writes: int = 1) -> Case:
    """A scheduler's step."""
    ours, theirs = (partial(diffusers_step, name, accelerated) for accelerated in (True, False))
    numbers: dict[str, Any] = {"tensors": tensors, "reads": tensors, "writes": writes}
    return Case(f"diffusers_{label}", ours, theirs, **numbers, package="diffusers", compiles=False)


def of_k_diffusion(label: str, passes: int) -> Case:
    """A sampler's run of three steps."""
    ours, theirs = (partial(run, f"sample_{label}") for run in (ours_k, their_k))
    numbers: dict[str, Any] = {"tensors": 3, "reads": 3, "writes": 1, "passes": passes}
    return Case(f"k_{label}", ours, theirs, **numbers, package="k_diffusion", compiles=False)


# An Euler step reads the state and the denoised sample and writes the state. Heun's does so too, then reads both states
# and the second sample; DPM-Solver++(2M)'s reads an earlier sample from the second step on. EDM's state is as large
# as two float32 tensors: 11 passes for a step of Heun's, 3 for the last, whose result is the denoised sample alone.
CASES = (
    of_diffusers("ddim", "DDIM"),
    of_diffusers("euler", "EulerDiscrete", writes=2),
    of_diffusers("flow_euler", "FlowMatchEulerDiscrete"),
    of_diffusers("dpmpp_2m", "DPMSolverMultistep", tensors=3),
    of_k_diffusion("euler", 9),
    of_k_diffusion("heun", 21),
    of_k_diffusion("dpmpp_2m", 11),
    Case("edm_heun", ours_edm, heun, tensors=3, reads=0, writes=1, passes=36, compiles=False, temporaries=24),
    Case("edm_loss", ours_edm_loss, edm_loss, tensors=2, reads=4, writes=1, noise="added", trains=True, per_sample=1),
)
