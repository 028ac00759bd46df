"""What every sampler keeps to: its batch, its options, its callback, its input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bicm_diffusion import (
    ExactPair,
    Preconditioned,
    StepInfo,
    bdia_edit,
    bdia_invert,
    bdia_sample,
    ddim_invert,
    ddim_sample,
    edict_invert,
    edict_sample,
    edm_invert,
    edm_sample,
    obelm_invert,
    obelm_sample,
    to_ve,
    vp_schedule,
)
from tests.support.closed_forms import Mixture, noise

Sampler = Callable[..., Any]
TWO_STATES = {
    "bdia_sample": bdia_sample,
    "bdia_invert": bdia_invert,
    "bdia_sample heun": partial(bdia_sample, gamma=0.9, increments="heun"),
    "bdia_invert heun": partial(bdia_invert, gamma=0.9, increments="heun"),
    "bdia_edit": partial(bdia_edit, gamma=0.96, source={}, target={}),
    "edict_sample": edict_sample,
    "edict_invert": edict_invert,
    "edict_sample leapfrog": partial(edict_sample, leapfrog=True),
    "edict_invert leapfrog": partial(edict_invert, leapfrog=True),
    "obelm_sample": obelm_sample,
    "obelm_invert": obelm_invert,
}
SAMPLERS: dict[str, Sampler] = {
    "ddim_sample": ddim_sample,
    "ddim_invert": ddim_invert,
    "edm_sample euler": partial(edm_sample, solver="euler"),
    "edm_sample heun": edm_sample,
    "edm_invert euler": partial(edm_invert, solver="euler"),
    "edm_invert heun": edm_invert,
    **{f"{name} exact": sampler for name, sampler in TWO_STATES.items()},
    **{f"{name} floats": partial(sampler, exact=False) for name, sampler in TWO_STATES.items()},
}
MODEL = Mixture()

each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
pytestmark = [
    pytest.mark.filterwarnings("ignore::bicm_diffusion.InexactInversionWarning"),
    pytest.mark.filterwarnings("ignore::bicm_diffusion.RetraceWarning"),
]


def opened(result: Any) -> tuple[Tensor, ...]:
    """Every tensor of a result that has a row per sample."""
    if isinstance(result, Tensor):
        return (result,)
    if isinstance(result, ExactPair):
        return result.z, result.previous, result.q, result.previous_q, result.info
    return tuple(result)


@each_sampler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_sample_does_not_depend_on_its_batch(sampler: Sampler, dtype: torch.dtype) -> None:
    z, schedule = noise(7, 3, 5, dtype=dtype), vp_schedule(6)
    together, alone = (opened(sampler(MODEL, x, schedule)) for x in (z, z[4:5]))
    assert together[0].dtype == dtype and together[0].shape == z.shape
    for whole, one in zip(together, alone, strict=True):
        assert torch.equal(whole[4:5], one)


@each_sampler
def test_guidance_extrapolates_between_two_predictions(sampler: Sampler) -> None:
    z, schedule, scale = noise(4, 6), vp_schedule(9), 1.75

    def pair(z: Tensor, times: Tensor, shift: float) -> tuple[Tensor, Tensor]:
        return MODEL(z, times), MODEL(z, times) + shift

    def merged(z: Tensor, times: Tensor, shift: float) -> Tensor:
        without, with_label = pair(z, times, shift)
        return without + scale * (with_label - without)

    guided = sampler(pair, z, schedule, guidance_scale=scale, extra_args={"shift": 0.1})
    plain = sampler(merged, z, schedule, extra_args={"shift": 0.1})
    # Integer states differ by units of their grid, which the way up multiplies.
    largest = opened(plain)[0].abs().max().item()
    for got, expected in list(zip(opened(guided), opened(plain), strict=True))[:2]:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-7 * largest)


@each_sampler
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_what_a_model_predicts_makes_no_difference(sampler: Sampler, prediction: str) -> None:
    z, schedule = noise(4, 6), vp_schedule(9)
    other = sampler(partial(MODEL.output, prediction), z, schedule, prediction=prediction)
    plain = sampler(MODEL, z, schedule)
    largest = opened(plain)[0].abs().max().item()
    for got, expected in list(zip(opened(other), opened(plain), strict=True))[:2]:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * largest)


@each_sampler
def test_callback_sees_every_step(sampler: Sampler, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    if name.startswith("bdia_edit"):
        expected = [1, 2, 3, 4, 5, 3, 2, 1, 0]
    else:
        expected = [1, 2, 3, 4, 5] if "invert" in name else [4, 3, 2, 1, 0]
    seen: list[StepInfo] = []

    def model(z: Tensor, times: Tensor) -> Tensor:
        assert times.shape == (2,) and times.dtype == torch.float32 and z.dtype == torch.float32
        return MODEL(z, times)

    end = sampler(model, noise(2, 3, dtype=torch.float32), vp_schedule(5), callback=seen.append, progress=True)
    assert [step.index for step in seen] == expected
    assert all(step.z.shape == (2, 3) and step.z.dtype == torch.float32 for step in seen)
    torch.testing.assert_close(seen[-1].z, opened(end)[0], rtol=1e-6, atol=1e-6)


@each_sampler
def test_samplers_run_without_gradients_and_leave_their_input_alone(sampler: Sampler) -> None:
    z = noise(2, 3).requires_grad_()
    before = z.detach().clone()
    end = opened(sampler(MODEL, z, vp_schedule(4)))
    assert not end[0].requires_grad
    assert torch.equal(z.detach(), before)


@each_sampler
def test_an_empty_batch_and_a_single_step_work(sampler: Sampler) -> None:
    assert opened(sampler(MODEL, noise(0, 3), vp_schedule(3)))[0].shape == (0, 3)
    assert opened(sampler(MODEL, noise(2, 3), vp_schedule(1)))[0].isfinite().all()


@each_sampler
def test_wrong_options_are_named(sampler: Sampler) -> None:
    with pytest.raises(
        ValueError, match=r"prediction: expected 'noise', 'epsilon', 'v', 'x0', 'flow' or a Preconditioned, got 'eps'"
    ):
        sampler(MODEL, noise(2, 3), vp_schedule(2), prediction="eps")
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidance'"):
        sampler(MODEL, noise(2, 3), vp_schedule(2), guidance=2.0)


class Launches(TorchDispatchMode):
    """Counts the fused ops of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "bicm_kernels"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "raw", "launches"),
    [
        ("ddim_sample", False, 5),
        ("ddim_sample", True, 1 + 5),  # the first input is scaled on its own
        ("ddim_invert", True, 1 + 5),
        ("edm_sample heun", False, 9),
        ("edm_sample heun", True, 1 + 9),
        ("bdia_sample floats", True, 2 + 5),
        ("bdia_invert floats", False, 5),
        ("obelm_sample floats", False, 5),
        ("edict_sample floats", True, 1 + 10),
        ("edict_invert floats", False, 1 + 10),
        ("edict_sample leapfrog floats", True, 1 + 10),
        ("edict_invert leapfrog floats", True, 1 + 10),
        ("edm_invert heun", False, 9),
        ("edm_invert heun", True, 1 + 9),
    ],
)
def test_one_launch_for_each_evaluation(name: str, raw: bool, launches: int) -> None:
    z, schedule = noise(2, 3), vp_schedule(5)
    prediction = Preconditioned() if raw else "noise"
    with Launches() as counter:
        SAMPLERS[name](lambda z, times: z, z, schedule, prediction=prediction)
    assert counter.count == launches


@pytest.mark.parametrize("name", ["bdia", "obelm", "edict"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_way_back_needs_both_states(name: str, exact: bool) -> None:
    sample, invert = SAMPLERS[f"{name}_sample exact"], SAMPLERS[f"{name}_invert exact"]
    z, schedule = noise(4, 6), vp_schedule(20)
    pair = sample(MODEL, z, schedule, exact=exact)
    both, alone = (invert(MODEL, start, schedule, exact=exact).z for start in (pair, pair.z))
    assert (both - z).abs().max() < 1e-7 < 1e-4 < (alone - z).abs().max()


@pytest.mark.parametrize("name", ["ddim_sample", "edm_sample heun", "obelm_sample exact", "obelm_sample floats"])
def test_the_form_of_the_schedule_makes_no_difference(name: str) -> None:
    """These methods work on z/alpha; BDIA's eq. 24 weighs z itself, and the others ask about a state one index off."""
    z, schedule = noise(3, 4), vp_schedule(12, final_time=0.02)
    levels = dict(zip(schedule.times, schedule.alpha, strict=True))

    def model(z: Tensor, times: Tensor) -> Tensor:
        return MODEL(z * levels[times[0].item()], times)

    end = opened(SAMPLERS[name](MODEL, z, schedule))[0]
    ve_end = opened(SAMPLERS[name](model, z / schedule.alpha[-1], to_ve(schedule)))[0] * schedule.alpha[0]
    torch.testing.assert_close(ve_end, end, rtol=1e-7, atol=1e-7)
