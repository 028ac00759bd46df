"""What every sampler's loop shares: the model's call, the callback, the progress bar.

Every sampler is a loop over the indices of a `Schedule`: one call of the model and one fused step op per
index, with float64 coefficients that the op rounds once. No gradients are recorded. The shared arguments:

model: called as `model(z, times, **extra_args)` with z (B, …) and times (B,), float64 for a float64 state and
    float32 otherwise; returns the predicted noise (B, …), or (eps_uncond, eps_cond) with a guidance_scale.
guidance_scale: e = eps_uncond + guidance_scale·(eps_cond - eps_uncond), formed inside the step op.
callback: called with a `StepInfo` after every step.
progress: True shows a progress bar (needs tqdm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bicm_diffusion.schedules import Schedule

Prediction: TypeAlias = Tensor | tuple[Tensor, Tensor]
Model: TypeAlias = Callable[..., Prediction]


@dataclass(frozen=True)
class StepInfo:
    """What a callback sees: the index just reached, the state there, and the prediction that led to it."""

    index: int
    z: Tensor
    eps: Prediction


Callback: TypeAlias = Callable[[StepInfo], object]


def predict(model: Model, z: Tensor, schedule: Schedule, i: int, extra_args: Mapping[str, Any] | None) -> Prediction:
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    times = torch.full(z.shape[:1], schedule.times[i], dtype=dtype, device=z.device)
    return model(z, times, **(extra_args or {}))


def report(callback: Callback | None, index: int, z: Tensor, eps: Prediction) -> None:
    if callback is not None:
        callback(StepInfo(index, z, eps))


def indices(steps: range, progress: bool) -> Iterable[int]:
    if not progress:
        return steps
    from tqdm import tqdm  # an optional dependency: samplers without a bar need only torch

    return tqdm(steps, unit="step")
