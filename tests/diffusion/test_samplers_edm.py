"""EDM's samplers against their algorithms as written, and the noise on the way."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import (
    Preconditioned,
    ddim_invert,
    ddim_sample,
    edm_invert,
    edm_sample,
    karras_schedule,
    vp_schedule,
)
from bicm_diffusion.keys import CHURN
from bicm_kernels import fold_in, normal
from tests.support.closed_forms import Mixture, noise, ve_levels

MODEL = Mixture(0.5, 0.8, ve_levels)
SCHEDULE = karras_schedule(12, t_min=0.02, t_max=20.0)


def denoised(x: Tensor, sigma: float) -> Tensor:
    """D(x, sigma) of the mixture."""
    return x - sigma * MODEL(x, torch.full(x.shape[:1], sigma, dtype=torch.float64))


def plain(x: Tensor, *, heun: bool, churn: float = 0.0, churn_range: Any = (0.0, math.inf), churn_noise: float = 1.0,
          seed: int = 0) -> Tensor:  # fmt: skip
    """Algorithm 2 of Karras et al., as it is written; Algorithm 1 is that without churn."""
    count = SCHEDULE.steps
    for i in range(count, 0, -1):
        t, t_next = SCHEDULE.sigma[i], SCHEDULE.sigma[i - 1]
        gamma = min(churn / count, math.sqrt(2) - 1) if churn_range[0] <= t <= churn_range[1] else 0.0
        t_hat = t + gamma * t
        if gamma > 0:
            n = normal(x.shape, seed=fold_in(seed, CHURN), step=i).to(x.dtype)
            x = x + math.sqrt(t_hat**2 - t**2) * churn_noise * n
        d = (x - denoised(x, t_hat)) / t_hat
        following = x + (t_next - t_hat) * d
        if heun and t_next != 0:
            d_next = (following - denoised(following, t_next)) / t_next
            following = x + (t_next - t_hat) * (d + d_next) / 2
        x = following
    return x


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(
    "options", [{}, {"churn": 4.0}, {"churn": 40.0, "churn_range": (0.5, 5.0), "churn_noise": 1.007}], ids=str
)
def test_is_the_algorithm(solver: str, options: dict[str, Any]) -> None:
    z = 20.0 * noise(4, 3)
    expected = plain(z, heun=solver == "heun", seed=5, **options)
    got = edm_sample(MODEL, z, SCHEDULE, solver=solver, seed=5, **options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_euler_is_ddim() -> None:
    z = 20.0 * noise(4, 3)
    assert torch.equal(edm_sample(MODEL, z, SCHEDULE, solver="euler"), ddim_sample(MODEL, z, SCHEDULE))


@pytest.mark.parametrize("options", [{}, {"churn": 4.0, "seed": 1}], ids=str)
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_raw_network_is_asked_with_scaled_inputs(solver: str, options: dict[str, Any]) -> None:
    z, data = 20.0 * noise(4, 3), 0.5

    def raw(scaled: Tensor, times: Tensor) -> Tensor:
        sigma = times[:, None]
        x = scaled * (data**2 + sigma**2).sqrt()
        c_skip = data**2 / (data**2 + sigma**2)
        c_out = data * sigma / (data**2 + sigma**2).sqrt()
        return (x - sigma * MODEL(x, times) - c_skip * x) / c_out

    expected = edm_sample(MODEL, z, SCHEDULE, solver=solver, **options)
    got = edm_sample(raw, z, SCHEDULE, solver=solver, prediction=Preconditioned(sigma_data=data), **options)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_evaluations_are_two_a_step_but_one_to_clean_data() -> None:
    asked: list[float] = []

    def model(z: Tensor, times: Tensor) -> Tensor:
        asked.append(times[0].item())
        return MODEL(z, times)

    edm_sample(model, noise(1, 2), karras_schedule(3, t_min=0.5, t_max=2.0))
    assert len(asked) == 5 and min(asked) == 0.5
    asked.clear()
    edm_sample(model, noise(1, 2), karras_schedule(3, t_min=0.5, t_max=2.0, final_sigma=None))
    assert len(asked) == 6


def test_churned_noise_belongs_to_its_sample() -> None:
    z = 20.0 * noise(7, 3)
    together = edm_sample(MODEL, z, SCHEDULE, churn=20.0, seed=3)
    alone = edm_sample(MODEL, z[4:5], SCHEDULE, churn=20.0, seed=3, sample_id=4)
    assert torch.equal(together[4:5], alone)
    assert not torch.equal(together, edm_sample(MODEL, z, SCHEDULE, churn=20.0, seed=4))


def plain_upwards(x: Tensor, *, heun: bool) -> Tensor:
    """The same run upwards; from sigma = 0 with the noise at the level above."""
    levels = SCHEDULE.sigma
    for t, t_next in pairwise(levels):
        d = (x - denoised(x, t or t_next)) / (t or t_next)
        following = x + (t_next - t) * d
        if heun and t != 0:
            d_next = (following - denoised(following, t_next)) / t_next
            following = x + (t_next - t) * (d + d_next) / 2
        x = following
    return x


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_inversion_is_the_algorithm_run_upwards(solver: str) -> None:
    x = noise(4, 3)
    torch.testing.assert_close(
        edm_invert(MODEL, x, SCHEDULE, solver=solver), plain_upwards(x, heun=solver == "heun"), rtol=1e-12, atol=1e-12
    )


def test_round_trips_of_edm_beat_ddim_inversion_as_published() -> None:
    """Gaussian data and EDM's 18 levels: a mean squared error of some 2e-5 against 0.12."""
    model, schedule, x = Mixture(0.5, 0.0, ve_levels), karras_schedule(18), 0.5 * noise(64, 64)
    for dtype in (torch.float64, torch.float32):
        z = edm_invert(model, x.to(dtype), schedule)
        assert z.dtype == dtype
        heun = (edm_sample(model, z, schedule) - x).square().mean().item()
        ddim = (edm_sample(model, ddim_invert(model, x.to(dtype), schedule), schedule) - x).square().mean().item()
        assert 1e-6 < heun < 5e-5 and 0.05 < ddim < 0.3
    exact = x * ((0.25 + 80.0**2) / 0.25) ** 0.5
    error, ddim_error = (
        ((z - exact) / 80).square().mean().item()
        for z in (edm_invert(model, x, schedule), ddim_invert(model, x, schedule))
    )
    assert error < 3e-3 < 0.3 < ddim_error


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_the_inversion(solver: str, order: int) -> None:
    model, x = Mixture(0.7), noise(32, 4)

    def error(steps: int) -> float:
        schedule = vp_schedule(steps, final_time=0.05)
        ends = [schedule.alpha[i] ** 2 * 0.49 + schedule.sigma[i] ** 2 for i in (0, steps)]
        return (edm_invert(model, x, schedule, solver=solver) - x * (ends[1] / ends[0]) ** 0.5).abs().max().item()

    assert error(40) / error(80) == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("schedule", [vp_schedule(9), vp_schedule(9, final_time=0.02)], ids=["clean", "noisy"])
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_what_a_model_predicts_makes_no_difference_upwards(prediction: str, schedule: Any) -> None:
    model, x = Mixture(0.5, 0.8), noise(4, 6)
    for solver in ("euler", "heun"):
        other = edm_invert(partial(model.output, prediction), x, schedule, solver=solver, prediction=prediction)
        torch.testing.assert_close(other, edm_invert(model, x, schedule, solver=solver), rtol=0, atol=1e-11)


def test_a_raw_network_is_inverted_too() -> None:
    data, x = 0.5, noise(4, 3)

    def raw(scaled: Tensor, times: Tensor) -> Tensor:
        sigma = times[:, None]
        z = scaled * (data**2 + sigma**2).sqrt()
        c_skip, c_out = data**2 / (data**2 + sigma**2), data * sigma / (data**2 + sigma**2).sqrt()
        return (z - sigma * MODEL(z, times) - c_skip * z) / c_out

    got = edm_invert(raw, x, SCHEDULE, prediction=Preconditioned(sigma_data=data))
    torch.testing.assert_close(got, edm_invert(MODEL, x, SCHEDULE), rtol=1e-10, atol=1e-10)


def test_evaluations_upwards_are_two_a_step_but_one_from_clean_data() -> None:
    asked: list[float] = []

    def model(z: Tensor, times: Tensor) -> Tensor:
        asked.append(times[0].item())
        return MODEL(z, times)

    edm_invert(model, noise(1, 2), karras_schedule(3, t_min=0.5, t_max=2.0))
    assert len(asked) == 5 and min(asked) == 0.5
    asked.clear()
    edm_invert(model, noise(1, 2), karras_schedule(3, t_min=0.5, t_max=2.0, final_sigma=None))
    assert len(asked) == 6
    with pytest.raises(ValueError, match="solver: expected 'euler' or 'heun', got 'rk4'"):
        edm_invert(model, noise(1, 2), SCHEDULE, solver="rk4")


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (SCHEDULE, {"solver": "rk4"}, "solver: expected 'euler' or 'heun', got 'rk4'"),
        (SCHEDULE, {"churn": -1.0}, "churn: expected a value of at least 0, got -1.0"),
        (SCHEDULE, {"churn": 1.0}, "seed: expected an int or an int64 tensor"),
        (vp_schedule(4), {"churn": 1.0, "seed": 0}, "churn: expected a schedule with alpha = 1"),
    ],
)
def test_wrong_calls_are_named(schedule: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edm_sample(MODEL, noise(2, 3), schedule, **options)
