"""Whether a scheduler is accelerated can be seen; schedulers without an accelerated form may pass."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler

from bicm_diffusion.adapters.diffusers import BDIADDIMScheduler, accelerate_scheduler, is_accelerated
from tests.support.diffusers_cases import CLASSES


class OwnScheduler(DDIMScheduler):
    """A user's subclass, whose step may be another."""


@pytest.mark.parametrize("cls", CLASSES)
def test_acceleration_can_be_seen(cls: type[Any]) -> None:
    original = cls()
    ours = accelerate_scheduler(original)
    assert not is_accelerated(original)
    assert is_accelerated(ours)
    assert repr(ours) == repr(original).replace(cls.__name__, f"{cls.__name__} (accelerated)", 1)
    ours.set_timesteps(4)
    assert is_accelerated(ours)
    assert "(accelerated, keyed noise)" in repr(accelerate_scheduler(original, noise="keyed"))


@pytest.mark.parametrize("scheduler", [BDIADDIMScheduler(), HeunDiscreteScheduler(), None, 3, DDIMScheduler])
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


@pytest.mark.parametrize("cls", [HeunDiscreteScheduler, PNDMScheduler, OwnScheduler])
def test_what_is_not_covered_passes_where_that_is_wanted(cls: type[Any]) -> None:
    scheduler = cls()
    with pytest.raises(TypeError, match=f"scheduler must be one of .*got {cls.__name__}"):
        accelerate_scheduler(scheduler)
    with pytest.warns(UserWarning, match=f"{cls.__name__} has no accelerated form.*returned as it is") as caught:
        assert accelerate_scheduler(scheduler, strict=False) is scheduler
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="noise, seed: ignored"):
        accelerate_scheduler(scheduler, strict=False, noise="keyed", seed=3)


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_covered_is_accelerated_all_the_same(cls: type[Any]) -> None:
    original = cls()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = accelerate_scheduler(original, strict=False)
        again = accelerate_scheduler(ours, strict=False)
    assert is_accelerated(ours)
    assert is_accelerated(again)


@pytest.mark.parametrize("scheduler", [None, "ddim", DDIMScheduler])
def test_what_is_no_scheduler_is_refused_even_so(scheduler: Any) -> None:
    for strict in (True, False):
        with pytest.raises(TypeError, match="scheduler must be one of"):
            accelerate_scheduler(scheduler, strict=strict)
