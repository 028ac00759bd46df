"""DDPM's tables against their formulas, and against diffusers where it is installed."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from bicm_diffusion import ddpm_alpha_bar, ddpm_schedule, ddpm_timesteps, vp_alpha_sigma

SPACINGS = ("leading", "linspace", "trailing")
BETAS = ("linear", "scaled_linear", "cosine")


def test_linear_alpha_bar_is_the_product_of_its_betas() -> None:
    table = ddpm_alpha_bar("linear")
    assert table.shape == (1000,) and table.dtype == torch.float64
    product = 1.0
    for k in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * k / 999)
        assert table[k].item() == pytest.approx(product, rel=1e-12)


def test_scaled_linear_betas_have_linear_roots() -> None:
    table = ddpm_alpha_bar("scaled_linear", beta_start=0.00085, beta_end=0.012)
    betas = 1 - table / torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
    steps = betas.sqrt().diff()
    torch.testing.assert_close(steps, steps.mean().expand(999), rtol=1e-6, atol=0)
    assert betas[0].item() == pytest.approx(0.00085, rel=1e-12) and betas[-1].item() == pytest.approx(0.012, rel=1e-10)


def test_cosine_alpha_bar_is_the_squared_cosine_until_its_betas_are_capped() -> None:
    table = ddpm_alpha_bar("cosine")

    def level(k: int) -> float:
        return math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for k in (1, 10, 500, 998):
        assert table[k - 1].item() == pytest.approx(level(k) / level(0), rel=1e-9)
    assert (table[-1] / table[-2]).item() == pytest.approx(0.001, rel=1e-9)


def test_linear_betas_tend_to_the_continuous_process() -> None:
    alpha, _ = vp_alpha_sigma(torch.tensor(0.5, dtype=torch.float64))
    assert ddpm_alpha_bar("linear")[499].sqrt().item() == pytest.approx(alpha.item(), rel=0.01)


@pytest.mark.parametrize("steps", [1, 3, 7, 50, 999, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_rise_within_range(spacing: str, steps: int) -> None:
    visited = ddpm_timesteps(steps, spacing)
    assert visited.shape == (steps,) and visited.dtype == torch.int64
    assert visited[0] >= 0 and visited[-1] <= 999 and (steps == 1 or visited.diff().min() >= 1)
    if spacing == "trailing":
        assert visited[-1] == 999
    if spacing == "leading":
        assert visited[0] == 0
    if spacing == "linspace" and steps > 1:
        assert visited[0] == 0 and visited[-1] == 999


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("betas", BETAS)
def test_schedules_visit_their_table(betas: str, spacing: str) -> None:
    schedule = ddpm_schedule(25, betas=betas, spacing=spacing)
    table, visited = ddpm_alpha_bar(betas), ddpm_timesteps(25, spacing)
    assert schedule.times == (-1.0, *map(float, visited.tolist())) and schedule.clean
    for i, t in enumerate(visited.tolist(), start=1):
        assert schedule.alpha[i] ** 2 == pytest.approx(table[t].item(), rel=1e-14)
        assert schedule.alpha[i] ** 2 + schedule.sigma[i] ** 2 == pytest.approx(1.0, abs=1e-15)


def test_a_schedule_may_end_on_the_first_training_step() -> None:
    first = ddpm_alpha_bar("linear")[0].item()
    schedule = ddpm_schedule(10, steps_offset=1, final_alpha_bar=first)
    assert schedule.alpha[0] == math.sqrt(first) and not schedule.clean


# --- diffusers ------------------------------------------------------------------------------------------------------

needs_diffusers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
BY_THEIR_NAMES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


@needs_diffusers
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("steps", [10, 25, 40])
def test_diffusers_visits_the_same_levels(betas: str, spacing: str, steps: int) -> None:
    from diffusers import DDIMScheduler

    offset = 1 if spacing == "leading" else 0
    theirs = DDIMScheduler(beta_schedule=BY_THEIR_NAMES[betas], timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(steps)
    visited = ddpm_timesteps(steps, spacing, steps_offset=offset)
    assert theirs.timesteps.flip(0).tolist() == visited.tolist()
    torch.testing.assert_close(theirs.alphas_cumprod.double(), ddpm_alpha_bar(betas), rtol=2e-5, atol=1e-9)


@needs_diffusers
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("train_steps", [37, 1000])
def test_diffusers_visits_the_same_steps_for_every_count(train_steps: int, spacing: str) -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(num_train_timesteps=train_steps, timestep_spacing=spacing)
    for steps in range(1, train_steps + 1):
        theirs.set_timesteps(steps)
        # For some counts its range has one number more, which is -1.
        visited = theirs.timesteps[:steps].flip(0)
        assert torch.equal(ddpm_timesteps(steps, spacing, train_steps=train_steps), visited), steps


@needs_diffusers
def test_diffusers_spaces_karras_levels_alike() -> None:
    from diffusers import EulerDiscreteScheduler

    from bicm_diffusion import karras_levels

    theirs = EulerDiscreteScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True)
    theirs.set_timesteps(20)
    low, high = theirs.sigmas[-2].item(), theirs.sigmas[0].item()
    ours = karras_levels(20, t_min=low, t_max=high).float()
    torch.testing.assert_close(theirs.sigmas[:-1].flip(0), ours, rtol=1e-5, atol=0)


# --- wrong calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"betas": "quadratic"}, "betas"),
        ({"spacing": "even"}, "spacing"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"train_steps": 0}, "steps"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"beta_end": 1.0}, "beta_end"),
        ({"steps": 10, "steps_offset": 100}, "steps_offset"),
        ({"steps_offset": -1}, "steps_offset"),
        ({"spacing": "trailing", "steps_offset": 1}, "steps_offset"),
        ({"final_alpha_bar": 0.5}, "final_alpha_bar"),
        ({"final_alpha_bar": 1.5}, "final_alpha_bar"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ddpm_schedule(**({"steps": 10} | arguments))
