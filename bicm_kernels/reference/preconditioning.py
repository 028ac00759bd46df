"""Preconditioning in PyTorch: c_in, c_skip, c_out, the denoised sample, and renoising."""

from __future__ import annotations

import torch
from torch import Tensor

from bicm_kernels.reference.arithmetic import compute_dtype, like_first, per_sample, root
from bicm_kernels.reference.noise import plus_noise

Number = float | Tensor


def c_in(t: Tensor, sigma_data: Tensor) -> Tensor:
    """1 / sqrt(sigma_data^2 + t^2)."""
    return torch.ones_like(t) / root(sigma_data * sigma_data + t * t)


def c_skip_c_out(
    t: Tensor, u: Tensor, sigma_data: Tensor, sigma_min: Tensor, parameterization: str, scaled: bool = False
) -> tuple[Tensor, Tensor]:
    """BCM eq. 20, 39, 43 for ``bcm`` and ``edm`` (u = 0); BCM eq. 17 for ``cm``. Scaled: c_skip / c_in."""
    variance = sigma_data * sigma_data
    s = variance + t * t
    r = root(s)
    if parameterization == "cm":
        d = t - sigma_min
        return (variance * r if scaled else variance) / (variance + d * d), (sigma_data * d) / r
    return (variance + t * u) / (r if scaled else s), (sigma_data * (t - u)) / r


def scale_input(x: Tensor, t: Number, *, sigma_data: float = 0.5) -> Tensor:
    """c_in(t) x."""
    compute = compute_dtype(x)
    scale = c_in(per_sample(t, x, compute), per_sample(sigma_data, x, compute))
    return like_first(scale * x.to(compute), x)


def _denoised(
    x: Tensor,
    F: Tensor,
    t: Number,
    u: Number | None,
    parameterization: str,
    sigma_data: float,
    sigma_min: float,
    scaled: bool = False,
) -> Tensor:
    """c_skip x + c_out F in the compute type."""
    compute = compute_dtype(x, F)
    if parameterization == "edm":
        u = 0.0
    t, u, sigma_data, sigma_min = (  # type: ignore[assignment]
        per_sample(value, x, compute) for value in (t, sigma_min if u is None else u, sigma_data, sigma_min)
    )
    c_skip, c_out = c_skip_c_out(t, u, sigma_data, sigma_min, parameterization, scaled)  # type: ignore[arg-type]
    return c_skip * x.to(compute) + c_out * F.to(compute)


def denoise(
    x: Tensor,
    F: Tensor,
    t: Number,
    u: Number | None = None,
    *,
    parameterization: str = "bcm",
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    scaled: bool = False,
) -> Tensor:
    """c_skip x + c_out F; scaled: x is c_in(t) x."""
    return like_first(_denoised(x, F, t, u, parameterization, sigma_data, sigma_min, scaled), x)


def renoise(
    x: Tensor,
    F: Tensor,
    t: Number,
    u: Number | None,
    sigma: Number,
    *,
    next_sigma: Number | None = None,
    seed: int | Tensor,
    step: int | Tensor = 0,
    sample_id: int | Tensor = 0,
    parameterization: str = "bcm",
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
) -> tuple[Tensor, Tensor]:
    """x_s = denoise(x, F, t, u) + sigma n, and c_in(next_sigma) x_s."""
    result = _denoised(x, F, t, u, parameterization, sigma_data, sigma_min)
    result = plus_noise(result, x, sigma, seed, step, sample_id)
    level = per_sample(sigma if next_sigma is None else next_sigma, x, result.dtype)
    scaled = c_in(level, per_sample(sigma_data, x, result.dtype)) * result
    return like_first(result, x), like_first(scaled, x)


def denoise_gradient(
    gradient: Tensor,
    t: Tensor,
    u: Tensor,
    sigma_data: Tensor,
    cm: bool,
    scaled: bool,
    in_F: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The derivative of ``denoise`` in x, or in F, times the incoming gradient."""
    compute = compute_dtype(gradient)
    t, u, sigma_data = (per_sample(value, gradient, compute) for value in (t, u, sigma_data))
    weights = c_skip_c_out(t, u, sigma_data, u, "cm" if cm else "bcm", scaled)
    return (weights[in_F] * gradient.to(compute)).to(dtype)
