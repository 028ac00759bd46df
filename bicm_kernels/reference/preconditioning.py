"""Preconditioning in PyTorch: c_in, c_skip, c_out."""

from __future__ import annotations

import torch
from torch import Tensor


def root(x: Tensor) -> Tensor:
    """The correctly rounded root: torch's own float32 root is off by a unit for some inputs."""
    return x.sqrt() if x.dtype == torch.float64 else x.double().sqrt().to(x.dtype)


def c_in(t: Tensor, sigma_data: Tensor) -> Tensor:
    """1 / sqrt(sigma_data^2 + t^2)."""
    return torch.ones_like(t) / root(sigma_data * sigma_data + t * t)


def c_skip_c_out(
    t: Tensor, u: Tensor, sigma_data: Tensor, sigma_min: Tensor, parameterization: str
) -> tuple[Tensor, Tensor]:
    """BCM eq. 20, 39, 43 for ``bcm`` and ``edm`` (u = 0); BCM eq. 17 for ``cm``."""
    variance = sigma_data * sigma_data
    s = variance + t * t
    if parameterization == "cm":
        d = t - sigma_min
        return variance / (variance + d * d), (sigma_data * d) / root(s)
    return (variance + t * u) / s, (sigma_data * (t - u)) / root(s)
