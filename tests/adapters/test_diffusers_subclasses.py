"""A user's subclass of an accelerated class: it stays one when it is copied, and its methods are not passed over."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from bicm_diffusion.adapters.diffusers import accelerate_scheduler, accelerated_class, is_accelerated
from bicm_diffusion.adapters.diffusers.hooks import hooks
from tests.support.diffusers_cases import CLASSES

Base: Any = accelerated_class(DDIMScheduler)


class Spaced(Base):  # type: ignore[misc]
    """A subclass with timesteps of its own, which are read from its attributes."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = torch.tensor([900, 500, 100, 20][:num_inference_steps])


class Noisier(Base):  # type: ignore[misc]
    def _get_variance(self, timestep: Any, prev_timestep: Any) -> Any:
        return 4 * super()._get_variance(timestep, prev_timestep)


class OriginalNoisier(DDIMScheduler):
    def _get_variance(self, timestep: Any, prev_timestep: Any) -> Any:
        return 4 * super()._get_variance(timestep, prev_timestep)


def step(scheduler: Any, **arguments: Any) -> Tensor:
    x, output = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    result: Tensor = scheduler.step(output, scheduler.timesteps[1], x, **arguments).prev_sample
    return result


def noisy_step(scheduler: Any) -> Tensor:
    return step(scheduler, eta=0.3, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        *(lambda x, p=p: pickle.loads(pickle.dumps(x, p)) for p in range(6)),
        accelerate_scheduler,
    ],
)
def test_a_copy_is_of_the_same_class(copied: Any) -> None:
    scheduler = Spaced()
    scheduler.set_timesteps(4)
    again = copied(scheduler)
    assert type(again) is Spaced and is_accelerated(again)
    assert torch.equal(step(again), step(scheduler))
    again.set_timesteps(3)
    assert again.timesteps.tolist() == [900, 500, 100]
    plain = copied(accelerate_scheduler(DDIMScheduler()))
    assert type(plain) is Base


def test_an_overridden_method_runs() -> None:
    with pytest.warns(UserWarning, match="Noisier: an own _get_variance is not accelerated, the original step runs"):
        scheduler = set_up(Noisier())
    original = OriginalNoisier()
    original.set_timesteps(5)
    assert not is_accelerated(scheduler)
    assert "original step: an own _get_variance" in repr(scheduler)
    assert torch.equal(noisy_step(scheduler), noisy_step(original))
    assert not torch.equal(noisy_step(scheduler), noisy_step(accelerate_scheduler(set_up(DDIMScheduler()))))


def set_up(scheduler: Any) -> Any:
    scheduler.set_timesteps(5)
    return scheduler


@pytest.mark.filterwarnings("ignore:.*original step runs")
@pytest.mark.parametrize("when", ["before", "afterwards"])
def test_a_method_that_is_set_on_a_scheduler_runs(when: str) -> None:
    """Before it is accelerated or between its steps, and until it is removed again."""
    original = set_up(DPMSolverMultistepScheduler())
    ours = original
    if when == "afterwards":
        ours = accelerate_scheduler(original)
        step(ours)
        assert is_accelerated(ours)

    def nothing(model_output: Tensor, *args: Any, sample: Any = None, **kwargs: Any) -> Tensor:
        return 0.0 * model_output

    original = set_up(DPMSolverMultistepScheduler())
    original.convert_model_output = nothing
    if when == "before":
        ours = accelerate_scheduler(original)
    else:
        ours.convert_model_output = nothing
    ours.set_timesteps(5)
    original.set_timesteps(5)
    assert not is_accelerated(ours)
    assert torch.equal(step(ours), step(original))
    del ours.convert_model_output
    assert is_accelerated(ours)


def test_a_method_that_is_set_in_the_middle_of_a_loop_runs() -> None:
    original, ours = set_up(DDIMScheduler()), accelerate_scheduler(set_up(DDIMScheduler()))
    torch.testing.assert_close(noisy_step(ours), noisy_step(original), rtol=1e-5, atol=1e-5)
    for scheduler in (original, ours):
        scheduler._get_variance = lambda timestep, prev_timestep: torch.tensor(0.5)
    with pytest.warns(UserWarning, match="an own _get_variance"):
        assert torch.equal(noisy_step(ours), noisy_step(original))


class Counting(Base):  # type: ignore[misc]
    """A subclass whose step calls the accelerated one."""

    taken = 0

    def step(self, *args: Any, **kwargs: Any) -> Any:
        self.taken += 1
        return super().step(*args, **kwargs)


def test_an_own_step_may_call_the_accelerated_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = set_up(Counting())
        step(scheduler)
    assert is_accelerated(scheduler)
    assert scheduler.taken == 1


def test_methods_that_a_step_calls_are_found() -> None:
    found = {cls: hooks(cls, accelerated_class(cls)) for cls in CLASSES}
    assert found[DDIMScheduler] == ("_get_variance", "_threshold_sample")
    assert {"convert_model_output", "dpm_solver_first_order_update"} <= {*found[DPMSolverMultistepScheduler]}
    assert found[EulerDiscreteScheduler] == ("index_for_timestep",)
    for names in found.values():
        assert not {"step", "set_timesteps", "add_noise", "_init_step_index"} & {*names}
