"""The schedulers and configurations that have an accelerated form, and what to run them on."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
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
from torch import Tensor

from bicm_diffusion.adapters.diffusers import accelerate_scheduler
from bicm_diffusion.adapters.diffusers.accelerate import COVERED

STEPS = 12

#: CogVideoX's DPM takes the last x0 as an argument, which no loop here has: `test_diffusers_cogvideox.py` is its own.
CLASSES = tuple(cls for cls in COVERED if cls is not CogVideoXDPMScheduler)
#: They draw in float32, whatever the model's output is.
DRAW_FLOAT32 = (DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler)

Case = tuple[type[Any], dict[str, Any], dict[str, Any]]


def _cases() -> Iterator[Case]:
    for spacing in ("leading", "trailing", "linspace"):
        yield DDPMScheduler, {"timestep_spacing": spacing}, {}
        yield CogVideoXDDIMScheduler, {"timestep_spacing": spacing}, {"eta": 0.5}
        yield EulerAncestralDiscreteScheduler, {"timestep_spacing": spacing}, {}
        yield DDIMScheduler, {"timestep_spacing": spacing}, {}
        yield EulerDiscreteScheduler, {"timestep_spacing": spacing}, {}
        yield DPMSolverMultistepScheduler, {"timestep_spacing": spacing}, {}
        for cls in (HeunDiscreteScheduler, KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler):
            yield cls, {"timestep_spacing": spacing}, {}
    yield DDIMInverseScheduler, {"timestep_spacing": "trailing"}, {}
    for prediction in ("epsilon", "sample", "v_prediction"):
        config: dict[str, Any] = {"prediction_type": prediction}
        yield CogVideoXDDIMScheduler, config, {}
        for clips in (True, False):
            yield DDIMScheduler, {**config, "clip_sample": clips}, {"eta": 0.7}
            yield LCMScheduler, {**config, "clip_sample": clips}, {}
            yield TCDScheduler, {**config, "set_alpha_to_one": clips}, {"eta": 0.3 if clips else 0.8}
            for variance in ("fixed_small", "fixed_large", "fixed_small_log"):
                yield DDPMScheduler, {**config, "clip_sample": clips, "variance_type": variance}, {}
        yield DDIMScheduler, {**config, "clip_sample_range": 2.0}, {"use_clipped_model_output": True}
        yield EulerDiscreteScheduler, {**config, "use_karras_sigmas": True}, {}
        for clips in (False, True):
            yield HeunDiscreteScheduler, {**config, "clip_sample": clips, "use_karras_sigmas": True}, {}
        yield EulerDiscreteScheduler, config, {"s_churn": 3.0, "s_noise": 1.01, "s_tmax": 100.0}
        for order in (1, 2, 3):
            for algorithm in ("dpmsolver++", "sde-dpmsolver++"):
                yield DPMSolverMultistepScheduler, {**config, "solver_order": order, "algorithm_type": algorithm}, {}
        if prediction != "sample":
            yield EulerAncestralDiscreteScheduler, config, {}
            yield KDPM2DiscreteScheduler, {**config, "use_karras_sigmas": True}, {}
            yield KDPM2AncestralDiscreteScheduler, {**config, "use_exponential_sigmas": True}, {}
            yield DDIMInverseScheduler, {**config, "clip_sample": False}, {}
            yield EDMEulerScheduler, config, {"s_churn": 3.0}
            yield EDMDPMSolverMultistepScheduler, config, {}
    yield TCDScheduler, {"timestep_spacing": "trailing"}, {"eta": 0.0}
    yield DDIMScheduler, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {}
    yield DPMSolverMultistepScheduler, {"solver_type": "heun", "use_karras_sigmas": True}, {}
    yield DPMSolverMultistepScheduler, {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, {}
    yield DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min", "lower_order_final": False}, {}
    yield EDMEulerScheduler, {"final_sigmas_type": "sigma_min", "sigma_schedule": "exponential"}, {}
    yield EDMDPMSolverMultistepScheduler, {"solver_order": 3, "final_sigmas_type": "sigma_min"}, {}
    yield EDMDPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, {}
    for stochastic in (False, True):
        yield FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "stochastic_sampling": stochastic}, {}
    yield FlowMatchEulerDiscreteScheduler, {"use_karras_sigmas": True, "invert_sigmas": True}, {}
    yield from _multistep_cases()
    for churn in ({}, {"s_churn": 3.0, "s_noise": 1.01}):
        yield FlowMatchHeunDiscreteScheduler, {"shift": 3.0}, churn
    yield CMStochasticIterativeScheduler, {}, {}
    yield CMStochasticIterativeScheduler, {"clip_denoised": False, "s_noise": 1.005}, {}


def _multistep_cases() -> Iterator[Case]:
    for prediction in ("epsilon", "sample", "v_prediction"):
        config: dict[str, Any] = {"prediction_type": prediction}
        for order in (1, 2, 3):
            yield DEISMultistepScheduler, {**config, "solver_order": order}, {}
            yield LMSDiscreteScheduler, config, {"order": order}
            for kind in ("bh1", "bh2"):
                # bh1 has no last step without noise: the original's NaN.
                final = {"solver_type": kind, "final_sigmas_type": "sigma_min"}
                yield UniPCMultistepScheduler, {**config, "solver_order": order, **final}, {}
            for algorithm in ("dpmsolver++", "sde-dpmsolver++"):
                yield DPMSolverSinglestepScheduler, {**config, "solver_order": order, "algorithm_type": algorithm}, {}
        yield UniPCMultistepScheduler, {**config, "predict_x0": False, "final_sigmas_type": "sigma_min"}, {}
        plain = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
        yield DPMSolverSinglestepScheduler, {**config, **plain}, {}
        yield LMSDiscreteScheduler, {**config, "use_karras_sigmas": True}, {}
        if prediction != "sample":
            for skips in (False, True):
                yield PNDMScheduler, {**config, "skip_prk_steps": skips}, {}
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    yield UniPCMultistepScheduler, {**flow, "flow_shift": 3.0}, {}
    yield UniPCMultistepScheduler, {"use_karras_sigmas": True, "disable_corrector": [0, 3]}, {}
    yield DEISMultistepScheduler, {**flow, "flow_shift": 3.0}, {}
    yield PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": True, "timestep_spacing": "trailing"}, {}
    yield DPMSolverSinglestepScheduler, {**flow, "solver_order": 3, "solver_type": "heun"}, {}
    yield DPMSolverSinglestepScheduler, {"solver_type": "heun", "use_karras_sigmas": True}, {}


CASES = tuple(_cases())
DEFAULTS: tuple[Case, ...] = tuple((cls, {}, {}) for cls in CLASSES)


#: Their constructors take most of a second.
SLOW = (KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler)
_made: dict[str, Any] = {}


def made(cls: type[Any], **config: Any) -> Any:
    """A new scheduler; of the slow ones a copy of one that was made before."""
    if cls not in SLOW:
        return cls(**config)
    name = f"{cls.__name__}({sorted(config.items())})"
    if name not in _made:
        _made[name] = cls(**config)
    return copy.deepcopy(_made[name])


def name_of(case: Case) -> str:
    cls, config, arguments = case
    return "-".join([cls.__name__.removesuffix("Scheduler"), *map(str, [*config.values(), *arguments])])


def model_input(scheduler: Any, sample: Tensor, *timestep: Any) -> Any:
    """The model's input; schedulers of flow matching have no method for it."""
    scale = getattr(scheduler, "scale_model_input", None)
    return sample if scale is None else scale(sample, *timestep)


def network(x: Tensor, k: int) -> Tensor:
    """Something that depends on the state and on the step, and on no other sample."""
    return torch.tanh(0.7 * x.double() + 0.1 * k).to(x.dtype)


def first_level(scheduler: Any) -> float:
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def start(scheduler: Any, dtype: torch.dtype, shape: tuple[int, ...] = (2, 4, 16, 16)) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (noise * first_level(scheduler)).to(dtype)


def in_float64(scheduler: Any) -> Any:
    """A copy that computes in float64, from the same float32 schedule."""
    twin = copy.deepcopy(scheduler)
    alphas = "alphas_cumprod", "final_alpha_cumprod", "initial_alpha_cumprod", "one"
    for name in (*alphas, "sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down"):
        if name in twin.__dict__:
            setattr(twin, name, getattr(twin, name).double())
    return twin


@contextmanager
def exactly(scheduler: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let a float64 scheduler draw the very numbers that another dtype's would, and never fall back to float32."""
    module = sys.modules[type(scheduler).__module__]
    draw, cast = getattr(module, "randn_tensor", None), Tensor.to
    if isinstance(scheduler, DRAW_FLOAT32):
        dtype = torch.float32

    def drawn(shape: Any, generator: Any = None, device: Any = None, **_: Any) -> Tensor:
        assert draw is not None
        return draw(shape, generator=generator, device=device, dtype=dtype).double()

    def kept(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return x if arguments == (torch.float32,) and x.dtype == torch.float64 else cast(x, *arguments, **options)

    Tensor.to = kept  # type: ignore[method-assign, assignment]
    if draw is not None:
        module.randn_tensor = drawn
    try:
        yield
    finally:
        Tensor.to = cast  # type: ignore[method-assign]
        if draw is not None:
            module.randn_tensor = draw


def trajectory(scheduler: Any, x: Tensor, **arguments: Any) -> Tensor:
    """The end of a plain loop, as pipelines write it."""
    for k, t in enumerate(scheduler.timesteps):
        output = network(model_input(scheduler, x, t), k)
        x = scheduler.step(output, t, x, **arguments).prev_sample
    return x


def generator(seed: int = 5, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def pair(case: Case, device: str = "cpu", **options: Any) -> tuple[Any, Any]:
    """An original and its accelerated form, their timesteps set."""
    cls, config, _ = case
    original, ours = made(cls, **config), accelerate_scheduler(made(cls, **config), **options)
    for scheduler in (original, ours):
        scheduler.set_timesteps(STEPS, device=device)
    return original, ours


def signature(scheduler: Any) -> list[str]:
    return list(inspect.signature(type(scheduler).step).parameters)


def assert_near_float64(case: Case, dtype: torch.dtype, device: str) -> None:
    """No further from float64 than twice the original.

    All three take every step from the original's state, and the errors of a trajectory are added up.
    """
    arguments = case[2]
    original, ours = pair(case, device)
    exact = in_float64(original)
    x = start(original, dtype).to(device)
    drawing = "generator" in signature(original)
    generators = [{"generator": generator(5, device)} if drawing else {} for _ in range(3)]
    original_error, our_error, scale = [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]
    for k, t in enumerate(original.timesteps):
        inputs = [model_input(s, x, t) for s in (original, ours)]
        model_input(exact, x.double(), t)
        torch.testing.assert_close(inputs[1], inputs[0])
        output = network(inputs[0], k)
        theirs, mine = (
            s.step(output, t, x, return_dict=False, **arguments, **g)
            for s, g in zip((original, ours), generators, strict=False)
        )
        # An integer tensor times a float would be float32.
        at = t if t.is_floating_point() else t.item()
        with exactly(exact, dtype):
            truth = exact.step(output.double(), at, x.double(), return_dict=False, **arguments, **generators[2])
        assert [r.dtype for r in mine] == [r.dtype for r in theirs]
        for j, expected in enumerate(truth):
            original_error[j] += (theirs[j].double() - expected).abs().max().item()
            our_error[j] += (mine[j].double() - expected).abs().max().item()
            scale[j] = max(scale[j], expected.abs().max().item())
        x = theirs[0]
    for theirs_, ours_, largest in zip(original_error, our_error, scale, strict=True):
        assert ours_ <= 2 * theirs_ + STEPS * 1e-15 * largest
