"""Flow matching: its schedule, models that predict v = n - x, and every sampler on both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import (
    Evaluation,
    Guide,
    Schedule,
    Shift,
    ancestral_sample,
    bdia_invert,
    bdia_sample,
    ddim_invert,
    ddim_sample,
    edict_invert,
    edict_sample,
    edm_invert,
    edm_sample,
    flow_schedule,
    obelm_invert,
    obelm_sample,
    vp_schedule,
)
from bicm_diffusion.inverse import dps_sample
from bicm_diffusion.schedules import to_ve

#: Data of one Gaussian: mean and deviation.
MEAN, SPREAD = 0.5, 0.3


def velocity(z: Tensor, times: Tensor) -> Tensor:
    """E[n - x | z] where z = (1 - t)·x + t·n."""
    t = times.to(z.dtype).reshape(-1, *[1] * (z.dim() - 1))
    slope = (t - (1 - t) * SPREAD**2) / (t * t + (1 - t) ** 2 * SPREAD**2)
    return slope * (z - (1 - t) * MEAN) - MEAN


def noise_of(velocity: Callable[..., Tensor], schedule: Schedule) -> Callable[..., Tensor]:
    """The noise that a velocity stands for, told by the level whose time a model is told."""

    def model(z: Tensor, times: Tensor) -> Tensor:
        i = min(range(schedule.steps + 1), key=lambda k: abs(schedule.times[k] - float(times[0])))
        alpha, sigma = schedule.alpha[i], schedule.sigma[i]
        return (z + alpha * velocity(z, times)) / (alpha + sigma)

    return model


def latents(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_levels() -> None:
    schedule = flow_schedule(10, shift=3.0)
    assert (schedule.times[0], schedule.times[-1]) == (0.0, 1.0) and schedule.clean
    for i, t in enumerate(schedule.times):
        s = i / 10
        assert t == pytest.approx(3 * s / (1 + 2 * s), rel=1e-15, abs=0.0)
        assert schedule.alpha[i] == 1.0 - t and schedule.sigma[i] == t
    # Flux's form of the same: exp(mu)/(exp(mu) + 1/s - 1).
    mu = 1.15
    shifted = flow_schedule(10, shift=math.exp(mu)).times
    assert shifted[3] == pytest.approx(math.exp(mu) / (math.exp(mu) + (1 / 0.3 - 1)), rel=1e-14)
    with pytest.raises(ValueError, match="shift: expected a positive value, got 0"):
        flow_schedule(4, shift=0.0)
    with pytest.raises(ValueError, match="alpha \\+ sigma = 1 of a flow"):
        Schedule((0.0, 1.0), (1.0, 0.0), (0.0, 0.9), flow=True)
    with pytest.raises(ValueError, match="alpha = 0 at index 4"):
        to_ve(flow_schedule(4))


def test_ddim_is_euler() -> None:
    schedule, z = flow_schedule(7, shift=2.0), latents()
    expected = z
    for i in range(7, 0, -1):
        here, below = schedule.times[i], schedule.times[i - 1]
        expected = expected + (below - here) * velocity(expected, torch.full((2,), here, dtype=torch.float64))
    torch.testing.assert_close(ddim_sample(velocity, z, schedule, prediction="flow"), expected, rtol=1e-14, atol=1e-14)


Run = Callable[..., Any]
SAMPLERS: dict[str, tuple[Run, Run, dict[str, Any]]] = {
    "bdia": (bdia_sample, bdia_invert, {}),
    "bdia, gamma": (bdia_sample, bdia_invert, {"gamma": (3, 4)}),
    "bdia, heun": (bdia_sample, bdia_invert, {"increments": "heun"}),
    "edict": (edict_sample, edict_invert, {"p": (15, 16)}),
    "obelm": (obelm_sample, obelm_invert, {}),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_round_trips(name: str, shift: float, dtype: torch.dtype) -> None:
    sample, invert, options = SAMPLERS[name]
    if name == "obelm" and shift != 1.0:
        options = {"exact": False}  # its factors need intervals of similar width
    schedule = flow_schedule(8, shift=shift)
    start = (latents() * 2**20).round().div(2**20).to(dtype)  # on the grid of integer states
    image = sample(velocity, start, schedule, prediction="flow", **options)
    assert image.z.isfinite().all()
    noise = invert(velocity, image, schedule, prediction="flow", **options)
    if options.get("exact", True):
        assert torch.equal(noise.z, start)
    else:
        torch.testing.assert_close(noise.z, start, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*SAMPLERS, "ddim", "edm"])
@pytest.mark.parametrize(
    "schedule",
    [Schedule([0, 0.2, 0.5, 0.7, 0.9], [1, 0.8, 0.5, 0.3, 0.1], [0, 0.2, 0.5, 0.7, 0.9]), vp_schedule(4)],
    ids=["flow", "vp"],
)
def test_v_stands_for_its_noise(name: str, schedule: Schedule) -> None:
    """A model of n - x leads where the model of the same noise does, on any schedule with some signal."""
    sample, _, options = {**SAMPLERS, "ddim": (ddim_sample, None, {}), "edm": (edm_sample, None, {})}[name]
    z = latents()
    flow = sample(velocity, z, schedule, prediction="flow", **options)
    noise = sample(noise_of(velocity, schedule), z, schedule, prediction="noise", **options)
    ends = [x if isinstance(x, Tensor) else x.z for x in (flow, noise)]
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6 if name != "obelm" else 1e-5)


@pytest.mark.parametrize(("sample", "invert"), [(ddim_sample, ddim_invert), (edm_sample, edm_invert)])
def test_samples_have_the_data_s_moments(sample: Run, invert: Run) -> None:
    """The flow of a Gaussian is known: z_1 = n leads to MEAN + SPREAD·n."""
    z, schedule = latents(), flow_schedule(400)
    image = sample(velocity, z, schedule, prediction="flow")
    torch.testing.assert_close(image, MEAN + SPREAD * z, rtol=0.0, atol=2e-2)
    torch.testing.assert_close(invert(velocity, image, schedule, prediction="flow"), z, rtol=0.0, atol=5e-2)


GUIDED: dict[str, tuple[Run, dict[str, Any]]] = {
    "ddim": (ddim_sample, {}),
    "ancestral": (ancestral_sample, {"eta": 0.0}),
    "edm": (edm_sample, {}),
    "edm invert": (edm_invert, {}),
    **{name: (sample, options) for name, (sample, _, options) in SAMPLERS.items()},
}


@pytest.mark.parametrize("name", GUIDED)
def test_guides_see_the_level_of_the_schedule(name: str) -> None:
    """z = alpha·x + sigma·n at every level, also at alpha = 0, and the denoised sample is z - sigma·v."""
    schedule, levels = flow_schedule(4), set()
    sample, options = GUIDED[name]

    def guide(at: Evaluation) -> None:
        levels.add((at.time, at.alpha, at.sigma))
        torch.testing.assert_close(at.x0, at.z - at.sigma * at.output)

    sample(velocity, latents(), schedule, prediction="flow", guide=guide, **options)
    assert levels == set(zip(schedule.times[1:], schedule.alpha[1:], schedule.sigma[1:], strict=True))


def test_a_shift_by_alpha_is_the_same_with_and_without_signal_left() -> None:
    """A flow from alpha = 1e-9 takes its steps in other variables than one from alpha = 0."""
    times = tuple(i / 4 * (1.0 - 1e-9) for i in range(5))
    almost = Schedule(times, tuple(1.0 - t for t in times), times, flow=True)
    ends = [
        ddim_sample(velocity, latents(), schedule, prediction="flow", guide=lambda at: Shift(at.z, 0.1 * at.alpha))
        for schedule in (flow_schedule(4), almost)
    ]
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)
    assert (ends[0] - ddim_sample(velocity, latents(), flow_schedule(4), prediction="flow")).abs().max() > 1e-2


def test_what_needs_signal_says_so() -> None:
    z, schedule = latents(), flow_schedule(4)
    for prediction in ("noise", "v", "x0"):
        with pytest.raises(ValueError, match=f"alpha > 0 for prediction='{prediction}', got alpha = 0 at index 4"):
            ddim_sample(velocity, z, schedule, prediction=prediction)
    with pytest.raises(ValueError, match="churn: expected a schedule with alpha = 1"):
        edm_sample(velocity, z, schedule, prediction="flow", churn=1.0, seed=0)
    with pytest.raises(ValueError, match="alpha > 0 where noise is added"):
        ancestral_sample(velocity, z, schedule, prediction="flow")
    without = ancestral_sample(velocity, z, schedule, prediction="flow", eta=0.0)
    torch.testing.assert_close(without, ddim_sample(velocity, z, schedule, prediction="flow"))
    with pytest.raises(ValueError, match="fresh noise is added"):
        dps_sample(velocity, z, schedule, prediction="flow", operator=lambda x: x, y=z)


@pytest.mark.parametrize("guide", [None, lambda at: Shift(at.z, 0.1 * at.alpha)], ids=["plain", "guided"])
def test_loops_trace(guide: Guide | None) -> None:
    z = latents(torch.float32)
    torch.compiler.reset()

    def sample(x: Tensor, schedule: Schedule) -> Tensor:
        return ddim_sample(velocity, x, schedule, prediction="flow", guide=guide)

    compiled = torch.compile(sample, fullgraph=True, backend="eager")
    schedule = flow_schedule(5)
    torch.testing.assert_close(compiled(z, schedule), sample(z, schedule), rtol=1e-6, atol=1e-6)
