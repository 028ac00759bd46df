"""Whether a scheduler is accelerated can be seen; schedulers without an accelerated form may pass."""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    KDPM2AncestralDiscreteScheduler,
    UNet2DModel,
)

from bicm_diffusion.adapters.diffusers import BDIADDIMScheduler, accelerate_scheduler, is_accelerated
from tests.support.diffusers_cases import CLASSES, made

BLOCKS: Any = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


class OwnScheduler(DDIMScheduler):
    """A user's subclass, whose step may be another."""


@pytest.mark.parametrize("cls", CLASSES)
def test_acceleration_can_be_seen(cls: type[Any]) -> None:
    original = made(cls)
    ours = accelerate_scheduler(original)
    assert not is_accelerated(original)
    assert is_accelerated(ours)
    assert repr(ours) == repr(original).replace(cls.__name__, f"{cls.__name__} (accelerated)", 1)
    ours.set_timesteps(4)
    assert is_accelerated(ours)
    assert "(accelerated, keyed noise)" in repr(accelerate_scheduler(original, noise="keyed"))


@pytest.mark.parametrize("scheduler", [BDIADDIMScheduler(), IPNDMScheduler(), None, 3, DDIMScheduler])
def test_others_are_not_accelerated(scheduler: Any) -> None:
    assert is_accelerated(scheduler) is False


@pytest.mark.filterwarnings("ignore:.*original step runs")
def test_a_configuration_that_is_not_covered_can_be_seen() -> None:
    ours = accelerate_scheduler(DDIMScheduler(thresholding=True))
    assert not is_accelerated(ours)
    assert "(accelerated class, original step: thresholding)" in repr(ours)
    ours = accelerate_scheduler(DPMSolverMultistepScheduler())
    assert is_accelerated(ours)
    ours.config.thresholding = True
    assert not is_accelerated(ours)


@pytest.mark.parametrize("cls", [IPNDMScheduler, OwnScheduler])
def test_what_is_not_covered_passes_where_that_is_wanted(cls: type[Any]) -> None:
    scheduler = cls()
    with pytest.raises(
        TypeError, match=f"^scheduler: {cls.__name__} has no accelerated form; .*strict=False.*; expected one of DDIM"
    ):
        accelerate_scheduler(scheduler)
    with pytest.warns(UserWarning, match=f"{cls.__name__} has no accelerated form.*returned unchanged") as caught:
        assert accelerate_scheduler(scheduler, strict=False) is scheduler
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="noise, seed: ignored"):
        accelerate_scheduler(scheduler, strict=False, noise="keyed", seed=3)
    with pytest.warns(UserWarning, match="noise, seed, sample_id: ignored"):
        accelerate_scheduler(scheduler, strict=False, noise="keyed", seed=0, sample_id=0)
    with pytest.warns(UserWarning, match="seed, sample_id: ignored"):
        accelerate_scheduler(scheduler, strict=False, seed=torch.tensor([1, 2]), sample_id=torch.tensor([0, 1]))


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_covered_is_accelerated_all_the_same(cls: type[Any]) -> None:
    original = made(cls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = accelerate_scheduler(original, strict=False)
        again = accelerate_scheduler(ours, strict=False)
    assert is_accelerated(ours)
    assert is_accelerated(again)


def test_a_pipeline_and_a_class_are_told_what_to_pass() -> None:
    pipeline = DDIMPipeline(UNet2DModel(block_out_channels=(32, 32), **BLOCKS), DDIMScheduler())
    for strict in (True, False):
        with pytest.raises(TypeError, match=r"got a DDIMPipeline: pass pipeline\.scheduler, and put the result"):
            accelerate_scheduler(pipeline, strict=strict)
        with pytest.raises(
            TypeError, match=r"the class DDIMScheduler: pass an instance, .*accelerated_class\(DDIMSched"
        ):
            accelerate_scheduler(DDIMScheduler, strict=strict)
        with pytest.raises(
            TypeError, match=r"the class IPNDMScheduler: pass an instance, IPNDMScheduler\(\.\.\.\); expected"
        ):
            accelerate_scheduler(IPNDMScheduler, strict=strict)


#: What makes a scheduler draw; CogVideoX's DDIM takes a generator and never draws.
DRAWS: dict[type[Any], dict[str, Any]] = {
    DPMSolverMultistepScheduler: {"algorithm_type": "sde-dpmsolver++"},
    DPMSolverSinglestepScheduler: {"algorithm_type": "sde-dpmsolver++"},
    EDMDPMSolverMultistepScheduler: {"algorithm_type": "sde-dpmsolver++"},
    FlowMatchEulerDiscreteScheduler: {"stochastic_sampling": True},
}
#: They draw in the second half of a step.
LATE = (KDPM2AncestralDiscreteScheduler,)


@pytest.mark.parametrize(
    "cls",
    [
        cls
        for cls in CLASSES
        if "generator" in inspect.signature(cls.step).parameters and cls is not CogVideoXDDIMScheduler
    ],
)
def test_fewer_generators_than_samples_are_told_of(cls: type[Any]) -> None:
    scheduler = accelerate_scheduler(cls(**DRAWS.get(cls, {})), noise="keyed")
    x = torch.ones(4, 3, 4, 4)
    for count in (0, 2, 3):
        generators = [torch.Generator().manual_seed(k) for k in range(count)]
        before = [each.get_state() for each in generators]
        scheduler.set_timesteps(4)
        t = scheduler.timesteps[0]
        if cls in LATE:
            x = scheduler.step(scheduler.scale_model_input(x, t), t, x).prev_sample
            t = scheduler.timesteps[1]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        known = inspect.signature(cls.step).parameters
        options = {name: value for name, value in {"s_churn": 2.0, "eta": 1.0}.items() if name in known}
        with pytest.raises(ValueError, match=rf"generator: expected one, .* each of the 4 samples, got {count}$"):
            scheduler.step(x, t, x, generator=generators, **options)
        assert all(torch.equal(each.get_state(), state) for each, state in zip(generators, before, strict=True))


@pytest.mark.parametrize("scheduler", [None, "ddim", DDIMScheduler])
def test_what_is_no_scheduler_is_refused_even_so(scheduler: Any) -> None:
    for strict in (True, False):
        with pytest.raises(TypeError, match=r"^scheduler: got .*; expected one of DDIM"):
            accelerate_scheduler(scheduler, strict=strict)


def test_a_pipeline_is_asked_for_its_scheduler() -> None:
    with pytest.raises(TypeError, match=r"expected a scheduler, got .*; pass its \.scheduler"):
        is_accelerated(SimpleNamespace(scheduler=DDIMScheduler()))
