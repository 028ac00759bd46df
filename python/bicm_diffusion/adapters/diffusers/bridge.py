"""`from_diffusers`: a network and a scheduler as the model, schedule and prediction of this package's samplers."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DiffusionPipeline,
    DPMSolverMultistepInverseScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    SchedulerMixin,
)
from torch import Tensor, nn

from bicm_diffusion.described import described
from bicm_diffusion.samplers.prediction import Preconditioned, Prediction
from bicm_diffusion.schedules import Schedule
from bicm_diffusion.schedules.schedule import check_steps

Model = Callable[..., Tensor]

#: diffusers' names of prediction types, and this package's.
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "noise",
    "v_prediction": "v",
    "sample": "x0",
    "original_sample": "x0",
    "flow_prediction": "flow",
}
#: Transformers that take sigma itself: they multiply it by 1000.
TOLD_SIGMA = frozenset(
    f"{name}Transformer2DModel" for name in ("Flux", "Flux2", "Chroma", "QwenImage", "LongCatImage", "OvisImage")
)
#: Those that take 1 - sigma and return x - n.
REVERSED = frozenset(("LuminaNextDiT2DModel", "Lumina2Transformer2DModel"))
#: The alpha-bar used for a level without signal, as in diffusers' Euler schedulers.
LEAST_ALPHA_BAR = 2.0**-24
EDM = (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)
#: EDM's with the angle of sigma as the network's time. By its name, since it is importable with torchsde alone.
ANGLES = "CosineDPMSolverMultistepScheduler"
#: The minimum relative distance of two levels, in sigma/alpha.
APART = 1e-6


class Level(NamedTuple):
    time: float
    alpha: float
    sigma: float
    #: Whether the network takes a time.
    known: bool = True


def from_diffusers(network: Any, scheduler: Any, *, steps: int) -> tuple[Model, Schedule, Prediction]:
    """Return `(model, schedule, prediction)` of a diffusers network, for this package's samplers and exact inversions.

    network: a U-Net or a transformer of diffusers, called as `network(z, timestep=..., **extra_args)`: conditions are
    passed through a sampler's `extra_args`. A float32 state is cast to a half-precision network's dtype; channels
    beyond the state's, of a learned variance, are dropped. scheduler: the one that the network was trained for; it is
    not changed. Its spacing, sigmas and prediction type are used, its solver is not. One whose timesteps are set to
    `steps` keeps them; set custom timesteps, or a `mu`, this way.
    schedule: z = alpha·x + sigma·n: variance-preserving for epsilon, v and sample; alpha = 1 for EDM and consistency
    models, whose prediction is a `Preconditioned`; alpha = 1 - sigma for flow matching. The times are training steps in
    the first form and sigmas in the others, so that `ddpm_schedule`, `karras_schedule` and `flow_schedule` work with a
    model too. A level that occurs twice, such as PNDM's last one, becomes one level, so there may be fewer than
    `steps`; timesteps between two levels, as of Runge-Kutta steps, are none. A level without signal is taken at alpha²
    = 2^-24. Raises TypeError for other objects than a network and a scheduler, ValueError for a configuration that
    these levels cannot represent: inverted sigmas, DPM-Solver's inverse, an unknown prediction type, dynamic shifting
    without timesteps that were set.

    >>> from diffusers import DDIMScheduler, UNet2DModel
    >>> from bicm_diffusion import bdia_sample
    >>> sizes = {"block_out_channels": (8,), "norm_num_groups": 4}
    >>> unet = UNet2DModel(4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), **sizes)
    >>> model, schedule, prediction = from_diffusers(unet, DDIMScheduler(), steps=5)
    >>> bdia_sample(model, torch.ones(1, 3, 4, 4), schedule, prediction=prediction).z.shape
    torch.Size([1, 3, 4, 4])
    """
    if isinstance(network, DiffusionPipeline):
        raise TypeError(f"network: expected a pipeline's unet or transformer, got {described(network)} itself")
    if not isinstance(network, nn.Module) or "timestep" not in inspect.signature(network.forward).parameters:
        raise TypeError(f"network: expected a U-Net or a transformer of diffusers, got {described(network)}")
    if not isinstance(scheduler, SchedulerMixin):
        raise TypeError(f"scheduler: expected one of diffusers, got {described(scheduler)}")
    check_steps(steps)
    scheduler = copy.deepcopy(scheduler)
    if getattr(scheduler, "num_inference_steps", None) != steps:
        if getattr(scheduler.config, "use_dynamic_shifting", False):
            raise ValueError(
                "scheduler: expected one whose timesteps are set where use_dynamic_shifting is, "
                f"as by set_timesteps({steps}, mu=...); got {scheduler.__class__.__name__} without"
            )
        scheduler.set_timesteps(steps)
    prediction, read = _kind(scheduler)
    return _model(network, scheduler, prediction), _schedule(read(scheduler), flow=read is _flowing), prediction


def _kind(scheduler: Any) -> tuple[Prediction, Callable[[Any], list[Level]]]:
    """What the network predicts, and how levels are read."""
    config = scheduler.config
    if isinstance(scheduler, CMStochasticIterativeScheduler):
        return Preconditioned("cm", config.sigma_data, config.sigma_min), _exploding
    if _is_edm(scheduler):
        return Preconditioned("edm", config.sigma_data), _exploding
    if getattr(config, "invert_sigmas", False):
        raise ValueError("scheduler: expected levels from noise to data, got invert_sigmas=True")
    flow = "FlowMatch" in scheduler.__class__.__name__
    name = getattr(config, "prediction_type", "flow_prediction" if flow else None)
    if name not in PREDICTIONS:
        raise ValueError(f"scheduler: expected a prediction_type of {', '.join(PREDICTIONS)}, got {name!r}")
    if isinstance(scheduler, DPMSolverMultistepInverseScheduler):
        raise ValueError(f"scheduler: expected one from noise to data, got {scheduler.__class__.__name__}")
    lines = flow or getattr(config, "use_flow_sigmas", False)
    return PREDICTIONS[name], _flowing if lines else _preserving


def _takes_angles(scheduler: Any) -> bool:
    return any(cls.__name__ == ANGLES for cls in type(scheduler).__mro__)


def _is_edm(scheduler: Any) -> bool:
    return isinstance(scheduler, EDM) or _takes_angles(scheduler)


def _pairs(scheduler: Any) -> list[tuple[float, float]]:
    """Timesteps and sigmas from noise to data."""
    times, sigmas = scheduler.timesteps.tolist(), scheduler.sigmas.tolist()
    return list(zip(times, sigmas, strict=False))


def _exploding(scheduler: Any) -> list[Level]:
    return [Level(sigma, 1.0, sigma) for sigma in scheduler.sigmas.tolist()]


def _flowing(scheduler: Any) -> list[Level]:
    last, train = float(scheduler.sigmas[-1]), scheduler.config.num_train_timesteps
    return [*(Level(t / train, 1.0 - s, s) for t, s in _pairs(scheduler)), Level(last, 1.0 - last, last)]


def _preserving(scheduler: Any) -> list[Level]:
    times, kept = scheduler.timesteps.tolist(), _kept(scheduler)
    if hasattr(scheduler, "sigmas") and len(scheduler.sigmas) > len(times):
        sigmas = scheduler.sigmas.tolist()
        squares = [(times[i], 1.0 / (1.0 + sigmas[i] ** 2)) for i in kept]
        end = 1.0 / (1.0 + float(scheduler.sigmas[-1]) ** 2)
    elif hasattr(scheduler, "alphas_cumprod"):
        table = scheduler.alphas_cumprod.tolist()
        squares = [(times[i], table[int(times[i])]) for i in kept]
        end = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    else:
        raise ValueError(f"scheduler: expected sigmas or alphas_cumprod, got {scheduler.__class__.__name__} without")
    levels = [(t, max(a, LEAST_ALPHA_BAR), True) for t, a in squares]
    # The last level may be that of the lowest training step, as with set_alpha_to_one=False.
    lowest = scheduler.alphas_cumprod[0].item() if hasattr(scheduler, "alphas_cumprod") else 1.0
    trained = abs(lowest - end) < APART and end < 1.0
    levels.append((0.0 if trained else -1.0, end, trained))
    return [Level(t, math.sqrt(a), math.sqrt(1.0 - a), known) for t, a, known in levels]


def _kept(scheduler: Any) -> list[int]:
    """Indices of the timesteps that are levels of a schedule.

    Schedulers of order 2 have one more timestep between two levels, or a level twice. PNDM's Runge-Kutta steps call the
    network at their start, twice at the middle, and at their end, which is the next one's start: the middles are no
    levels. Nor is -1, which trailing ranges have one of for some counts.
    """
    times, count = scheduler.timesteps.tolist(), len(getattr(scheduler, "prk_timesteps", ()))
    logarithms, order = getattr(scheduler.config, "timestep_type", None) == "continuous", getattr(scheduler, "order", 1)
    starts = [i for i in range(len(times)) if (i % 4 in (0, 3) if i < count else i % order == 0)]
    return [i for i in starts if logarithms or times[i] >= 0]


def _schedule(levels: list[Level], flow: bool) -> Schedule:
    """The levels in the order of a schedule; of several equal ones the first with a timestep."""
    kept: list[Level] = []
    levels = levels[::-1]  # the order of equal ones
    for level in sorted(levels, key=_ratio):
        if kept and _ratio(level) <= _ratio(kept[-1]) * (1.0 + APART):
            if level.known and not kept[-1].known:
                kept[-1] = level
            continue
        kept.append(level)
    times, alpha, sigma, known = zip(*kept, strict=True)
    return Schedule(times, alpha, sigma, asked=known[0], flow=flow)


def _ratio(level: Level) -> float:
    return level.sigma / level.alpha if level.alpha else math.inf


def _model(network: Any, scheduler: Any, prediction: Prediction) -> Model:
    told = _told(network, scheduler)
    turned = network.__class__.__name__ in REVERSED
    config = scheduler.config
    if _is_edm(scheduler) and config.prediction_type == "v_prediction":
        turned = True  # c_out has the opposite sign there
    whole = getattr(getattr(network, "config", None), "time_embedding_type", None) == "learned"
    parameter = next(network.parameters(), None)

    def model(z: Tensor, times: Tensor, **extra_args: Any) -> Tensor:
        dtype = z.dtype if parameter is None else parameter.dtype
        given = told(times.to(torch.float32))
        given = given.round().long() if whole else given
        output: Tensor = network(z.to(dtype), timestep=given, return_dict=False, **extra_args)[0]
        if output.shape != z.shape and output.shape[1] == 2 * z.shape[1]:
            output = output[:, : z.shape[1]]
        return -output if turned else output

    return model


def _told(network: Any, scheduler: Any) -> Callable[[Tensor], Tensor]:
    """The network's time argument at a time of the schedule."""
    if isinstance(scheduler, CMStochasticIterativeScheduler):
        return lambda sigma: 250.0 * sigma.log()
    if _takes_angles(scheduler):
        return lambda sigma: sigma.atan() * (2.0 / math.pi)
    if _is_edm(scheduler):
        return lambda sigma: 0.25 * sigma.log()
    if _kind(scheduler)[1] is not _flowing:
        return lambda step: step
    name, train = network.__class__.__name__, float(scheduler.config.num_train_timesteps)
    if name in REVERSED:
        return lambda sigma: 1.0 - sigma
    return (lambda sigma: sigma) if name in TOLD_SIGMA else (lambda sigma: sigma * train)
