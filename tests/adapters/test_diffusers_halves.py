"""Steps in two halves: what the first one leaves, where the caller writes to it or goes on with another scheduler."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import (
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
)

from bicm_diffusion.adapters.diffusers import accelerate_scheduler
from tests.support.diffusers_cases import model_input
from tests.support.diffusers_observed import both, label

pytestmark = pytest.mark.filterwarnings("ignore")

CASES: list[tuple[type[Any], dict[str, Any]]] = [
    (HeunDiscreteScheduler, {}),
    (HeunDiscreteScheduler, {"prediction_type": "sample"}),
    (HeunDiscreteScheduler, {"prediction_type": "v_prediction", "clip_sample": True}),
    (FlowMatchHeunDiscreteScheduler, {"shift": 3.0}),
]
EACH = pytest.mark.parametrize(("cls", "config"), CASES, ids=label)
SHAPE = (2, 3, 6, 6)


def begin(scheduler: Any) -> tuple[Tensor, Tensor, Any]:
    """A sample, the network's output for it, and what the first half makes of them."""
    generator = torch.Generator().manual_seed(0)
    x = 3.0 * torch.randn(SHAPE, generator=generator)
    t = scheduler.timesteps[0]
    output = torch.tanh(model_input(scheduler, x, t))
    return x, output, scheduler.step(output, t, x)


def end(scheduler: Any, x: Tensor) -> Tensor:
    t = scheduler.timesteps[1]
    return scheduler.step(torch.tanh(model_input(scheduler, x, t)), t, x).prev_sample


WRITES: dict[str, Callable[[Tensor, Tensor, Any], object]] = {
    "nothing": lambda x, output, result: None,
    "the sample": lambda x, output, result: x.mul_(0.5),
    "the output": lambda x, output, result: output.mul_(0.5),
    "the result": lambda x, output, result: result.prev_sample.mul_(0.5),
    "x0": lambda x, output, result: result.pred_original_sample.mul_(0.5),
}


@pytest.mark.parametrize("write", WRITES)
@EACH
def test_what_is_written_between_the_halves_is_seen(cls: type[Any], config: dict[str, Any], write: str) -> None:
    if config.get("prediction_type") == "sample" and write in ("the output", "x0"):
        pytest.skip("they are one tensor")
    if cls is FlowMatchHeunDiscreteScheduler and write == "x0":
        pytest.skip("it returns none")
    ends = []
    for scheduler in both(cls, config):
        x, output, result = begin(scheduler)
        WRITES[write](x, output, result)
        ends.append(end(scheduler, result.prev_sample))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)


@EACH
def test_the_slope_is_the_original_s(cls: type[Any], config: dict[str, Any]) -> None:
    original, ours = both(cls, config)
    for scheduler in (original, ours):
        begin(scheduler)
    torch.testing.assert_close(ours.prev_derivative, original.prev_derivative, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.dt, original.dt)
    torch.testing.assert_close(ours.sample, original.sample)
    assert ours.state_in_first_order is original.state_in_first_order is False


def test_a_slope_that_is_lost_is_told_and_one_of_its_own_is_kept() -> None:
    for foresee in (None, False):
        original, ours = both(HeunDiscreteScheduler, {})
        ours = accelerate_scheduler(ours, foresee=foresee)
        ends = []
        for scheduler in (original, ours):
            x, _, result = begin(scheduler)
            x.mul_(0.5)
            result.prev_sample.mul_(0.5)
            if foresee is None and scheduler is ours:
                with pytest.raises(RuntimeError, match=r"prev_derivative: expected .*foresee=False\) stores the slope"):
                    end(scheduler, result.prev_sample)
            else:
                ends.append(end(scheduler, result.prev_sample))
        if foresee is False:
            torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)


ALL = [*CASES, (KDPM2DiscreteScheduler, {}), (KDPM2AncestralDiscreteScheduler, {})]


@pytest.mark.parametrize("way", ["accelerated", "copied", "pickled", "inference", "gradients"])
@pytest.mark.parametrize(("cls", "config"), ALL, ids=label)
def test_a_step_is_ended_by_another_scheduler(cls: type[Any], config: dict[str, Any], way: str) -> None:
    """The original's first half, a copy's second one; halves under inference mode and with gradients."""
    original, ours = both(cls, config)
    expected = begin(original)[2].prev_sample
    if way == "accelerated":
        ours = accelerate_scheduler(copy.deepcopy(original))
        result = expected
    elif way == "inference":
        with torch.inference_mode():
            result = begin(ours)[2].prev_sample
    elif way == "gradients":
        x, output, _ = begin(copy.deepcopy(ours))
        result = ours.step(output.requires_grad_(), ours.timesteps[0], x).prev_sample
        assert result.requires_grad
    else:
        result = begin(ours)[2].prev_sample
        ours = copy.deepcopy(ours) if way == "copied" else pickle.loads(pickle.dumps(ours))
    torch.manual_seed(0)
    truth = end(original, expected)
    torch.manual_seed(0)
    with torch.inference_mode(way == "inference"):
        mine = end(ours, result)
    torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-4)


@EACH
def test_a_new_run_holds_nothing_of_the_last(cls: type[Any], config: dict[str, Any]) -> None:
    scheduler = accelerate_scheduler(cls(**config))
    scheduler.set_timesteps(4)
    x, output, made = begin(scheduler)
    refs = [weakref.ref(output), weakref.ref(made.prev_sample)]  # the original keeps the sample itself
    del x, output, made
    scheduler.set_timesteps(4)
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
