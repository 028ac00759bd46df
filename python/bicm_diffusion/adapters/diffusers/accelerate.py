"""`accelerate_scheduler`: a diffusers scheduler with the same behaviour and one fused launch a step."""

from __future__ import annotations

import copy
from functools import lru_cache, wraps
from typing import Any

import diffusers

from bicm_diffusion.adapters.diffusers.consistency import ConsistencyModel, LatentConsistencyModel
from bicm_diffusion.adapters.diffusers.ddim import Ddim, DdimInverse
from bicm_diffusion.adapters.diffusers.dpmsolver import DpmSolver, EdmDpmSolver
from bicm_diffusion.adapters.diffusers.euler import EdmEuler, Euler
from bicm_diffusion.adapters.diffusers.scheduler import Accelerated, Integer, Noise

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
}


@lru_cache
def accelerated_class(cls: type[Any]) -> type[Any]:
    """Return the accelerated subclass of a diffusers scheduler class; it is constructed and loaded like the class.

    It carries the class's own name and module, so that a pipeline saved with it loads anywhere.
    Raises TypeError for a class that has no accelerated form.

    >>> from diffusers import DDIMScheduler
    >>> issubclass(accelerated_class(DDIMScheduler), DDIMScheduler)
    True
    """
    if issubclass(cls, Accelerated):
        return cls
    if cls not in COVERED:
        names = ", ".join(known.__name__ for known in COVERED)
        raise TypeError(f"scheduler must be one of {names}, got {cls.__name__}")
    mixin = COVERED[cls]

    # Pipelines look at a scheduler's signatures to see what it takes.
    @wraps(cls.set_timesteps)
    def set_timesteps(self: Accelerated, *args: Any, **kwargs: Any) -> None:
        mixin.set_timesteps(self, *args, **kwargs)

    namespace = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "_original": cls,
        "set_timesteps": set_timesteps,
    }
    return type(cls.__name__, (mixin, cls), namespace)


def accelerate_scheduler(
    scheduler: Any, *, noise: Noise = "generator", seed: Integer = 0, sample_id: Integer = 0
) -> Any:
    """Return a scheduler of a subclass of the given one's class, with its configuration, state and outputs.

    noise: "generator" draws as diffusers does, from the generators passed to `step` or from torch's; "keyed" makes
    step k's noise in the kernel, a function of (seed, k, sample, element) alone, where k is the step's index (DDIM's:
    the timestep). Then a list of generators gives each sample its own seed, without a draw and without a loop.
    seed, sample_id: the noise's key where no generator is passed, see `bicm_kernels.normal`.
    The given scheduler is left as it is. What no fused step covers, thresholding for one, runs the original step and
    warns once. Raises TypeError for a scheduler without an accelerated form, ValueError for another kind of noise.

    >>> from diffusers import DDIMScheduler
    >>> isinstance(accelerate_scheduler(DDIMScheduler()), DDIMScheduler)
    True
    """
    if noise not in ("generator", "keyed"):
        raise ValueError(f"noise: expected 'generator' or 'keyed', got {noise!r}")
    cls: Any = accelerated_class(type(scheduler))  # type: ignore[arg-type]
    result = object.__new__(cls)
    for name, value in vars(scheduler).items():
        result.__dict__[name] = copy.copy(value) if isinstance(value, list) else value
    result.__dict__.update(_noise=noise, _seed=seed, _sample_id=sample_id, _tables=None, _pending=None, _told=())
    result._prepare()
    return result
