"""The demo's measurements: reconstructions of real digits, samples, and times of the step ops."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.samplers import InexactInversionWarning, bdia_invert, bdia_sample, ddim_invert, ddim_sample
from bicm_diffusion.schedules import Schedule
from bicm_kernels import bdia_inverse_step, bdia_step, ddim_step
from examples.digits.data import Digits
from examples.digits.network import Denoiser, GuidedModel

GUIDANCE_SCALE = 1.5


@dataclass(frozen=True)
class Method:
    """DDIM (gamma None) or BDIA-DDIM with its gamma, on integer states if exact."""

    name: str
    gamma: float | None
    exact: bool = False


METHODS = (Method("DDIM", None), Method("BDIA, γ = 0.96", 0.96), Method("BDIA, γ = 1", 1.0))
#: Those that invert: the library's default, integer states, is the last.
INVERTERS = (*METHODS, Method("BDIA, exact", 1.0, exact=True))


@dataclass(frozen=True)
class Reconstruction:
    """Real images inverted to noise and back; every tensor (B, 1, 8, 8) in the dtype of the sampler's state."""

    method: Method
    noise: Tensor
    images: Tensor
    error: Tensor

    @property
    def max_error(self) -> float:
        """Return max |error|, in units where the image spans [-1, 1]."""
        return self.error.max().item()

    @property
    def mean_squared_error(self) -> float:
        """Return the mean of error²."""
        return self.error.square().mean().item()


def reconstruct(
    method: Method, network: Denoiser, digits: Digits, schedule: Schedule, dtype: torch.dtype
) -> Reconstruction:
    """Invert the digits to noise and sample them back, the state in `dtype`; errors are float64."""
    x, extra_args = digits.images.to(dtype), {"labels": digits.labels}
    if method.gamma is None:
        noise = ddim_invert(network, x, schedule, extra_args=extra_args)
        images = ddim_sample(network, noise, schedule, extra_args=extra_args)
    else:
        options: dict[str, Any] = {"gamma": method.gamma, "exact": method.exact, "extra_args": extra_args}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InexactInversionWarning)  # the error is measured here
            pair = bdia_invert(network, x, schedule, **options)
        images = bdia_sample(network, pair, schedule, **options).z
        noise = pair.z
    return Reconstruction(method, noise, images, (images.double() - x.double()).abs())


def draw(method: Method, network: Denoiser, noise: Tensor, labels: Tensor, schedule: Schedule) -> Tensor:
    """Sample one digit per label from the noise (B, 1, 8, 8), with classifier-free guidance."""
    model, extra_args = GuidedModel(network), {"labels": labels}
    if method.gamma is None:
        return ddim_sample(model, noise, schedule, guidance_scale=GUIDANCE_SCALE, extra_args=extra_args)
    floats: dict[str, Any] = {"gamma": method.gamma, "exact": False, "extra_args": extra_args}
    return bdia_sample(model, noise, schedule, guidance_scale=GUIDANCE_SCALE, **floats).z


@dataclass(frozen=True)
class Timing:
    """Median seconds of one step, as one fused call and as the paper's formula in plain torch."""

    name: str
    shape: tuple[int, ...]
    fused: float
    eager: float


def time_steps(shape: tuple[int, ...], schedule: Schedule, *, repeats: int) -> list[Timing]:
    """Time the three step ops on float32 tensors of `shape`, without the network."""
    generator = torch.Generator().manual_seed(0)
    other, z, eps = (torch.randn(shape, generator=generator) for _ in range(3))
    i, gamma = schedule.steps // 2, 0.96
    a, b, a_last, b_last = schedule.a[i], schedule.b[i], schedule.a[i + 1], schedule.b[i + 1]
    pairs: list[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]] = [
        ("DDIM step", lambda: ddim_step(z, eps, a=a, b=b), lambda: a * z + b * eps),
        (
            "BDIA step",
            lambda: bdia_step(other, z, eps, a=a, b=b, a_last=a_last, b_last=b_last, gamma=gamma),
            lambda: gamma * other - gamma * (z / a_last - (b_last / a_last) * eps) + (a * z + b * eps),
        ),
        (
            "BDIA inverse step",
            lambda: bdia_inverse_step(other, z, eps, a=a, b=b, a_last=a_last, b_last=b_last, gamma=gamma),
            lambda: other / gamma - (a * z + b * eps) / gamma + (z / a_last - (b_last / a_last) * eps),
        ),
    ]
    return [Timing(name, shape, *medians((fused, eager), repeats)) for name, fused, eager in pairs]


def medians(functions: tuple[Callable[[], Tensor], ...], repeats: int) -> list[float]:
    """Return the median seconds of each function, called in turns."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    # Taking turns exposes both sides equally to disturbances.
    for _ in range(repeats):
        for record, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            record.append(time.perf_counter() - start)
    return [statistics.median(record) for record in times]
