"""Schedulers whose sigmas are not those of a variance-preserving state that falls from noise to data."""

from __future__ import annotations

import importlib
import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import DDIMInverseScheduler, DDIMScheduler, DPMSolverMultistepInverseScheduler

from bicm_diffusion import Preconditioned
from bicm_diffusion.adapters.diffusers import from_diffusers

COSINE = "diffusers.schedulers.scheduling_cosine_dpmsolver_multistep"
SDE = "diffusers.schedulers.scheduling_dpmsolver_sde"


class Network(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (0.5 * sample + timestep.reshape(-1, 1),)


@pytest.fixture
def cosine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scheduler's class, which needs an empty module in place of torchsde for what is tested here."""
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    for name in (COSINE, SDE):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(COSINE).CosineDPMSolverMultistepScheduler
    for name in (COSINE, SDE):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_the_cosine_scheduler_is_edm_s(cosine: Any, sigma_data: float, prediction: str) -> None:
    """Its x0, from its own scaled input and time, at every level."""
    scheduler, network = cosine(sigma_data=sigma_data, prediction_type=prediction), Network()
    model, schedule, kind = from_diffusers(network, scheduler, steps=4)
    assert isinstance(kind, Preconditioned) and kind.sigma_data == sigma_data
    scheduler.set_timesteps(4)
    sigmas = scheduler.sigmas[:-1]
    torch.testing.assert_close(torch.tensor(schedule.times[::-1][:4]), sigmas, rtol=1e-6, atol=0)
    x = torch.linspace(-3.0, 3.0, 6).reshape(2, 3)
    for sigma, time in zip(sigmas, scheduler.timesteps, strict=True):
        scaled = scheduler.precondition_inputs(x, sigma)
        (output,) = network(scaled, time.expand(2))
        expected = scheduler.precondition_outputs(x, output, sigma)
        total = math.sqrt(float(sigma) ** 2 + sigma_data**2)
        c_skip, c_out, c_in = sigma_data**2 / total**2, float(sigma) * sigma_data / total, 1.0 / total
        seen = c_skip * x + c_out * model(c_in * x, sigma.expand(2))
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flows", [False, True])
def test_the_inverse_solver_is_refused(flows: bool) -> None:
    scheduler = DPMSolverMultistepInverseScheduler(use_flow_sigmas=flows)
    with pytest.raises(ValueError, match="scheduler: expected one from noise to data, got DPMSolverMultistepInverse"):
        from_diffusers(Network(), scheduler, steps=4)


def test_an_inverse_scheduler_without_sigmas_has_the_levels_of_its_other_direction() -> None:
    one, other = (from_diffusers(Network(), each(), steps=4)[1] for each in (DDIMInverseScheduler, DDIMScheduler))
    assert (one.times, one.alpha, one.sigma) == (other.times, other.alpha, other.sigma)
