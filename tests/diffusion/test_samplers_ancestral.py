"""The ancestral sampler against DDPM's, DDIM's and k-diffusion's formulas, and its noise's key."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import (
    Preconditioned,
    ancestral_sample,
    ddim_sample,
    ddpm_schedule,
    karras_schedule,
    to_ve,
    to_vp,
    vp_schedule,
)
from bicm_diffusion.inverse import dps_sample
from bicm_diffusion.keys import ANCESTRAL
from bicm_kernels import fold_in, normal
from tests.support.closed_forms import column, noise

ETAS = [1.0, 0.6, 0.0]


def answer(z: Tensor, times: Tensor) -> Tensor:
    return torch.tanh(z * 0.7) * 0.8 + 0.1 * torch.cos(column(times, z).to(z.dtype))


def drawn(z: Tensor, step: int) -> Tensor:
    return normal(z.shape, seed=fold_in(3, ANCESTRAL), step=step).to(z.dtype)


def told(i: int, schedule: Any, z: Tensor) -> Tensor:
    return torch.full(z.shape[:1], schedule.times[i], dtype=torch.float64)


@pytest.mark.parametrize("eta", ETAS)
def test_is_ddim_with_eta_on_a_vp_schedule(eta: float) -> None:
    """DDIM eq. 12 and 16; DDPM's posterior standard deviation at 1."""
    schedule, z = ddpm_schedule(8), noise(3, 4)
    found = ancestral_sample(answer, z, schedule, eta=eta, seed=3)
    for i in range(8, 0, -1):
        bar, bar_below = schedule.alpha[i] ** 2, schedule.alpha[i - 1] ** 2
        eps = answer(z, told(i, schedule, z))
        deviation = eta * math.sqrt((1 - bar_below) / (1 - bar)) * math.sqrt(1 - bar / bar_below)
        x0 = (z - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        direction = math.sqrt(max(1 - bar_below - deviation**2, 0.0))
        z = math.sqrt(bar_below) * x0 + direction * eps + deviation * drawn(z, i)
    # The formula takes the difference 1 - ᾱ - σ², which ours does not.
    torch.testing.assert_close(found, z, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("eta", ETAS)
def test_is_k_diffusion_s_formula_on_noise_levels(eta: float) -> None:
    schedule, x = karras_schedule(8, t_max=20.0), 20.0 * noise(3, 4)
    found = ancestral_sample(answer, x, schedule, eta=eta, seed=3, prediction="x0")
    for i in range(8, 0, -1):
        sigma, below = schedule.sigma[i], schedule.sigma[i - 1]
        up = min(below, eta * (below**2 * (sigma**2 - below**2) / sigma**2) ** 0.5)
        down = (below**2 - up**2) ** 0.5
        denoised = answer(x, told(i, schedule, x))
        x = x + (x - denoised) / sigma * (down - sigma) + drawn(x, i) * up
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", ["noise", "v", "x0", Preconditioned()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eta_0_is_ddim_to_the_bit(dtype: torch.dtype, prediction: Any) -> None:
    z = noise(3, 4, dtype=dtype)
    for schedule in (vp_schedule(6), karras_schedule(6)):
        expected = ddim_sample(answer, z, schedule, prediction=prediction)
        assert torch.equal(ancestral_sample(answer, z, schedule, prediction=prediction, eta=0.0), expected)


def test_both_forms_of_a_schedule_are_one_chain() -> None:
    vp = to_vp(karras_schedule(6, t_min=0.05, t_max=10.0))
    ve, z = to_ve(vp), noise(3, 4)
    one = ancestral_sample(lambda z, t: answer(z / vp.alpha[vp.times.index(t[0].item())], t), z, vp, prediction="x0")
    other = ancestral_sample(answer, z / vp.alpha[-1], ve, prediction="x0")
    torch.testing.assert_close(one / vp.alpha[0], other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", ETAS)
def test_a_gaussian_keeps_the_variance_that_its_steps_keep(eta: float) -> None:
    """Every step is linear, so that the variance is a recursion of numbers."""
    std, count, schedule = 0.5, 4000, karras_schedule(30, t_min=0.01, t_max=10.0)
    z = 10.0 * noise(count, 1)
    found = ancestral_sample(
        lambda z, t: z * std**2 / (std**2 + column(t, z) ** 2), z, schedule, prediction="x0", eta=eta
    )
    variance = 100.0
    for i in range(30, 0, -1):
        sigma, below = schedule.sigma[i], schedule.sigma[i - 1]
        up = eta * below * math.sqrt(1 - (below / sigma) ** 2)
        ratio = math.sqrt(below**2 - up**2) / sigma
        variance = (ratio + (1 - ratio) * std**2 / (std**2 + sigma**2)) ** 2 * variance + up**2
    # Six standard errors of a variance.
    assert abs(found.var().item() - variance) < 6.0 * math.sqrt(2.0 / count) * variance
    assert found.mean().abs().item() < 6.0 * math.sqrt(variance / count)


def test_a_sample_is_the_same_bits_alone_and_among_16() -> None:
    z, schedule = noise(16, 3, 4, dtype=torch.float32), vp_schedule(5)
    whole = ancestral_sample(answer, z, schedule, seed=3)
    for k in (0, 7):
        assert torch.equal(ancestral_sample(answer, z[k : k + 1], schedule, seed=3, sample_id=k)[0], whole[k])
    ids = torch.tensor([9, 2])
    assert torch.equal(ancestral_sample(answer, z[ids], schedule, seed=3, sample_id=ids), whole[ids])
    assert not torch.equal(ancestral_sample(answer, z, schedule, seed=4), whole)


def test_a_solver_without_corrections_is_this_sampler() -> None:
    z, schedule = 10.0 * noise(3, 4, dtype=torch.float32), karras_schedule(5, t_max=10.0)
    given: dict[str, Any] = {"prediction": Preconditioned(), "seed": 3}
    solved = dps_sample(answer, z, schedule, operator=torch.square, y=z, scale=0.0, **given)
    torch.testing.assert_close(solved, ancestral_sample(answer, z, schedule, **given), rtol=1e-5, atol=1e-6)
    solved = dps_sample(answer, z, schedule, operator=torch.square, y=z, scale=0.0, seed=3)
    assert torch.equal(solved, ancestral_sample(answer, z, schedule, seed=3))


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_stays_in_its_range(eta: float) -> None:
    with pytest.raises(ValueError, match=r"eta: expected a value in \[0, 1\], got"):
        ancestral_sample(answer, noise(3, 4), vp_schedule(5), eta=eta)
