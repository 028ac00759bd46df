"""Steps with log-probabilities on accelerated schedulers: the formulas that trainers use, and a ratio of exactly 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from bicm_diffusion.adapters.diffusers import accelerate_scheduler
from tests.support.tensors import BF16, F16, F32, F64, random

SHAPE = (3, 4, 8, 8)
SCHEDULERS: dict[str, Callable[..., Any]] = {
    "flow": lambda **more: made(FlowMatchEulerDiscreteScheduler(shift=3.0), **more),
    "ddim": lambda **more: made(DDIMScheduler(clip_sample=False), **more),
    "ddim clipped": lambda **more: made(DDIMScheduler(clip_sample=True), **more),
    "ddpm": lambda **more: made(DDPMScheduler(clip_sample=False), **more),
    "ddpm clipped": lambda **more: made(DDPMScheduler(clip_sample=True), **more),
}


def made(scheduler: Any, **more: Any) -> Any:
    accelerated = accelerate_scheduler(scheduler, **more)
    accelerated.set_timesteps(10)
    return accelerated


def options(name: str) -> dict[str, Any]:
    return {"eta": 0.8} if name.startswith("ddim") else {}


def states(dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    return random(*SHAPE, dtype=dtype), random(*SHAPE, dtype=dtype, seed=1)


def density(after: Tensor, mean: Tensor, std: Any) -> Tensor:
    std = torch.as_tensor(std, dtype=F64).expand(len(mean)).reshape(-1, 1, 1, 1)
    std = torch.where(std == 0, 1.0, std)  # a step without noise has no density
    return torch.distributions.Normal(mean.double(), std).log_prob(after.double()).flatten(1).mean(1)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_flow_matching(per_sample: bool, sde_type: str, dtype: torch.dtype) -> None:
    """Flow-GRPO's and CPS's update, its mean and deviation, with the noise that torch draws."""
    scheduler = SCHEDULERS["flow"]()
    x, v = states(dtype)
    picked = [0, 4, 8] if per_sample else [4] * 3
    here, below = (scheduler.sigmas.double()[[i + k for i in picked]].reshape(-1, 1, 1, 1) for k in (0, 1))
    second, step = scheduler.sigmas[1].double(), below - here
    wide_x, wide_v = x.double(), v.double()
    if sde_type == "sde":
        told = 0.7 * (here / (1 - torch.where(here == 1, second, here))).sqrt()
        mean = wide_x * (1 + told**2 / (2 * here) * step) + wide_v * (1 + told**2 * (1 - here) / (2 * here)) * step
        std = told * (-step).sqrt()
    else:
        told = std = below * math.sin(0.35 * math.pi)
        clean, noise = wide_x - here * wide_v, wide_x + (1 - here) * wide_v
        mean = (1 - below) * clean + (below**2 - std**2).sqrt() * noise
    timestep = scheduler.timesteps[picked] if per_sample else scheduler.timesteps[4]
    after, log_prob, ours, deviation, root = scheduler.step_with_log_prob(
        v, timestep, x, generator=torch.Generator().manual_seed(3), sde_type=sde_type, return_sqrt_dt=True
    )
    drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    assert after.dtype == ours.dtype == log_prob.dtype == F32
    torch.testing.assert_close(ours.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.double(), mean + std * drawn.double(), rtol=1e-5, atol=2e-6)
    assert deviation.shape == root.shape == ((3, 1, 1, 1) if per_sample else (1, 1, 1, 1))
    torch.testing.assert_close(deviation.double().expand(3, 1, 1, 1), told.expand(3, 1, 1, 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(root.double().expand(3, 1, 1, 1), (-step).sqrt().expand(3, 1, 1, 1), rtol=1e-6, atol=0)
    squares = ((after.double() - mean) ** 2).flatten(1).mean(1)
    expected = -squares if sde_type == "cps" else density(after, mean, std.flatten())
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim(eta: float, clips: bool, prediction: str) -> None:
    """DDIM eq. 12 and 16, of samples at three timesteps."""
    scheduler = made(DDIMScheduler(clip_sample=clips, prediction_type=prediction))
    x, output = (y.double() for y in states())
    times = scheduler.timesteps[[0, 4, 9]]
    a, below = (scheduler.alphas_cumprod.double()[t].reshape(-1, 1, 1, 1) for t in (times, (times - 100).clamp(min=0)))
    if prediction == "epsilon":
        x0, eps = (x - (1 - a).sqrt() * output) / a.sqrt(), output
    elif prediction == "sample":
        x0, eps = output, (x - a.sqrt() * output) / (1 - a).sqrt()
    else:
        x0, eps = a.sqrt() * x - (1 - a).sqrt() * output, a.sqrt() * output + (1 - a).sqrt() * x
    x0 = x0.clamp(-1, 1) if clips else x0
    std = eta * ((1 - below) / (1 - a) * (1 - a / below)).sqrt()
    mean = below.sqrt() * x0 + (1 - below - std**2).clamp(min=0).sqrt() * eps
    after, log_prob = scheduler.step_with_log_prob(
        output.float(), times, x.float(), eta=eta, generator=torch.Generator().manual_seed(3)
    )
    drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(after.double(), mean + std * drawn.double(), rtol=1e-4, atol=1e-5)
    wanted = density(mean + std * drawn, mean, std.flatten())
    moving = std.flatten() > 0  # at timestep 0, where DDPO's step stays
    torch.testing.assert_close(log_prob.double()[moving], wanted[moving], rtol=1e-3, atol=1e-3)
    assert not log_prob[~moving].any()


def test_ddpm() -> None:
    """The mean of the scheduler's own step, and its variance."""
    scheduler = SCHEDULERS["ddpm"]()
    x, eps = states()
    for t in scheduler.timesteps[[0, 5]]:
        after, log_prob = scheduler.step_with_log_prob(eps, t, x, generator=torch.Generator().manual_seed(3))
        own = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(3)).prev_sample
        torch.testing.assert_close(after, own, rtol=1e-5, atol=1e-5)
        std = float(scheduler._get_variance(int(t))) ** 0.5
        drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
        wanted = density(drawn.double(), torch.zeros(SHAPE, dtype=F64), 1.0) - math.log(std)
        torch.testing.assert_close(log_prob.double(), wanted, rtol=1e-4, atol=1e-4)
    last = scheduler.step_with_log_prob(eps, scheduler.timesteps[-1], x)
    assert not last[1].any()


@pytest.mark.parametrize("noise", ["generator", "keyed"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_ratio_is_exactly_one(name: str, dtype: torch.dtype, noise: str) -> None:
    """Between a step and its log-probability in training, in a batch of timesteps, and alone."""
    scheduler = SCHEDULERS[name](noise=noise, **({"seed": 5} if noise == "keyed" else {}))
    x, output = states(dtype)
    taken = [scheduler.step_with_log_prob(output, t, x, **options(name))[:2] for t in scheduler.timesteps[[1, 4, 7]]]
    leaf = output.clone().requires_grad_()
    for t, (after, old) in zip(scheduler.timesteps[[1, 4, 7]], taken, strict=True):
        new = scheduler.step_with_log_prob(leaf, t, x, prev_sample=after, **options(name))[1]
        assert torch.equal((new - old).exp(), torch.ones(3)) and (old != 0).all()
        (gradient,) = torch.autograd.grad(new.sum(), leaf)
        assert gradient.isfinite().all() and gradient.any()
    after = torch.stack([step[0][k] for k, step in enumerate(taken)])
    old = torch.stack([step[1][k] for k, step in enumerate(taken)])
    times = scheduler.timesteps[[1, 4, 7]]
    new = scheduler.step_with_log_prob(leaf, times, x, prev_sample=after, **options(name))[1]
    assert torch.equal(new.detach(), old)
    one = scheduler.step_with_log_prob(leaf[1:2], times[1], x[1:2], prev_sample=after[1:2], **options(name))[1]
    assert torch.equal(one.detach(), old[1:2])


@pytest.mark.parametrize("noise", ["generator", "keyed"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_ratio_is_exactly_one_of_a_half_and_a_wide_output(name: str, noise: str) -> None:
    """The log-probability is that of the state as it is returned, in the sample's dtype."""
    scheduler = SCHEDULERS[name](noise=noise, **({"seed": 5} if noise == "keyed" else {}))
    x, output = states(F16)[0], states()[1]
    t = scheduler.timesteps[4]
    after, old = scheduler.step_with_log_prob(output, t, x, **options(name))[:2]
    assert after.dtype is (F32 if name == "flow" else F16)
    again, new = scheduler.step_with_log_prob(output, t, x, prev_sample=after, **options(name))[:2]
    assert torch.equal(again, after) and torch.equal(new, old)


def test_a_deviation_for_each_timestep() -> None:
    """A row for each sample where timesteps have a dimension, whether they differ or not."""
    scheduler = SCHEDULERS["flow"]()
    x, v = states()
    times = scheduler.timesteps
    for given, rows in ((times[2], 1), (float(times[2]), 1), (times[[2]], 3), (times[[2] * 3], 3), (times[1:4], 3)):
        about = scheduler.step_with_log_prob(v, given, x, return_sqrt_dt=True)[3:]
        assert [y.shape for y in about] == [(rows, 1, 1, 1)] * 2


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_keyed_noise_does_not_depend_on_the_batch(name: str, several: bool) -> None:
    """Nor where samples stand at timesteps of their own."""
    scheduler = SCHEDULERS[name](noise="keyed", seed=5)
    x, v = states()
    times = scheduler.timesteps[[3, 5, 4] if several else [3, 3, 3]]
    whole = scheduler.step_with_log_prob(v, times, x, **options(name))
    for k in range(3):
        alone = SCHEDULERS[name](noise="keyed", seed=5, sample_id=k)
        part = alone.step_with_log_prob(v[k : k + 1], times[k], x[k : k + 1], **options(name))
        for a, b in zip(whole[:3], part[:3], strict=False):
            assert torch.equal(a[k : k + 1], b)


def test_the_mean_is_differentiable_and_the_step_index_stays() -> None:
    scheduler = SCHEDULERS["flow"]()
    x, v = states()
    leaf = v.requires_grad_()
    _, _, mean, _ = scheduler.step_with_log_prob(leaf, scheduler.timesteps[3], x, prev_sample=x, noise_level=0.0)
    (gradient,) = torch.autograd.grad(mean.sum(), leaf)
    step = float(scheduler.sigmas[4] - scheduler.sigmas[3])
    torch.testing.assert_close(gradient, torch.full_like(v, step), rtol=1e-5, atol=0)
    assert scheduler.step_index is None


def test_wrong_calls() -> None:
    x, v = states()
    flow, ddim, ddpm = (SCHEDULERS[name]() for name in ("flow", "ddim", "ddpm"))
    t = flow.timesteps[3]
    with pytest.raises(ValueError, match="sde_type: expected 'sde' or 'cps', got 'ode'"):
        flow.step_with_log_prob(v, t, x, sde_type="ode")
    with pytest.raises(ValueError, match=r"model_output: expected shape \(3, 4, 8, 8\), as sample has"):
        flow.step_with_log_prob(v[:2], t, x)
    with pytest.raises(ValueError, match="timestep: expected one, or one for each of 3"):
        flow.step_with_log_prob(v, flow.timesteps[:2], x)
    with pytest.raises(ValueError, match="generator: expected None with prev_sample"):
        ddim.step_with_log_prob(v, 901, x, prev_sample=x, generator=torch.Generator())
    with pytest.raises(TypeError, match="prev_sample: expected a tensor"):
        ddpm.step_with_log_prob(v, 900, x, prev_sample=[x])
    with pytest.raises(ValueError, match="thresholding"):
        made(DDIMScheduler(thresholding=True)).step_with_log_prob(v, 900, x)


@pytest.mark.parametrize("name", ["flow", "ddim", "ddpm"])
def test_what_is_no_timestep_of_the_schedule_is_refused(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    x, v = states()
    for wrong in (123.4, 900.4, 5, -1, 1001, math.nan, torch.tensor(123.4), torch.tensor([900, 5, 800])):
        with pytest.raises(ValueError, match=r"timestep: expected timesteps of the schedule, .*, got "):
            scheduler.step_with_log_prob(v, wrong, x)
    for wrong in ([900], None, "900"):
        with pytest.raises(TypeError, match="timestep: expected a number or a tensor, got "):
            scheduler.step_with_log_prob(v, wrong, x)
    with pytest.raises(ValueError, match=r"timestep: expected one, or one for each of 3, got shape \(0,\)"):
        scheduler.step_with_log_prob(v, scheduler.timesteps[:0], x)
    with pytest.raises(ValueError, match=r"timestep: expected one for an empty batch, got shape \(0,\)"):
        scheduler.step_with_log_prob(v[:0], scheduler.timesteps[:0], x[:0])
    assert scheduler.step_with_log_prob(v[:0], scheduler.timesteps[:1], x[:0])[1].shape == (0,)


def test_what_is_no_noise_level_is_refused() -> None:
    scheduler = SCHEDULERS["flow"]()
    x, v = states()
    t = scheduler.timesteps[3]
    for sde_type, wrong, range_of in (
        ("sde", -0.5, "of at least 0"),
        ("sde", math.inf, "of at least 0"),
        ("cps", -0.5, r"in \[0, 1\]"),
        ("cps", 1.5, r"in \[0, 1\]"),
        ("cps", math.nan, r"in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=f"noise_level: expected a number {range_of}, got {wrong}"):
            scheduler.step_with_log_prob(v, t, x, noise_level=wrong, sde_type=sde_type)
    with pytest.raises(TypeError, match="noise_level: expected a number, got 'a'"):
        scheduler.step_with_log_prob(v, t, x, noise_level="a")


def test_what_is_no_eta_is_refused() -> None:
    scheduler = SCHEDULERS["ddim"]()
    x, v = states()
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"eta: expected a number of at least 0, got {wrong}"):
            scheduler.step_with_log_prob(v, 500, x, eta=wrong)
    with pytest.raises(ValueError, match=r"eta: expected one that leaves the direction a variance, .*, got 2\.0"):
        scheduler.step_with_log_prob(v, 500, x, eta=2.0)
    with pytest.raises(TypeError, match="eta: expected a number, got 'a'"):
        scheduler.step_with_log_prob(v, 500, x, eta="a")


def test_levels_that_rise_are_refused() -> None:
    scheduler = made(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    x, v = states()
    for sde_type in ("sde", "cps"):
        with pytest.raises(
            ValueError, match=r"sigmas: expected levels that fall, as without invert_sigmas, got .* after"
        ):
            scheduler.step_with_log_prob(v, scheduler.timesteps[3], x, sde_type=sde_type)
