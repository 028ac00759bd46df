"""`accelerate_scheduler`: a diffusers scheduler with the same behaviour and one fused launch per step."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from bicm_diffusion.adapters.diffusers.ancestral import EulerAncestral
from bicm_diffusion.adapters.diffusers.cogvideox import CogVideoXDdim, CogVideoXDpm
from bicm_diffusion.adapters.diffusers.consistency import ConsistencyModel, LatentConsistencyModel
from bicm_diffusion.adapters.diffusers.ddim import Ddim, DdimInverse
from bicm_diffusion.adapters.diffusers.ddpm import Ddpm
from bicm_diffusion.adapters.diffusers.deis import Deis
from bicm_diffusion.adapters.diffusers.dpmsolver import DpmSolver, EdmDpmSolver
from bicm_diffusion.adapters.diffusers.drawing import Integer, Noise, own_config
from bicm_diffusion.adapters.diffusers.euler import EdmEuler, Euler
from bicm_diffusion.adapters.diffusers.flow_match import FlowMatchEuler
from bicm_diffusion.adapters.diffusers.heun import FlowMatchHeun, Heun
from bicm_diffusion.adapters.diffusers.kdpm2 import Kdpm2, Kdpm2Ancestral
from bicm_diffusion.adapters.diffusers.lms import Lms
from bicm_diffusion.adapters.diffusers.pndm import Pndm
from bicm_diffusion.adapters.diffusers.scheduler import Accelerated, derived
from bicm_diffusion.adapters.diffusers.singlestep import DpmSolverSinglestep
from bicm_diffusion.adapters.diffusers.tcd import Tcd
from bicm_diffusion.adapters.diffusers.unipc import UniPc
from bicm_diffusion.described import described

#: The diffusers classes that have an accelerated form.
COVERED: dict[type[Any], type[Accelerated]] = {
    diffusers.DDIMScheduler: Ddim,
    diffusers.DDIMInverseScheduler: DdimInverse,
    diffusers.EulerDiscreteScheduler: Euler,
    diffusers.EDMEulerScheduler: EdmEuler,
    diffusers.EDMDPMSolverMultistepScheduler: EdmDpmSolver,
    diffusers.DPMSolverMultistepScheduler: DpmSolver,
    diffusers.CMStochasticIterativeScheduler: ConsistencyModel,
    diffusers.LCMScheduler: LatentConsistencyModel,
    diffusers.FlowMatchEulerDiscreteScheduler: FlowMatchEuler,
    diffusers.EulerAncestralDiscreteScheduler: EulerAncestral,
    diffusers.DDPMScheduler: Ddpm,
    diffusers.CogVideoXDDIMScheduler: CogVideoXDdim,
    diffusers.TCDScheduler: Tcd,
    diffusers.UniPCMultistepScheduler: UniPc,
    diffusers.DEISMultistepScheduler: Deis,
    diffusers.LMSDiscreteScheduler: Lms,
    diffusers.PNDMScheduler: Pndm,
    diffusers.DPMSolverSinglestepScheduler: DpmSolverSinglestep,
    diffusers.CogVideoXDPMScheduler: CogVideoXDpm,
    diffusers.FlowMatchHeunDiscreteScheduler: FlowMatchHeun,
    diffusers.HeunDiscreteScheduler: Heun,
    diffusers.KDPM2DiscreteScheduler: Kdpm2,
    diffusers.KDPM2AncestralDiscreteScheduler: Kdpm2Ancestral,
}


def covered_names() -> str:
    return ", ".join(cls.__name__ for cls in COVERED)


def accelerated_class(cls: type[Any]) -> type[Any]:
    """Return the accelerated subclass of a diffusers scheduler class; it is constructed and loaded like the class.

    It has the class's own name and module, so that a pipeline saved with it loads anywhere. A class may derive from it:
    its own `step` may call this one; methods that the original's step calls, such as `_get_variance`, are called by the
    original's step, which then runs.
    Raises TypeError for a class that has no accelerated form.

    >>> from diffusers import DDIMScheduler
    >>> issubclass(accelerated_class(DDIMScheduler), DDIMScheduler)
    True
    """
    if issubclass(cls, Accelerated):
        return cls
    if cls not in COVERED:
        why = (
            "has no accelerated form: its steps are fused already"
            if cls.__module__.startswith("bicm_diffusion.")
            else "has no accelerated form; accelerate_scheduler(..., strict=False) returns such schedulers unchanged"
        )
        raise TypeError(f"scheduler: {cls.__name__} {why}; expected one of {covered_names()}")
    return derived(COVERED[cls], cls)  # type: ignore[arg-type]


def accelerate_scheduler(
    scheduler: Any,
    *,
    noise: Noise | None = None,
    seed: Integer | None = None,
    sample_id: Integer | None = None,
    foresee: bool | None = None,
    strict: bool = True,
) -> Any:
    """Return a scheduler of a subclass of the given one's class, with its configuration, state and outputs.

    noise: "generator", the default, draws as diffusers does, from the generators passed to `step` or from torch's;
    "keyed" draws step k's noise in the kernel, a function of (seed, k, sample, element) only, where k is the step's
    index (DDIM: the timestep). A list of generators then gives each sample its own seed, without a draw and without
    a loop.
    seed: of keyed noise where no generator is passed, see `bicm_kernels.normal`. None draws a new one from torch's
    default generator at every `set_timesteps`; a given seed makes every run's noise the same, and a second
    run warns.
    sample_id: the first sample's, 0 by default.
    foresee: whether a step may compute the next evaluation's input (default). Pass False if your code writes to the
    sample between `step` and `scale_model_input` without increasing its version counter: through `x.data`, or NumPy.
    strict: whether a scheduler class without an accelerated form is a TypeError; False returns such a scheduler itself,
    with one warning, so that a script works with any pipeline. `is_accelerated` returns which it was.
    For a scheduler that is accelerated already, None keeps its setting. The given scheduler is not changed. Unsupported
    configurations, such as thresholding, and schedulers with own methods in place of those that the original step
    calls, such as `convert_model_output`, run the original step and warn once; schedules that were made in inference
    mode are copied, so that writes to the copies are noticed; seed and sample_id without keyed
    noise are ignored with a warning. Raises TypeError for a scheduler without an accelerated form and for other
    objects, ValueError for an unknown `noise`, TypeError or ValueError for an invalid seed or sample_id.

    >>> from diffusers import DDIMScheduler
    >>> isinstance(accelerate_scheduler(DDIMScheduler()), DDIMScheduler)
    True
    """
    known: bool = isinstance(scheduler, SchedulerMixin)
    if not known:
        raise TypeError(f"scheduler: got {described(scheduler)}{_hint(scheduler)}; expected one of {covered_names()}")
    if noise not in (None, "generator", "keyed"):
        raise ValueError(f"noise: expected 'generator' or 'keyed', got {noise!r}")
    if not strict and not _has_accelerated_form(type(scheduler)):
        ignored = [
            name for name, value in (("noise", noise), ("seed", seed), ("sample_id", sample_id)) if value is not None
        ]
        lost = f", and {', '.join(ignored)}: ignored" if ignored else ""
        text = f"{type(scheduler).__name__} has no accelerated form: the scheduler is returned unchanged{lost}"
        warnings.warn(f"{text}; accelerated are {covered_names()}", UserWarning, stacklevel=2)
        return scheduler
    cls: Any = accelerated_class(type(scheduler))  # type: ignore[arg-type]
    noise = noise or getattr(scheduler, "_noise", "generator")
    result = object.__new__(cls)
    for name, value in vars(scheduler).items():
        if isinstance(value, SchedulerMixin):  # UniPC's solver_p, whose steps are set with ours
            value = copy.deepcopy(value)
        result.__dict__[name] = copy.copy(value) if isinstance(value, list) else value
    config = own_config(scheduler.config, keyed=noise == "keyed")
    result.__dict__.update(_internal_dict=config, _noise=noise, _tables=None, _pending=None, _told=())
    if foresee is not None:
        result._foresight = result._foresees = foresee
    result._set_key(seed, sample_id)
    result._prepare()
    return result


def _hint(given: Any) -> str:
    """A hint what to pass instead of an object that is not a scheduler."""
    if isinstance(given, type) and issubclass(given, SchedulerMixin):
        own = f", or take accelerated_class({given.__name__})" if _has_accelerated_form(given) else ""
        return f", the class {given.__name__}: pass an instance, {given.__name__}(...){own}"
    if isinstance(getattr(given, "scheduler", None), SchedulerMixin):
        return ": pass pipeline.scheduler, and put the result in its place"
    return ""


def _has_accelerated_form(cls: type[Any]) -> bool:
    return cls in COVERED or issubclass(cls, Accelerated)


def is_accelerated(scheduler: Any) -> bool:
    """Return whether a scheduler's steps are fused: its class is accelerated, and its configuration is covered.

    False for diffusers' own schedulers, for `BDIADDIMScheduler`, which replaces no original, and for an
    accelerated scheduler whose configuration, schedule or own methods run every step by the original, such as with
    thresholding.
    Raises TypeError for an object that has a scheduler, such as a pipeline.

    >>> from diffusers import DDIMScheduler
    >>> is_accelerated(DDIMScheduler()), is_accelerated(accelerate_scheduler(DDIMScheduler()))
    (False, True)
    """
    if hasattr(scheduler, "scheduler"):
        raise TypeError(f"scheduler: expected a scheduler, got {described(scheduler)}; pass its .scheduler")
    return isinstance(scheduler, Accelerated) and scheduler.reason_not_fused() is None
