"""Launches of a step: what a dispatch counter sees on the CPU with a stub network, views apart.

Each of our ops counts once: it is one kernel on a GPU, as the emulator counts. diffusers is counted in the same run,
without the arithmetic on 0-d tensors, which it does on the CPU. The other libraries' numbers were counted from their
published functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bicm_diffusion
import bicm_kernels
from bicm_diffusion.adapters import consistency_models, edm, k_diffusion

from .document import table

SHAPE = (2, 4, 8, 8)


#: What launches nothing: allocations, and a question about dtypes.
NO_LAUNCHES = (
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::promote_types",
)


class Counter(TorchDispatchMode):
    """Counts what is no view and no allocation; of 0-d tensors alone where `scalars` are wanted."""

    def __init__(self, scalars: bool) -> None:
        super().__init__()
        self.scalars, self.count = scalars, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        views = any(x.alias_info is not None and not x.alias_info.is_write for x in op._schema.returns)
        wide = any(isinstance(x, Tensor) and x.dim() for x in tree_leaves((args, kwargs, result)))
        self.count += not views and op._schema.name not in NO_LAUNCHES and (wide or self.scalars)
        return result


def launches(call: Callable[[], object], *, scalars: bool = True) -> int:
    with Counter(scalars) as counter:
        call()
    return counter.count


def per_step(loop: Callable[[int], object]) -> int:
    """Of one step more."""
    return launches(lambda: loop(7)) - launches(lambda: loop(6))


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def identity(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """A network that launches nothing."""
    return x


def diffusers_step(name: str, ours: bool, **arguments: Any) -> int:
    """`scale_model_input` and `step`, in the middle of a loop of twenty; of a step in halves, both."""
    import diffusers

    scheduler = getattr(diffusers, name)()
    if ours:
        from bicm_diffusion.adapters.diffusers import accelerate_scheduler

        scheduler = accelerate_scheduler(scheduler)
    scheduler.set_timesteps(20)
    scale = getattr(scheduler, "scale_model_input", identity)

    def loop(x: Tensor, timesteps: Tensor) -> Tensor:
        for t in timesteps:
            x = scheduler.step(scale(x, t), t, x, **arguments).prev_sample
        return x

    first = 4 - scheduler.order
    x = loop(start(), scheduler.timesteps[:first])
    return launches(lambda: loop(x, scheduler.timesteps[first:4]), scalars=False)


def levels(steps: int) -> Tensor:
    return torch.cat([bicm_diffusion.karras_levels(steps).flip(0).float(), torch.zeros(1)])


def sample(function: Callable[..., object], **options: Any) -> Callable[[int], object]:
    return lambda steps: function(identity, start(), bicm_diffusion.vp_schedule(steps), **options)


def guided(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x, x


def zigzag() -> int:
    x, schedule = start(), bicm_diffusion.ConsistencySchedule((80.0,), ((0.2, 0.8),))
    return launches(lambda: bicm_diffusion.consistency_sample(identity, x, schedule))


def multistep_consistency(steps: int) -> object:
    denoiser = consistency_models.ConsistencyDenoiser()
    noise = torch.nn.Module()
    noise.randn_like = torch.randn_like  # type: ignore[assignment]
    return consistency_models.stochastic_iterative_sampler(
        lambda x, t: denoiser.denoise(identity, x, t)[1], start(), None, noise, ts=list(range(0, 4 * steps + 1, 4))
    )


def edm_heun(steps: int) -> object:
    denoiser = k_diffusion.EDMDenoiser(identity)
    return edm.edm_sampler(lambda x, sigma, _: denoiser(x, sigma), start(), num_steps=steps)


class Stub(nn.Module):
    """A network of one parameter: one launch forward, and what autograd makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x * self.scale


def distance(function: Callable[..., Tensor], inputs: int, **options: Any) -> int:
    """A loss, forward and backward, for the gradient of the first input; the gradient's seed apart."""
    x = [start() for _ in range(inputs)]
    x[0].requires_grad_()
    upstream = torch.ones(())
    return launches(lambda: torch.autograd.grad(function(*x, **options), x[0], upstream))


def consistency(F: Tensor, target: Tensor, x: Tensor) -> Tensor:
    return bicm_kernels.consistency_loss(x, F, 2.0, None, target)


def policy_step() -> int:
    """A step of Flow-GRPO in bfloat16, its noise and its log-probability."""
    x, v = start().bfloat16(), start().bfloat16()
    return launches(lambda: bicm_kernels.gaussian_step([x, v], [0.9, -0.1], std=0.3, seed=1))


def policy_training() -> int:
    """The log-probability of a recorded state, forward and backward, for the gradient of the network's output."""
    after, x, v = (start().bfloat16() for _ in range(3))
    v.requires_grad_()
    upstream = torch.ones(SHAPE[0])
    log_prob = bicm_kernels.gaussian_log_prob
    return launches(lambda: torch.autograd.grad(log_prob(after, [x, v], [0.9, -0.1], std=0.3), v, upstream))


def bct() -> int:
    x, network, table_ = start(), Stub(), bicm_diffusion.LevelTable(bicm_diffusion.karras_levels(11))
    drawn = bicm_diffusion.draw_levels(table_, SHAPE[0], seed=0, step=0)
    return launches(lambda: bicm_diffusion.bct_loss(network, x, drawn, seed=0, step=0).total.backward())


DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "diffusers DDIM": ("DDIMScheduler", {}),
    "diffusers DDIM, η = 1": ("DDIMScheduler", {"eta": 1.0}),
    "diffusers DDIMInverse": ("DDIMInverseScheduler", {}),
    "diffusers Euler": ("EulerDiscreteScheduler", {}),
    "diffusers EDMEuler": ("EDMEulerScheduler", {}),
    "diffusers DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "diffusers EDM-DPM++ 2M": ("EDMDPMSolverMultistepScheduler", {}),
    "diffusers CMStochasticIterative": ("CMStochasticIterativeScheduler", {}),
    "diffusers LCM": ("LCMScheduler", {}),
    "diffusers UniPC": ("UniPCMultistepScheduler", {}),
    "diffusers DEIS": ("DEISMultistepScheduler", {}),
    "diffusers LMS": ("LMSDiscreteScheduler", {}),
    "diffusers PNDM, Runge-Kutta": ("PNDMScheduler", {}),
    "diffusers DPM++ singlestep": ("DPMSolverSinglestepScheduler", {}),
    "diffusers Heun, both halves": ("HeunDiscreteScheduler", {}),
    "diffusers FlowMatchHeun, both halves": ("FlowMatchHeunDiscreteScheduler", {}),
    "diffusers KDPM2, both halves": ("KDPM2DiscreteScheduler", {}),
    "diffusers KDPM2Ancestral, both halves": ("KDPM2AncestralDiscreteScheduler", {}),
}
#: What public code launches for the same step, and how to count ours.
OTHERS: dict[str, tuple[str, Callable[[], int]]] = {
    "k-diffusion Euler, with its denoiser": (
        "29",
        lambda: per_step(lambda n: k_diffusion.sample_euler(k_diffusion.Denoiser(identity), start(), levels(n))),
    ),
    "k-diffusion Heun, with its denoiser": (
        "55",
        lambda: per_step(lambda n: k_diffusion.sample_heun(k_diffusion.Denoiser(identity), start(), levels(n))),
    ),
    "consistency models, a step of several": ("28", lambda: per_step(multistep_consistency)),
    "EDM Heun in float64, with its denoiser": (
        "71",
        lambda: per_step(edm_heun),
    ),
    "BDIA": ("29", lambda: per_step(sample(bicm_diffusion.bdia_sample, exact=False))),
    "BDIA on integers": ("", lambda: per_step(sample(bicm_diffusion.bdia_sample))),
    "BDIA, guided": (
        "35",
        lambda: per_step(
            lambda n: bicm_diffusion.bdia_sample(
                guided, start(), bicm_diffusion.vp_schedule(n), guidance_scale=7.5, exact=False
            )
        ),
    ),
    "EDICT": ("26", lambda: per_step(sample(bicm_diffusion.edict_sample, exact=False))),
    "BCM, a sample by one zigzag, three evaluations": ("87", zigzag),
    "vector pseudo-Huber, forward and backward": ("18 to 20", lambda: distance(bicm_kernels.pseudo_huber, 2)),
    "elementwise pseudo-Huber": (
        "17 to 23",
        lambda: distance(bicm_kernels.pseudo_huber, 2, kind="elementwise", c=0.1),
    ),
    "the loss of a denoised sample": ("", lambda: distance(consistency, 3)),
    "Flow-GRPO's step with its log-probability": ("50", policy_step),
    "log-probability in training, forward and backward": ("55", policy_training),
    "BCM's whole loss of four evaluations": ("176", bct),
}


def steps() -> str:
    """Public code's launches and ours, step by step."""
    rows = [
        [name, str(diffusers_step(scheduler, False, **arguments)), str(diffusers_step(scheduler, True, **arguments))]
        for name, (scheduler, arguments) in DIFFUSERS.items()
    ]
    rows += [[name, theirs, str(ours())] for name, (theirs, ours) in OTHERS.items()]
    return table(["step", "public code", "ours"], rows)
