"""Writes to tensors of inference mode, which PyTorch does not count, are noticed as others are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from bicm_diffusion.adapters.diffusers import (
    BDIADDIMScheduler,
    BDIAFlowMatchScheduler,
    accelerate_scheduler,
    is_accelerated,
)

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).mul(256).round() / 256  # on the grid
BOTH = (BDIADDIMScheduler, BDIAFlowMatchScheduler)
modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


@modes
@pytest.mark.parametrize("cls", BOTH)
def test_an_edited_exact_state_is_refused(cls: Any, mode: Any) -> None:
    with mode():
        scheduler = cls()
        scheduler.set_timesteps(4)
        t = scheduler.timesteps
        x = scheduler.step(0.5 * X, t[0], X).prev_sample
        x = scheduler.step(0.5 * x, t[1], x).prev_sample
        x.mul_(0.5)
        with pytest.raises(ValueError, match="sample: with exact=True, expected the state that the last step"):
            scheduler.step(0.5 * x, t[2], x)


@pytest.mark.parametrize("cls", BOTH)
def test_an_exact_loop_is_retraced(cls: Any) -> None:
    with torch.inference_mode():
        scheduler = cls()
        scheduler.set_timesteps(4)
        x = X
        for t in scheduler.timesteps:
            x = scheduler.step(0.5 * x, t, x).prev_sample
            assert not x.requires_grad
        x = scheduler.turn_round()
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            x = scheduler.step(0.5 * x, t, x).prev_sample
        assert torch.equal(x, X)


@modes
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (BDIADDIMScheduler, "timesteps"),
        (BDIADDIMScheduler, "alphas_cumprod"),
        (BDIAFlowMatchScheduler, "timesteps"),
        (BDIAFlowMatchScheduler, "sigmas"),
    ],
)
def test_an_edited_schedule_of_a_loop_is_refused(cls: Any, name: str, mode: Any) -> None:
    with mode():
        scheduler = cls()
        scheduler.set_timesteps(4)
        t = scheduler.timesteps[0]
        getattr(scheduler, name).mul_(2)
        with pytest.raises(ValueError, match=f"{name}: expected what set_timesteps made or read, but it was changed"):
            scheduler.step(0.5 * X, t, X)


SOURCES = [
    (EulerDiscreteScheduler, "sigmas"),
    (DDIMScheduler, "alphas_cumprod"),
    (DDIMScheduler, "final_alpha_cumprod"),
    (FlowMatchEulerDiscreteScheduler, "sigmas"),
    (UniPCMultistepScheduler, "sigmas"),
]


def test_views_of_a_schedule_stay_views() -> None:
    """Such as the last level's, which is that of the first row."""
    results, x = [], torch.full((1, 2), 0.25)
    with torch.inference_mode():
        for accelerates in (False, True):
            scheduler: Any = DDIMScheduler(set_alpha_to_one=False)
            scheduler.set_timesteps(4)
            scheduler = accelerate_scheduler(scheduler) if accelerates else scheduler
            scheduler.alphas_cumprod.mul_(0.5)
            results.append(scheduler.step(x, 0, x).prev_sample)
    torch.testing.assert_close(*results)


def test_timesteps_that_a_caller_holds_are_found_by_their_addresses() -> None:
    with torch.inference_mode():
        original = DDIMScheduler()
        original.set_timesteps(4)
        held = original.timesteps
        scheduler: Any = accelerate_scheduler(original)
        scheduler.step(torch.ones(1, 2), held[0], torch.ones(1, 2))
        assert [scheduler._tables.timesteps.at(t) for t in held] == held.tolist()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("cls", "name"), SOURCES)
def test_an_edited_schedule_is_read_again(cls: Any, name: str, before: bool) -> None:
    """Whether timesteps were set before the scheduler was accelerated or afterwards."""
    seen: list[Tensor] = []
    with torch.inference_mode():
        for accelerates in (False, True):
            scheduler = cls()
            if before:
                scheduler.set_timesteps(2)
            scheduler = accelerate_scheduler(scheduler) if accelerates else scheduler
            assert is_accelerated(scheduler) is accelerates
            if not before:
                scheduler.set_timesteps(2)
            x = X
            for k, t in enumerate(scheduler.timesteps):
                inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                if k:
                    getattr(scheduler, name).mul_(0.9)
                x = scheduler.step(0.5 * inputs, t, x).prev_sample
            seen.append(x)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_given_scheduler_keeps_its_tensors() -> None:
    with torch.inference_mode():
        scheduler = EulerDiscreteScheduler()
        scheduler.set_timesteps(3)
        sigmas = scheduler.sigmas
        ours = accelerate_scheduler(scheduler)
        assert scheduler.sigmas is sigmas
        assert ours.sigmas is not sigmas and torch.equal(ours.sigmas, sigmas)
