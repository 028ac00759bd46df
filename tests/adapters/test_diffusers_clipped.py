"""A clipped x0 of latent consistency models is at most twice as far from float64 as the original's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import LCMScheduler

from bicm_diffusion.adapters.diffusers import accelerate_scheduler
from tests.support.diffusers_observed import in_float64

STEPS = 8


def denoised(scheduler: Any, index: int, x: Tensor, output: Tensor) -> Tensor:
    scheduler._step_index = index
    result: Tensor = scheduler.step(output, scheduler.timesteps[index], x, torch.Generator().manual_seed(1)).denoised
    return result


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("betas", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_clipped_x0(prediction: str, betas: str, spacing: str) -> None:
    original = LCMScheduler(clip_sample=True, beta_schedule=betas, timestep_spacing=spacing, prediction_type=prediction)
    original.set_timesteps(STEPS)
    ours, exact = accelerate_scheduler(original), in_float64(original)
    source = torch.Generator().manual_seed(0)
    for index in range(STEPS):
        errors = {"ours": 0.0, "original": 0.0}
        for _ in range(6):
            x, output = (torch.randn(2, 3, 16, 16, generator=source) for _ in range(2))
            truth = denoised(exact, index, x.double(), output.double())
            for name, scheduler in (("ours", ours), ("original", original)):
                error = (denoised(scheduler, index, x, output).double() - truth).abs().max().item()
                errors[name] += error
        assert errors["ours"] <= 2 * errors["original"], (index, errors)
