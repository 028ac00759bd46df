"""The samplers on a Gaussian, whose noise prediction and exact flow are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bicm_diffusion import (
    Schedule,
    StatePair,
    StepInfo,
    bdia_invert,
    bdia_sample,
    ddim_invert,
    ddim_sample,
    vp_alpha_sigma,
    vp_schedule,
)

DATA_STD = 0.7
END = 0.02


def variance(times: Tensor) -> Tensor:
    alpha, sigma = vp_alpha_sigma(times.double())
    return alpha**2 * DATA_STD**2 + sigma**2


def gaussian_model(z: Tensor, times: Tensor, **_: object) -> Tensor:
    """E[n | z] for x ~ N(0, DATA_STD²); every element on its own, so it is batch-invariant."""
    _, sigma = vp_alpha_sigma(times.double())
    weight = (sigma / variance(times)).to(z.dtype if z.dtype == torch.float64 else torch.float32)
    return weight.reshape(-1, *[1] * (z.dim() - 1)) * z


def gaussian_flow(z: Tensor, start: float, stop: float) -> Tensor:
    ends = variance(torch.tensor([start, stop], dtype=torch.float64))
    return z * (ends[1] / ends[0]).sqrt()


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def measured_order(gamma: float | None) -> float:
    """The slope of log error over log N, as the finest grids show it; gamma=None is DDIM."""
    z = torch.ones(1, 1, dtype=torch.float64)
    exact = gaussian_flow(z, 1.0, END)
    errors = []
    for steps in (160, 320, 640):
        schedule = vp_schedule(steps, final_time=END)
        if gamma is None:
            end = ddim_sample(gaussian_model, z, schedule)
        else:
            end = bdia_sample(gaussian_model, z, schedule, gamma=gamma).z
        errors.append((end - exact).abs().item())
    return math.log2(errors[0] / errors[2]) / 2


@pytest.mark.parametrize(("gamma", "order"), [(None, 1.0), (0.5, 1.0), (1.0, 2.0)])
def test_convergence_order(gamma: float | None, order: float) -> None:
    assert measured_order(gamma) == pytest.approx(order, abs=0.15)


def test_error_shrinks_with_gamma_as_one_minus_over_one_plus() -> None:
    z, schedule = torch.ones(1, 1, dtype=torch.float64), vp_schedule(2000, final_time=END)
    exact = gaussian_flow(z, 1.0, END)
    ddim = (ddim_sample(gaussian_model, z, schedule) - exact).item()
    half = (bdia_sample(gaussian_model, z, schedule, gamma=0.5).z - exact).item()
    assert half / ddim == pytest.approx(1 / 3, rel=0.02)


def test_ddim_inversion_converges_to_the_flow_and_is_not_exact() -> None:
    x = noise(8, 3)
    schedule = vp_schedule(400, final_time=END)
    latent = ddim_invert(gaussian_model, x, schedule)
    torch.testing.assert_close(latent, gaussian_flow(x, END, 1.0), rtol=0.02, atol=0)
    error = (ddim_sample(gaussian_model, latent, schedule) - x).abs().max().item()
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize(("gamma", "tolerance"), [(1.0, 1e-11), (0.96, 1e-10), (0.9, 1e-8)])
def test_round_trip_from_noise(gamma: float, tolerance: float) -> None:
    z, schedule = noise(8, 3, 4), vp_schedule(50)
    pair = bdia_sample(gaussian_model, z, schedule, gamma=gamma)
    back = bdia_invert(gaussian_model, pair, schedule, gamma=gamma)
    assert (back.z - z).abs().max().item() < tolerance


@pytest.mark.parametrize(("gamma", "tolerance"), [(1.0, 1e-11), (0.96, 1e-10), (0.9, 1e-8)])
def test_round_trip_from_data(gamma: float, tolerance: float) -> None:
    x, schedule = noise(8, 3, 4), vp_schedule(50)
    pair = bdia_invert(gaussian_model, x, schedule, gamma=gamma)
    back = bdia_sample(gaussian_model, pair, schedule, gamma=gamma)
    assert (back.z - x).abs().max().item() < tolerance


def test_round_trip_in_float32_beats_ddim_inversion() -> None:
    x, schedule = noise(8, 3, 4, dtype=torch.float32), vp_schedule(50)
    bdia = bdia_sample(gaussian_model, bdia_invert(gaussian_model, x, schedule), schedule).z
    ddim = ddim_sample(gaussian_model, ddim_invert(gaussian_model, x, schedule), schedule)
    assert (bdia - x).abs().max() < 0.01 * (ddim - x).abs().max()


def test_first_states_of_an_inversion_are_ddim_inversion() -> None:
    x, schedule = noise(4, 3), vp_schedule(10)
    states: dict[int, Tensor] = {}
    bdia_invert(gaussian_model, x, schedule, callback=lambda step: states.update({step.index: step.z}))
    _, sigma = vp_alpha_sigma(torch.tensor(schedule.times[1], dtype=torch.float64))
    eps = gaussian_model(x, torch.full((4,), schedule.times[1], dtype=torch.float64))
    torch.testing.assert_close(states[1], (x - schedule.b[1] * eps) / schedule.a[1], rtol=1e-13, atol=1e-13)
    assert sigma == schedule.sigma[1]


def test_gamma_zero_is_ddim() -> None:
    z, schedule = noise(4, 3, 5), vp_schedule(20)
    ddim = ddim_sample(gaussian_model, z, schedule)
    torch.testing.assert_close(bdia_sample(gaussian_model, z, schedule, gamma=0.0).z, ddim, rtol=0, atol=1e-14)


def test_gamma_may_differ_between_samples() -> None:
    z, schedule = noise(3, 4), vp_schedule(12)
    gammas = torch.tensor([1.0, 0.96, 0.5], dtype=torch.float64)
    together = bdia_sample(gaussian_model, z, schedule, gamma=gammas).z
    alone = [bdia_sample(gaussian_model, z[i : i + 1], schedule, gamma=g).z for i, g in enumerate(gammas.tolist())]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)


@pytest.mark.parametrize("sampler", [ddim_sample, ddim_invert, bdia_sample, bdia_invert])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_sample_does_not_depend_on_its_batch(sampler: object, dtype: torch.dtype) -> None:
    assert callable(sampler)
    z, schedule = noise(7, 3, 5, dtype=dtype), vp_schedule(8)
    together, alone = sampler(gaussian_model, z, schedule), sampler(gaussian_model, z[4:5], schedule)
    if isinstance(together, StatePair):
        together, alone = together.z, alone.z
    assert together.dtype == dtype
    assert torch.equal(together[4:5], alone)


@pytest.mark.parametrize("sampler", [ddim_sample, ddim_invert, bdia_sample, bdia_invert])
def test_guidance_extrapolates_between_two_predictions(sampler: object) -> None:
    assert callable(sampler)
    z, schedule, scale = noise(4, 6), vp_schedule(9), 1.75

    def pair(z: Tensor, times: Tensor, shift: float) -> tuple[Tensor, Tensor]:
        return gaussian_model(z, times), gaussian_model(z, times) + shift

    def merged(z: Tensor, times: Tensor, shift: float) -> Tensor:
        without, with_label = pair(z, times, shift)
        return without + scale * (with_label - without)

    guided = sampler(pair, z, schedule, guidance_scale=scale, extra_args={"shift": 0.1})
    plain = sampler(merged, z, schedule, extra_args={"shift": 0.1})
    for got, expected in zip(*(x if isinstance(x, StatePair) else (x,) for x in (guided, plain)), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("sampler", "indices"),
    [
        (ddim_sample, [4, 3, 2, 1, 0]),
        (bdia_sample, [4, 3, 2, 1, 0]),
        (ddim_invert, [1, 2, 3, 4, 5]),
        (bdia_invert, [1, 2, 3, 4, 5]),
    ],
)
def test_callback_sees_every_step_and_the_model_every_time(sampler: object, indices: list[int]) -> None:
    assert callable(sampler)
    seen: list[StepInfo] = []
    asked: list[float] = []
    schedule = vp_schedule(5)

    def model(z: Tensor, times: Tensor) -> Tensor:
        assert times.shape == (2,) and times.dtype == torch.float32
        asked.append(times[0].item())
        return gaussian_model(z, times)

    sampler(model, noise(2, 3, dtype=torch.float32), schedule, callback=seen.append, progress=True)
    assert [step.index for step in seen] == indices
    assert len(asked) == 5 and min(asked) == pytest.approx(schedule.times[1])


def test_a_pair_saves_one_evaluation() -> None:
    calls = 0

    def model(z: Tensor, times: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return gaussian_model(z, times)

    schedule = vp_schedule(6)
    pair = bdia_invert(model, noise(2, 3), schedule)
    bdia_sample(model, pair, schedule)
    assert calls == 6 + 5


def test_samplers_run_without_gradients_and_leave_their_input_alone() -> None:
    z = noise(2, 3).requires_grad_()
    before = z.detach().clone()
    pair = bdia_sample(gaussian_model, z, vp_schedule(4))
    assert not pair.z.requires_grad
    assert torch.equal(z.detach(), before)


def test_a_single_step_is_ddim_both_ways() -> None:
    z, schedule = noise(2, 3), vp_schedule(1)
    pair = bdia_sample(gaussian_model, z, schedule)
    assert torch.equal(pair.z, ddim_sample(gaussian_model, z, schedule))
    assert torch.equal(bdia_invert(gaussian_model, pair, schedule).z, z)
    assert torch.equal(bdia_invert(gaussian_model, z, schedule).z, ddim_invert(gaussian_model, z, schedule))


def test_mismatched_pair_is_named() -> None:
    with pytest.raises(ValueError, match=r"z: expected a pair of one shape"):
        bdia_invert(gaussian_model, StatePair(noise(2, 3), noise(2, 4)), vp_schedule(4))


def test_schedule_is_variance_preserving_and_ends_on_data() -> None:
    schedule = vp_schedule(100)
    assert schedule.alpha[0] == 1.0 and schedule.sigma[0] == 0.0 and schedule.sigma[100] > 0.9999
    for i in range(1, 101):
        assert schedule.alpha[i] ** 2 + schedule.sigma[i] ** 2 == pytest.approx(1.0, abs=1e-15)
        assert schedule.a[i] * schedule.alpha[i] == pytest.approx(schedule.alpha[i - 1], rel=1e-15)
        assert schedule.b[i] + schedule.a[i] * schedule.sigma[i] == pytest.approx(schedule.sigma[i - 1], rel=1e-14)
    assert math.isnan(schedule.a[0]) and math.isnan(schedule.b[0])


def test_schedule_is_the_limit_of_ddpm() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    ddpm = (1 - betas).cumprod(0).sqrt()[499]
    alpha, _ = vp_alpha_sigma(torch.tensor(0.5, dtype=torch.float64))
    assert alpha.item() == pytest.approx(ddpm.item(), rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"times": (0.0,), "alpha": (1.0,), "sigma": (0.0,)}, "length"),
        ({"times": (0.0, 1.0), "alpha": (1.0, 0.5), "sigma": (0.0,)}, "length"),
        ({"times": (0.0, 1.0), "alpha": (1.0, 0.0), "sigma": (0.0, 1.0)}, "alpha"),
        ({"times": (0.0, 1.0), "alpha": (1.0, 0.5), "sigma": (-0.1, 1.0)}, "sigma"),
        ({"times": (0.0, 1.0), "alpha": (1.0, 1.0), "sigma": (0.5, 0.5)}, "grow"),
        ({"times": (0.0, 1.0), "alpha": (1.0, 0.5), "sigma": (0.0, math.inf)}, "finite"),
    ],
)
def test_bad_schedules_are_refused(arguments: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


@pytest.mark.parametrize(
    ("steps", "final_time", "name"), [(0, 0.0, "steps"), (5, 1.0, "final_time"), (5, -0.1, "final_time")]
)
def test_bad_grids_are_refused(steps: int, final_time: float, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        vp_schedule(steps, final_time=final_time)
