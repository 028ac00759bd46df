"""Accelerated diffusers schedulers do what the originals do, in all of their configurations and calls."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from bicm_diffusion.adapters.diffusers import accelerated_class
from tests.support.diffusers_cases import CLASSES, model_input
from tests.support.diffusers_observed import NEAR, SHAPE, agree, both, label, observed
from tests.support.diffusers_options import OPTIONS

pytestmark = pytest.mark.filterwarnings("ignore")


def refused(cls: type[Any], config: Mapping[str, Any]) -> bool:
    """Whether the original knows no such configuration; then neither does the accelerated class."""
    try:
        cls(**config)
    except (ValueError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            accelerated_class(cls)(**config)
        return True
    return False


SINGLES = [
    (cls, {name: value})
    for cls, options in OPTIONS.items()
    if cls in CLASSES
    for name, row in options.items()
    for value in row
]


@pytest.mark.parametrize(("cls", "config"), SINGLES, ids=label)
def test_every_option(cls: type[Any], config: dict[str, Any]) -> None:
    if not refused(cls, config):
        agree(*both(cls, config))


NOISE_SOLVERS: list[tuple[type[Any], dict[str, Any]]] = [
    (UniPCMultistepScheduler, {"predict_x0": False}),
    (DPMSolverSinglestepScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    (DEISMultistepScheduler, {}),
]


@pytest.mark.parametrize("flows", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize(("cls", "config"), NOISE_SOLVERS, ids=label)
def test_every_prediction_of_solvers_for_the_noise(
    cls: type[Any], config: dict[str, Any], prediction: str, flows: bool
) -> None:
    """Together with flow sigmas, where alpha² + sigma² is not 1, and with every order."""
    for order in (1, 2, 3):
        together = {**config, "prediction_type": prediction, "use_flow_sigmas": flows, "solver_order": order}
        if not refused(cls, together):
            agree(*both(cls, together, 5))


@st.composite
def runs(draw: st.DrawFn) -> tuple[type[Any], dict[str, Any], dict[str, Any]]:
    cls = draw(st.sampled_from(CLASSES))
    options = OPTIONS[cls]
    names = draw(st.lists(st.sampled_from(sorted(options)), max_size=5, unique=True))
    config = {name: draw(st.sampled_from(options[name])) for name in names}
    floats = st.sampled_from(sorted(NEAR, key=str))
    how: dict[str, Any] = {
        "dtypes": (draw(floats), draw(floats)),
        "return_dict": draw(st.booleans()),
        "scales": draw(st.booleans()),
        "as_number": draw(st.booleans()),
        "start": draw(st.integers(0, 2)) if cls is not DDIMInverseScheduler else 0,
    }
    if cls is DDIMScheduler:
        how["eta"] = draw(st.sampled_from((0.0, 0.5, 1.0)))
        how["use_clipped_model_output"] = draw(st.booleans())
    if cls in (EulerDiscreteScheduler, EDMEulerScheduler):
        how["s_churn"] = draw(st.sampled_from((0.0, 2.0)))
    return cls, config, how


#: The last two levels are one in float32.
STANDS_STILL = {"final_sigmas_type": "sigma_min", "lower_order_final": False}


@pytest.mark.parametrize(
    ("cls", "config", "how"),
    [
        (DDIMScheduler, {"beta_end": 0.2}, {"eta": 1.0}),
        (DDIMScheduler, {"beta_end": 0.2, "prediction_type": "v_prediction"}, {"eta": 1.0, "start": 1}),
        (EDMDPMSolverMultistepScheduler, {**STANDS_STILL, "solver_type": "heun"}, {}),
        (EDMDPMSolverMultistepScheduler, {**STANDS_STILL, "solver_order": 3}, {"start": 1}),
    ],
    ids=label,
)
def test_where_the_original_is_not_a_number(cls: type[Any], config: dict[str, Any], how: dict[str, Any]) -> None:
    """A root of less than nothing, and a step between equal levels: the original's NaN, in the same places."""
    seen = [x for x in observed(both(cls, config, 4)[0], **how) if isinstance(x, torch.Tensor)]
    assert any(x.isnan().any() for x in seen)
    agree(*both(cls, config, 4), **how)


@pytest.mark.slow
@settings(max_examples=120, derandomize=True, deadline=None)
@given(runs())
def test_options_together(run: tuple[type[Any], dict[str, Any], dict[str, Any]]) -> None:
    cls, config, how = run
    if not refused(cls, config):
        agree(*both(cls, config, 4), **how)


@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_timesteps_are_set_again(cls: type[Any]) -> None:
    """In the middle of a loop and after one, to another number and to the same."""
    original, ours = both(cls, {})
    for steps in (5, 5, 4):  # PNDM takes four at least
        agree(original, ours)
        for scheduler in (original, ours):
            scheduler.set_timesteps(steps)
            x = torch.ones(SHAPE)
            model_input(scheduler, x, scheduler.timesteps[0])
            scheduler.step(x, scheduler.timesteps[0], x)
            scheduler.set_timesteps(steps)


@pytest.mark.parametrize(
    ("cls", "timesteps"),
    [
        (EulerDiscreteScheduler, {"timesteps": [900, 500, 100, 3]}),
        (EulerDiscreteScheduler, {"sigmas": [12.0, 3.0, 0.5, 0.0]}),
        (DPMSolverMultistepScheduler, {"timesteps": [900, 500, 100, 3]}),
        (CMStochasticIterativeScheduler, {"timesteps": [22, 10, 0]}),
        (LCMScheduler, {"timesteps": [999, 759, 259, 19]}),
        (LCMScheduler, {"original_inference_steps": 20}),
    ],
    ids=label,
)
def test_timesteps_of_the_caller(cls: type[Any], timesteps: dict[str, Any]) -> None:
    agree(*both(cls, {}, 4 if "original_inference_steps" in timesteps else None, **timesteps))


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (EulerDiscreteScheduler, "timesteps"),
        (EulerDiscreteScheduler, "sigmas"),
        (DPMSolverMultistepScheduler, "timesteps"),
    ],
    ids=label,
)
def test_a_scheduler_s_own_timesteps_change_nothing(cls: type[Any], name: str) -> None:
    _, ours = both(cls, {})
    _, again = both(cls, {}, None, **{name: getattr(ours, name)})
    agree(ours, again)


@pytest.mark.parametrize(
    ("cls", "timesteps"),
    [
        (CMStochasticIterativeScheduler, {"timesteps": [12, 15, 0]}),
        (CMStochasticIterativeScheduler, {"timesteps": [40]}),
        (CMStochasticIterativeScheduler, {"timesteps": [12, 0], "num_inference_steps": 2}),
        (LCMScheduler, {"timesteps": [12, 15, 0]}),
        (LCMScheduler, {"timesteps": [1000]}),
        (LCMScheduler, {"num_inference_steps": 51}),
        (DDIMScheduler, {"num_inference_steps": 1001}),
        (EulerDiscreteScheduler, {}),
    ],
    ids=label,
)
def test_timesteps_that_cannot_be(cls: type[Any], timesteps: dict[str, Any]) -> None:
    told = []
    for scheduler in both(cls, {}, None):
        with pytest.raises((ValueError, TypeError)) as error:
            scheduler.set_timesteps(**timesteps)
        told.append((error.type, str(error.value)))
    assert told[0] == told[1]


@pytest.mark.parametrize("at", ["before set_timesteps", "whole", "unknown", "beyond the end"])
@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_steps_that_cannot_be(cls: type[Any], at: str) -> None:
    """The same error, or the same step, where the original takes one."""
    ends = []
    for scheduler in both(cls, {}, None if at.startswith("before") else 4):
        x = torch.full(SHAPE, 0.5)
        last = None if scheduler.timesteps is None else scheduler.timesteps[-1]  # PNDM's, before they are set
        t = {"whole": 1, "unknown": 998.5}.get(at, last)
        try:
            for _ in range(3):
                torch.manual_seed(0)
                x = scheduler.step(0.1 * model_input(scheduler, x, t), t, x).prev_sample
            ends.append(x)
        except Exception as error:
            ends.append((type(error), str(error) if isinstance(error, ValueError) else ""))
    if isinstance(ends[0], tuple):
        assert ends[1] == ends[0]
    else:
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_configurations_pass_through_files_and_other_schedulers(cls: type[Any], tmp_path: Path) -> None:
    ours = accelerated_class(cls)(num_train_timesteps=100)
    ours.save_config(tmp_path)
    for loader in (cls, type(ours)):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is loader and {**ours.config, **loaded.config} == {**loaded.config, **ours.config}
    original = cls(num_train_timesteps=100)
    assert [c.__name__ for c in ours.compatibles] == [c.__name__ for c in original.compatibles]
    for other in ours.compatibles:
        if not hasattr(other, "_backends"):  # a stand-in for a scheduler whose dependency is missing
            there = other.from_config(ours.config)
            back = type(ours).from_config(there.config).config
            assert {name: back[name] for name in original.config} == dict(original.config)


def test_what_is_set_and_read_on_a_scheduler() -> None:
    for cls in CLASSES:
        ours = accelerated_class(cls)()
        ours.remembered = 5
        ours.register_to_config(written=6)
        assert ours.remembered == 5 and ours.config.written == 6
        with pytest.warns(FutureWarning, match="written"):
            assert ours.written == 6
        with pytest.raises(AttributeError, match=f"'{cls.__name__}' object has no attribute 'missing'"):
            _ = ours.missing
        assert ours._deprecated_kwargs == cls._deprecated_kwargs and ours.order == cls.order


@pytest.mark.parametrize(
    ("cls", "config", "start"),
    [
        # Tables that end before the timesteps do, levels without signal or below float32's range, logarithms of less.
        (LCMScheduler, {"trained_betas": [0.1, 0.3]}, 0),
        (DDIMScheduler, {"beta_end": 0.2, "timestep_spacing": "trailing"}, 0),
        (DDIMInverseScheduler, {"prediction_type": "sample"}, 0),
        (DPMSolverMultistepScheduler, {"use_flow_sigmas": True, "use_karras_sigmas": True}, 0),
        (DDIMScheduler, {"num_train_timesteps": 4, "trained_betas": [0.1, 0.3, 0.5, 0.9]}, 1),
    ],
    ids=label,
)
def test_the_ends_of_tables(cls: type[Any], config: dict[str, Any], start: int) -> None:
    agree(*both(cls, config, 4), start=start)


@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_outputs_are_what_their_class_makes_of_them(cls: type[Any]) -> None:
    _, ours = both(cls, {})
    x = torch.ones(SHAPE)
    t = ours.timesteps[0]
    result = ours.step(model_input(ours, x, t), t, x)
    whole = type(result)(**{field.name: getattr(result, field.name) for field in dataclasses.fields(result)})
    assert list(result.items()) == list(whole.items()) and vars(result) == vars(whole)
    assert result.to_tuple() == whole.to_tuple() and result[0] is result["prev_sample"] is result.prev_sample
    assert torch.equal(pickle.loads(pickle.dumps(result)).prev_sample, result.prev_sample)
    result.prev_sample = x
    assert result["prev_sample"] is x


def test_a_loop_without_scaling_says_so() -> None:
    for cls in (EulerDiscreteScheduler, EDMEulerScheduler, CMStochasticIterativeScheduler):
        for scheduler in both(cls, {}):
            messages = [m for m in list(observed(scheduler, scales=False))[-1] if "scale_model_input" in m]
            assert messages
