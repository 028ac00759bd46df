"""EDM's stochastic sampler, called as its script's function is: `edm_sampler(net, latents, class_labels, …)`."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.adapters import noise
from bicm_diffusion.adapters.k_diffusion import MOST_CHURN
from bicm_kernels import affine_step


@torch.no_grad()
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
) -> Tensor:
    """Return a sample by EDM's stochastic Heun sampler (EDM Alg. 2).

    net(x, sigma, class_labels) returns the denoised sample, with x in `dtype`; where net has sigma_min, sigma_max and
    round_sigma, they bound and round the levels. latents: (B, …) standard normal. The state is float64 or float32, as
    `dtype` says, and so is the result. Raises ValueError for another dtype.

    >>> edm_sampler(lambda x, sigma, labels: 0 * x, torch.ones(1, 2), num_steps=3).dtype
    torch.float64
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    sigma_min = max(sigma_min, getattr(net, "sigma_min", 0.0))
    sigma_max = min(sigma_max, getattr(net, "sigma_max", math.inf))
    rounded = _rounding(net, latents.device)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    last = max(num_steps - 1, 1)
    levels = [*(rounded((high + i / last * (low - high)) ** rho) for i in range(num_steps)), 0.0]

    def denoised(x: Tensor, level: float) -> Tensor:
        return net(x, torch.full((), level, dtype=dtype, device=x.device), class_labels)

    draw = noise.randn_like if randn_like is torch.randn_like else randn_like
    x = affine_step([latents.to(dtype)], [levels[0]])
    for level, below in pairwise(levels):
        lift = min(S_churn / num_steps, MOST_CHURN) if S_min <= level <= S_max else 0.0
        if lift > 0.0:
            raised = rounded(level * (1.0 + lift))
            x = affine_step([x, draw(x)], [1.0, S_noise * math.sqrt(raised**2 - level**2)])
            level = raised
        first = denoised(x, level)
        ratio = below / level
        predicted = affine_step([x, first], [ratio, 1.0 - ratio])
        if below == 0.0:
            x = predicted
            continue
        second = denoised(predicted, below)
        half = (below - level) / 2
        weights = [1.0 + half / level, -half / level, half / below, -half / below]
        x = affine_step([x, first, predicted, second], weights)
    return x


def _rounding(net: Any, device: torch.device) -> Callable[[float], float]:
    function = getattr(net, "round_sigma", None)
    if function is None:
        return lambda sigma: sigma
    return lambda sigma: float(function(torch.as_tensor(sigma, device=device)))
