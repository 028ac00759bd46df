"""EDM's stochastic sampler, with the signature of EDM's script: `edm_sampler(net, latents, class_labels, …)`."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.adapters import noise
from bicm_diffusion.adapters.arithmetic import joined, two_sums
from bicm_diffusion.adapters.k_diffusion import MOST_LIFT
from bicm_diffusion.described import described
from bicm_diffusion.samplers.checks import check_model
from bicm_kernels import affine_step


def edm_sampler(
    net: Any,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = float("inf"),
    S_noise: float = 1.0,
    dtype: torch.dtype = torch.float64,
    skip_unused_noise: bool = False,
) -> Tensor:
    """Return a sample by EDM's stochastic Heun sampler (EDM Alg. 2).

    net(x, sigma, class_labels) returns the denoised sample, with x and the 0-d sigma in `dtype`; where net has
    sigma_min, sigma_max and round_sigma, they bound and round the levels, in float64. latents: (B, …) standard normal.
    State and result have `dtype`, float64 or float32. A step between equal levels leaves the state
    unchanged. Gradients are recorded as in EDM's function: call it under `torch.no_grad()` if you need none. Raises
    ValueError for another dtype and for levels that churn would lower.

    randn_like(x) is called in every step, as in EDM's function, also where churn does not act and the noise is
    dropped; with skip_unused_noise only where it acts, which is faster and leaves the generator in another state.

    >>> edm_sampler(lambda x, sigma, labels: 0 * x, torch.ones(1, 2), num_steps=3).dtype
    torch.float64
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    check_model(net, "net(x, sigma, class_labels)", "net")
    if not isinstance(latents, Tensor):
        raise TypeError(f"latents: expected a tensor, got {described(latents)}")
    levels = _levels(net, latents.device, num_steps, sigma_min, sigma_max, rho)
    raised = _raised(net, latents.device, levels, S_churn / num_steps, S_min, S_max)
    draw = noise.randn_like if randn_like is torch.randn_like else randn_like

    def denoised(x: Tensor, level: float) -> Tensor:
        return net(x, torch.full((), level, dtype=dtype, device=x.device), class_labels)

    x = affine_step([latents.to(dtype)], [levels[0]])
    for (unraised, below), level in zip(pairwise([*levels, 0.0]), raised, strict=True):
        if level != unraised or not skip_unused_noise:
            fresh = draw(x)
        if level != unraised:
            weight = S_noise * math.sqrt(level**2 - unraised**2)
            if getattr(fresh, "dtype", dtype) is not dtype:  # multiplied in its own dtype, as torch does
                fresh, weight = fresh * weight, 1.0
            x = affine_step(joined(x, fresh), [1.0, weight])
        first = denoised(x, level)
        if below == level:
            if below > 0.0:
                denoised(x.clone(), below)  # the network may write to its input
            continue
        if below == 0.0:
            x = affine_step(joined(x, first), [0.0, 1.0])
            continue
        ratio, half = below / level, (below - level) / 2
        # x + half·((x - first)/level + (predicted - second)/below). The terms of the first evaluation are summed before
        # the second, which may overwrite its input and the first one's result.
        predicted, halfway = two_sums(joined(x, first), [ratio, 1.0 - ratio], [1.0 + half / level, -half / level])
        second = denoised(predicted, below)
        x = affine_step(joined(halfway, predicted, second), [1.0, half / below, -half / below])
    return x


def _levels(net: Any, device: torch.device, steps: int, low: float, high: float, rho: float) -> list[float]:
    low, high = max(low, float(getattr(net, "sigma_min", 0.0))), min(high, float(getattr(net, "sigma_max", math.inf)))
    last = max(steps - 1, 1)
    low, high = low ** (1 / rho), high ** (1 / rho)
    return _rounded(net, device, [(high + i / last * (low - high)) ** rho for i in range(steps)])


def _raised(net: Any, device: torch.device, levels: list[float], lift: float, low: float, high: float) -> list[float]:
    """The levels of the steps' first evaluations."""
    lift = min(lift, MOST_LIFT)
    raised = _rounded(net, device, [level + (lift if low <= level <= high else 0.0) * level for level in levels])
    for level, above in zip(levels, raised, strict=True):
        if above < level:
            raise ValueError(f"S_churn: expected levels that rise, got {above} from {level}")
    return raised


def _rounded(net: Any, device: torch.device, levels: list[float]) -> list[float]:
    """The levels rounded by the network, in float64 as in EDM."""
    if not hasattr(net, "round_sigma"):
        return levels
    return torch.as_tensor(net.round_sigma(torch.tensor(levels, dtype=torch.float64, device=device))).tolist()
