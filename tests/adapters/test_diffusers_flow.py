"""Flow matching's Euler steps beside the original: a timestep for every token, noise, the options that move levels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import FlowMatchEulerDiscreteScheduler

import bicm_kernels as bk
from bicm_diffusion.adapters.diffusers import accelerate_scheduler
from bicm_diffusion.keys import SCHEDULER
from tests.support.diffusers_cases import exactly, in_float64
from tests.support.diffusers_observed import NEAR, agree, both
from tests.support.diffusers_odd import alike

TOKENS = (2, 5, 8)


def tokens(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A sample of tokens, and a timestep for each: some at a level, some between two, some below all."""
    generator = torch.Generator().manual_seed(0)
    times = torch.tensor([[1000.0, 830.0, 500.0, 3.0, 0.0], [700.0, 700.5, 667.0, 1.0, 999.0]])
    return torch.randn(TOKENS, generator=generator).to(dtype), times


@pytest.mark.parametrize("times_dtype", [torch.float32, torch.float64, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_timestep_for_every_token(stochastic: bool, dtype: torch.dtype, times_dtype: torch.dtype) -> None:
    x, times = tokens(dtype)
    times = times.to(times_dtype)

    def run(scheduler: Any) -> Any:
        for t in scheduler.timesteps[:3]:
            output = torch.tanh(x)
            yield scheduler.step(
                output, t, x, per_token_timesteps=times, generator=torch.Generator().manual_seed(1), return_dict=False
            )[0]

    near = 1e-5 if times_dtype is not torch.float16 else 2e-3
    assert not alike(both(FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": stochastic}), run, near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
def test_tokens_lie_no_further_from_float64_than_twice_the_original_s(stochastic: bool, dtype: torch.dtype) -> None:
    x, times = tokens(dtype)
    original, ours = both(FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": stochastic})
    truth, t = in_float64(original), original.timesteps[1]
    results = []
    for scheduler in (original, ours):
        generator = torch.Generator().manual_seed(1)
        results.append(scheduler.step(torch.tanh(x), t, x, per_token_timesteps=times, generator=generator)[0])
    with exactly(truth, dtype):
        generator = torch.Generator().manual_seed(1)
        wide = torch.tanh(x).double(), t, x.double()
        expected = truth.step(*wide, per_token_timesteps=times.double(), generator=generator)[0]
    theirs, mine = ((r.double() - expected).abs().max().item() for r in results)
    assert mine <= 2 * theirs + 1e-15


def test_tokens_of_other_shapes_run_the_original() -> None:
    x, times = tokens(torch.float32)
    cases = [(x, times[:1]), (x, times[:, :1]), (x[:, :, None], times), (x, times.tolist())]

    def run(sample: Tensor, given: Any) -> Any:
        def one(scheduler: Any) -> Any:
            step = scheduler.step(torch.tanh(sample), scheduler.timesteps[0], sample, per_token_timesteps=given)
            return step.values()

        return one

    for sample, given in cases:
        alike(both(FlowMatchEulerDiscreteScheduler, {}), run(sample, given))


def test_keyed_noise_of_tokens_is_the_library_s_and_a_sample_s_own() -> None:
    x, times = tokens(torch.float32)
    config = {"stochastic_sampling": True}
    ends = []
    for rows in (slice(None), slice(1, 2)):
        ours = accelerate_scheduler(
            FlowMatchEulerDiscreteScheduler(**config), noise="keyed", seed=4, sample_id=rows.start or 0
        )
        ours.set_timesteps(6)
        t = ours.timesteps[2]
        ours.set_begin_index(2)
        zero = torch.zeros_like(x[rows])
        ends.append(ours.step(zero, t, zero, per_token_timesteps=times[rows]).prev_sample)
    assert torch.equal(ends[0][1:], ends[1])
    noise = bk.normal(x.shape, seed=bk.fold_in(4, SCHEDULER), step=2)
    assert torch.corrcoef(torch.stack([ends[0][0, 0], noise[0, 0]]))[0, 1] > 0.999


def without_count(timesteps: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in timesteps.items() if name != "num_inference_steps"}


@pytest.mark.parametrize(
    "timesteps",
    [
        {"sigmas": [1.0, 0.6, 0.2]},
        {"timesteps": [900.0, 400.0, 100.0]},
        {"timesteps": [900.0, 400.0, 100.0], "sigmas": [1.0, 0.6, 0.2]},
        {"num_inference_steps": 3, "sigmas": [1.0, 0.6, 0.2]},
    ],
)
@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"invert_sigmas": True}])
def test_levels_of_the_caller(config: dict[str, Any], timesteps: dict[str, Any]) -> None:
    agree(
        *both(FlowMatchEulerDiscreteScheduler, config, timesteps.get("num_inference_steps"), **without_count(timesteps))
    )


def test_set_shift_is_heeded() -> None:
    schedulers = both(FlowMatchEulerDiscreteScheduler, {})
    for scheduler in schedulers:
        scheduler.set_shift(5.0)
        scheduler.set_timesteps(4)
    agree(*schedulers)


def test_scaled_noise_is_the_original_s() -> None:
    original, ours = both(FlowMatchEulerDiscreteScheduler, {})
    x, noise = torch.ones(3, 2), torch.full((3, 2), 0.5)
    for begin in (None, 2):
        for scheduler in (original, ours):
            if begin is not None:
                scheduler.set_begin_index(begin)
        t = original.timesteps[1:4]
        assert torch.equal(ours.scale_noise(x, t, noise), original.scale_noise(x, t, noise))


def test_pipelines_that_ask_for_the_type_see_a_subclass() -> None:
    _, ours = both(FlowMatchEulerDiscreteScheduler, {})
    assert isinstance(ours, FlowMatchEulerDiscreteScheduler) and type(ours) is not FlowMatchEulerDiscreteScheduler
    assert type(ours).__name__ == "FlowMatchEulerDiscreteScheduler"
