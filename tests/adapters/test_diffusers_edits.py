"""Schedules, configurations and state that are edited between two steps are obeyed as the originals obey them."""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDDIMScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import FrozenDict

from bicm_diffusion.adapters.diffusers import accelerate_scheduler
from bicm_diffusion.adapters.diffusers.accelerate import COVERED
from tests.support.diffusers_cases import CLASSES, made, model_input
from tests.support.diffusers_observed import SHAPE, agree, both, label

pytestmark = pytest.mark.filterwarnings("ignore")

Change = Callable[[Any], None]

#: When an edit comes: at which step, and before which of its two calls.
MOMENTS = ((0, "input"), (2, "input"), (2, "step"))


def at(moment: tuple[int, str], change: Change) -> dict[str, Any]:
    """The arguments that let a loop be edited once."""

    def edit(scheduler: Any, k: int, following: str) -> None:
        if (k, following) == moment:
            change(scheduler)

    return {"edit": edit}


# --- schedules --------------------------------------------------------------------------------------------------------
def _replaced(name: str, factor: float) -> Change:
    return lambda s: setattr(s, name, (getattr(s, name).double() * factor).to(getattr(s, name).dtype))


def _written(name: str, write: Callable[[Tensor], object]) -> Change:
    return lambda s: write(getattr(s, name)) and None


def _shifted(times: Tensor) -> object:
    times[3] -= 3
    return times


def _slice_scaled(levels: Tensor) -> object:
    return levels[1:-1].mul_(0.9)


SCHEDULES: dict[str, dict[str, Change]] = {
    "timesteps": {
        "an element": _written("timesteps", _shifted),
        "clamp_": _written("timesteps", lambda x: x.clamp_(max=500)),
        "copy_": _written("timesteps", lambda x: x.copy_(x.flip(0))),
        "replaced": _replaced("timesteps", 0.9),
        "the storage": lambda s: setattr(s.timesteps, "data", s.timesteps - 1),
    },
    "sigmas": {
        "mul_": _written("sigmas", lambda x: x.mul_(0.9)),
        "a view": _written("sigmas", _slice_scaled),
        "detached": _written("sigmas", lambda x: x.detach().mul_(0.9)),
        "replaced": _replaced("sigmas", 0.9),
    },
    "alphas_cumprod": {
        "mul_": _written("alphas_cumprod", lambda x: x.mul_(0.99)),
        "an element": _written("alphas_cumprod", lambda x: x[600:].mul_(0.9)),
        "replaced": _replaced("alphas_cumprod", 0.99),
    },
    "final_alpha_cumprod": {
        "fill_": _written("final_alpha_cumprod", lambda x: x.fill_(0.97)),
        "replaced": _replaced("final_alpha_cumprod", 0.97),
        "a number": lambda s: setattr(s, "final_alpha_cumprod", 0.97),
    },
    "initial_alpha_cumprod": {
        "fill_": _written("initial_alpha_cumprod", lambda x: x.fill_(0.97)),
        "replaced": _replaced("initial_alpha_cumprod", 0.97),
    },
    **{
        name: {"mul_": _written(name, lambda x: x.mul_(0.9)), "replaced": _replaced(name, 0.9)}
        for name in ("sigmas_interpol", "sigmas_up", "sigmas_down")
    },
    "num_inference_steps": {"fewer": lambda s: setattr(s, "num_inference_steps", 4)},
}


def _schedule_edits() -> Iterator[tuple[type[Any], str, str, tuple[int, str]]]:
    for cls in CLASSES:
        scheduler = made(cls)
        scheduler.set_timesteps(6)
        for name, changes in SCHEDULES.items():
            if hasattr(scheduler, name):
                for kind in changes:
                    # PyTorch does not count a new storage.
                    for moment in MOMENTS if kind != "the storage" else ():
                        yield cls, name, kind, moment


@pytest.mark.parametrize(("cls", "name", "kind", "moment"), list(_schedule_edits()), ids=label)
def test_a_schedule_that_is_edited(cls: type[Any], name: str, kind: str, moment: tuple[int, str]) -> None:
    # Then the level beyond the schedule is a view of its first one.
    shared = "set_alpha_to_one" in inspect.signature(cls).parameters and kind in ("mul_", "fill_")
    config = {"set_alpha_to_one": False} if shared else {}
    agree(*both(cls, config), **at(moment, SCHEDULES[name][kind]))


@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMInverseScheduler, LCMScheduler], ids=label)
@pytest.mark.parametrize("as_number", [False, True])
def test_a_timestep_that_is_moved_in_place(cls: type[Any], as_number: bool) -> None:
    """What a step returns is that of the timestep as it is now, in the loop that goes on and in the next one."""
    ends = []
    for scheduler in both(cls, {}, 4):
        x = torch.full(SHAPE, 0.5)
        results = []
        for _ in range(2):
            scheduler._step_index = None
            torch.manual_seed(0)
            for t in scheduler.timesteps:
                results.append(scheduler.step(0.1 * x, t.item() if as_number else t, x, return_dict=False)[1])
            scheduler.timesteps[2] -= 3
        ends.append(torch.stack(results))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_schedules_made_in_inference_mode(cls: type[Any]) -> None:
    """Writes to inference tensors are not counted, so `set_timesteps` makes none."""
    schedulers = made(cls), accelerate_scheduler(made(cls))
    for scheduler in schedulers:
        with torch.inference_mode():
            scheduler.set_timesteps(6)
    with torch.inference_mode():
        name = "sigmas" if hasattr(schedulers[0], "sigmas") else "timesteps"
        agree(
            *schedulers,
            **at((2, "step"), _written(name, lambda x: x.mul_(0.9) if x.is_floating_point() else x.sub_(1))),
        )
    assert not schedulers[1].timesteps.requires_grad


# --- configurations ---------------------------------------------------------------------------------------------------
PREDICTED = [("prediction_type", "v_prediction"), ("prediction_type", "sample"), ("prediction_type", "nonsense")]
CLIPS = [("clip_sample", True), ("clip_sample", False), ("clip_sample_range", 0.4)]
SOLVER = [
    ("thresholding", True),
    ("algorithm_type", "sde-dpmsolver++"),
    ("algorithm_type", "nonsense"),
    ("solver_order", 1),
    ("solver_order", 3),
    ("solver_type", "heun"),
    ("solver_type", "nonsense"),
    ("lower_order_final", False),
    ("euler_at_final", True),
    ("final_sigmas_type", "sigma_min"),
]
MULTISTEP = [
    ("thresholding", True),
    ("solver_order", 1),
    ("solver_order", 3),
    ("lower_order_final", False),
    ("use_flow_sigmas", True),
]
OPTIONS: dict[type[Any], list[tuple[str, Any]]] = {
    DDIMScheduler: [*PREDICTED, *CLIPS, ("thresholding", True), ("num_train_timesteps", 700)],
    DDIMInverseScheduler: [*PREDICTED, *CLIPS, ("thresholding", True), ("num_train_timesteps", 700)],
    EulerDiscreteScheduler: [*PREDICTED, ("prediction_type", "original_sample")],
    EDMEulerScheduler: [*PREDICTED, ("sigma_data", 0.9)],
    EDMDPMSolverMultistepScheduler: [*PREDICTED, *SOLVER, ("sigma_data", 0.9)],
    DPMSolverMultistepScheduler: [
        *PREDICTED,
        *SOLVER,
        ("prediction_type", "flow_prediction"),
        ("algorithm_type", "sde-dpmsolver"),
        ("use_flow_sigmas", True),
        ("variance_type", "learned"),
    ],
    CMStochasticIterativeScheduler: [
        ("clip_denoised", False),
        ("s_noise", 1.5),
        ("sigma_data", 0.9),
        ("sigma_min", 0.1),
        ("sigma_max", 10.0),
        ("num_train_timesteps", 3),
    ],
    LCMScheduler: [*PREDICTED, *CLIPS, ("thresholding", True), ("timestep_scaling", 3.0)],
    FlowMatchEulerDiscreteScheduler: [("num_train_timesteps", 500), ("stochastic_sampling", True)],
    EulerAncestralDiscreteScheduler: PREDICTED,
    FlowMatchHeunDiscreteScheduler: [],
    HeunDiscreteScheduler: [*PREDICTED, *CLIPS],
    KDPM2DiscreteScheduler: PREDICTED,
    KDPM2AncestralDiscreteScheduler: PREDICTED,
    TCDScheduler: PREDICTED,
    CogVideoXDDIMScheduler: [*PREDICTED, ("num_train_timesteps", 700)],
    UniPCMultistepScheduler: [*PREDICTED, *MULTISTEP, ("prediction_type", "flow_prediction"), ("solver_type", "bh1")],
    DEISMultistepScheduler: [*PREDICTED, *MULTISTEP, ("algorithm_type", "nonsense")],
    LMSDiscreteScheduler: PREDICTED,
    PNDMScheduler: [*PREDICTED, ("num_train_timesteps", 700), ("skip_prk_steps", True)],
    DPMSolverSinglestepScheduler: [
        *PREDICTED,
        *(edit for edit in MULTISTEP if edit[0] != "lower_order_final"),
        ("algorithm_type", "sde-dpmsolver++"),
        ("algorithm_type", "dpmsolver"),
        ("algorithm_type", "nonsense"),
        ("solver_type", "heun"),
        ("solver_type", "nonsense"),
        ("variance_type", "learned"),
    ],
    DDPMScheduler: [
        *PREDICTED,
        *CLIPS,
        ("thresholding", True),
        ("variance_type", "fixed_large"),
        ("variance_type", "learned"),
    ],
}


def _through_the_dictionary(scheduler: Any, name: str, value: Any) -> None:
    scheduler._internal_dict = FrozenDict({**scheduler.config, name: value})


WAYS: dict[str, Callable[[Any, str, Any], None]] = {
    "config.X =": lambda scheduler, name, value: setattr(scheduler.config, name, value),
    "register_to_config": lambda scheduler, name, value: scheduler.register_to_config(**{name: value}),
    "another dictionary": _through_the_dictionary,
    "vars(config)": lambda scheduler, name, value: vars(scheduler.config).update({name: value}),
    # The originals read attributes: an item alone changes nothing.
    "config[X] =": lambda scheduler, name, value: scheduler.config.__setitem__(name, value),
    "scheduler.X =": lambda scheduler, name, value: setattr(scheduler, name, value),
}
EDITED = [(cls, name, value) for cls, options in OPTIONS.items() for name, value in options]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("cls", "name", "value"), EDITED, ids=label)
def test_an_option_that_is_edited(cls: type[Any], name: str, value: Any, way: str) -> None:
    # An edit is seen by its way and by its moment apart.
    for moment in MOMENTS if way == "config.X =" else MOMENTS[2:]:
        agree(*both(cls, {}), **at(moment, lambda scheduler: WAYS[way](scheduler, name, value)))


@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_an_option_that_is_deleted_or_no_number(cls: type[Any]) -> None:
    for name, _ in OPTIONS[cls]:
        agree(*both(cls, {}), **at((1, "step"), lambda scheduler, name=name: delattr(scheduler.config, name)))
        for value in (None, torch.tensor(0.5), np.float64(0.5), [1, 2], np.ones(3)):
            agree(*both(cls, {}), **at((1, "step"), lambda s, name=name, value=value: setattr(s.config, name, value)))


def test_a_number_in_the_configuration_that_is_written_to() -> None:
    """A tensor there is read by the original in every step."""
    for scheduler in (schedulers := both(EDMEulerScheduler, {})):
        scheduler.config.sigma_data = torch.tensor(0.5)
    agree(*schedulers, **at((2, "input"), lambda scheduler: scheduler.config.sigma_data.fill_(0.9) and None))


def _reads(cls: type[Any]) -> set[str]:
    """The options that a class's `step` and `scale_model_input` read, and what these call; not thresholding's own."""
    found: set[str] = set()
    seen = {"_threshold_sample"}
    waiting = ["step", "scale_model_input"]
    while waiting:
        name = waiting.pop()
        method = getattr(cls, name, None)
        if name in seen or not inspect.isfunction(method):
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self.config":
                found.add(node.attr)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                waiting.append(node.attr)
    return found


@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_every_option_that_a_step_reads_is_watched(cls: type[Any]) -> None:
    assert _reads(cls) == {*COVERED[cls]._options} == {name for name, _ in OPTIONS[cls]} - _only_ours(cls)


def _only_ours(cls: type[Any]) -> set[str]:
    # It is edited above to show that this original ignores it.
    return {"thresholding"} if cls is DDIMInverseScheduler else set()


@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_the_given_scheduler_keeps_its_configuration(cls: type[Any]) -> None:
    original = cls()
    vars(original.config)["remembered"] = 5
    ours = accelerate_scheduler(original)
    assert dict(ours.config) == dict(original.config) and ours.config.remembered == 5
    ours.config.prediction_type = "v_prediction"
    ours.config["prediction_type"] = "v_prediction"
    assert getattr(original.config, "prediction_type", "epsilon") == "epsilon"
    assert original.config.get("prediction_type", "epsilon") == "epsilon"


# --- state ------------------------------------------------------------------------------------------------------------
def _outputs_scaled(scheduler: Any) -> None:
    scheduler.model_outputs[-1] = scheduler.model_outputs[-1] * 0.5


def _outputs_written(scheduler: Any) -> None:
    scheduler.model_outputs[-1].mul_(0.5)


STATES: dict[str, Change] = {
    "_step_index": lambda s: setattr(s, "_step_index", 1),
    "_step_index None": lambda s: setattr(s, "_step_index", None),
    "_step_index negative": lambda s: setattr(s, "_step_index", -3),
    "_step_index too large": lambda s: setattr(s, "_step_index", 9),
    "_step_index of NumPy": lambda s: setattr(s, "_step_index", np.int64(s._step_index)),
    "_step_index as a tensor": lambda s: setattr(s, "_step_index", torch.tensor(s._step_index)),
    "set_begin_index": lambda s: s.set_begin_index(1),
    "set_begin_index and again": lambda s: s.set_begin_index(1) or setattr(s, "_step_index", None),
    "set_begin_index negative": lambda s: s.set_begin_index(-3) or setattr(s, "_step_index", None),
    "lower_order_nums": lambda s: setattr(s, "lower_order_nums", 0),
    "lower_order_nums too large": lambda s: setattr(s, "lower_order_nums", 5),
    "model_outputs": _outputs_scaled,
    "model_outputs in place": _outputs_written,
    "model_outputs of None": lambda s: setattr(s, "model_outputs", [None] * len(s.model_outputs)),
    "model_outputs longer": lambda s: setattr(s, "model_outputs", [None, *s.model_outputs]),
    "model_outputs shorter": lambda s: setattr(s, "model_outputs", s.model_outputs[1:]),
    "model_outputs of float64": lambda s: setattr(
        s, "model_outputs", [x if x is None else x.double() for x in s.model_outputs]
    ),
    "model_outputs that broadcast": lambda s: setattr(
        s, "model_outputs", [x if x is None else x[:1] for x in s.model_outputs]
    ),
    "model_outputs of NumPy": lambda s: setattr(
        s, "model_outputs", [x if x is None else x.numpy() for x in s.model_outputs]
    ),
    "last_sample": lambda s: setattr(s, "last_sample", None),
    "last_sample in place": lambda s: s.last_sample.mul_(0.5) and None,
    "this_order": lambda s: setattr(s, "this_order", 1),
    "disable_corrector": lambda s: setattr(s, "disable_corrector", [0, 1, 2]),
    "predict_x0": lambda s: setattr(s, "predict_x0", False),
    "timestep_list longer": lambda s: setattr(s, "timestep_list", [None, *s.timestep_list]),
    "order_list": lambda s: setattr(s, "order_list", [1] * len(s.order_list)),
    "order_list shorter": lambda s: setattr(s, "order_list", s.order_list[:1]),
    "derivatives": lambda s: setattr(s, "derivatives", []),
    "derivatives in place": lambda s: s.derivatives[-1].mul_(0.5) and None,
    "derivatives of float64": lambda s: setattr(s, "derivatives", [x.double() for x in s.derivatives]),
    "ets": lambda s: setattr(s, "ets", []),
    "ets in place": lambda s: s.ets[-1].mul_(0.5) and None,
    "counter": lambda s: setattr(s, "counter", 0),
    "counter larger": lambda s: setattr(s, "counter", 14),
    "cur_sample": lambda s: setattr(s, "cur_sample", None),
    "cur_model_output": lambda s: setattr(s, "cur_model_output", 0),
    "cur_model_output a number": lambda s: setattr(s, "cur_model_output", 0.5),
    "num_inference_steps None": lambda s: setattr(s, "num_inference_steps", None),
    "num_inference_steps 0": lambda s: setattr(s, "num_inference_steps", 0),
    "prev_derivative": lambda s: s.dt is None or setattr(s, "prev_derivative", 0.9 * s.prev_derivative),
    "dt": lambda s: s.dt is None or setattr(s, "dt", 0.9 * s.dt),
    "dt in place": lambda s: s.dt is None or (s.dt.mul_(0.9) and None),
    "sample": lambda s: s.sample is None or setattr(s, "sample", 0.9 * s.sample),
    "sample in place": lambda s: s.sample is None or (s.sample.mul_(0.9) and None),
    "sample of None": lambda s: setattr(s, "sample", None),
    "sample of float64": lambda s: s.sample is None or setattr(s, "sample", s.sample.double()),
    "sample that broadcasts": lambda s: s.sample is None or setattr(s, "sample", s.sample[:1]),
    "is_scale_input_called": lambda s: setattr(s, "is_scale_input_called", False),
}


@cache
def _ready(cls: type[Any]) -> Any:
    """A scheduler whose state is there: some make it in the first step."""
    scheduler = made(cls)
    scheduler.set_timesteps(6)
    t, x = scheduler.timesteps[0], torch.ones(1, 1)
    scheduler.step(model_input(scheduler, x, t), t, x)
    return scheduler


SOLVERS = (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    DEISMultistepScheduler,
    DPMSolverSinglestepScheduler,
)
STATE_EDITS = [
    (cls, name, order)
    for cls in CLASSES
    for name in STATES
    for order in ((1, 2, 3) if cls in SOLVERS else (1,))
    if hasattr(_ready(cls), name.split()[0])
]


@pytest.mark.parametrize(("cls", "name", "order"), STATE_EDITS, ids=label)
def test_a_state_that_is_edited(cls: type[Any], name: str, order: int) -> None:
    config = {"solver_order": order} if cls in SOLVERS else {}
    # Of a step in two halves, in the first one and in the second.
    for moment in ((2, "input"), (2, "step"), (3, "input"), (3, "step")):
        agree(*both(cls, config), **at(moment, STATES[name]))


@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_timesteps_that_are_written_to_before_the_first_step(cls: type[Any]) -> None:
    """Where a loop begins is found among the timesteps as they are now."""
    found = []
    for scheduler in both(cls, {}, 6):
        if not hasattr(scheduler, "step_index"):
            pytest.skip("it does not count its steps")
        x, begins = torch.full(SHAPE, 0.5), scheduler.timesteps[1].item()
        scheduler.timesteps.copy_(scheduler.timesteps.flip(0))
        torch.manual_seed(0)
        try:
            result = scheduler.step(0.1 * model_input(scheduler, x, begins), begins, x).prev_sample
            found.append((scheduler.step_index, result))
        except Exception as error:
            found.append((type(error), x))
    assert found[1][0] == found[0][0]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-4)


# --- nothing is told that is not so -----------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_edits_that_are_covered_warn_of_nothing(cls: type[Any]) -> None:
    _, ours = both(cls, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.ones(SHAPE)
        for t in ours.timesteps[:3]:
            x = ours.step(0.1 * model_input(ours, x, t), t, x).prev_sample
            ours.timesteps.mul_(1)
            if hasattr(ours.config, "prediction_type"):
                ours.config.prediction_type = "v_prediction"
