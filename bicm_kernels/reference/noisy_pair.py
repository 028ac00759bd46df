"""One noise at two levels in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from bicm_kernels.reference.arithmetic import compute_dtype, like_first, per_sample
from bicm_kernels.reference.noise import plus_noise
from bicm_kernels.reference.preconditioning import c_in, c_skip_c_out


def noisy_pair(
    x: Tensor,
    sigma_low: float | Tensor,
    sigma_high: float | Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    sample_id: int | Tensor = 0,
    x_hat: Tensor | None = None,
    mask: Tensor | None = None,
    sigma_data: float | Tensor | None = None,
    F: Tensor | None = None,
    parameterization: str = "bcm",
    sigma_min: float | Tensor = 0.002,
) -> tuple[Tensor, Tensor]:
    """(x + sigma_low n, x + sigma_high n), with x_hat in place of x where the mask is true (GC Alg. 1); or scaled.

    With F, x_hat is c_skip (x + sigma_low n) + c_out F. An int64 mask has every sample's place in F, negative where x
    stays.
    """
    if F is not None and mask is not None and mask.dtype == torch.int64:
        F, mask = F.index_select(0, mask.clamp(min=0)), mask >= 0
    compute = compute_dtype(x) if F is None else compute_dtype(x, F)
    base = x.to(compute)
    if F is not None:
        end = 0.0 if parameterization == "edm" else sigma_min
        data = 0.5 if sigma_data is None else sigma_data
        t, u, std, least = (per_sample(value, x, compute) for value in (sigma_low, end, data, sigma_min))
        c_skip, c_out = c_skip_c_out(t, u, std, least, parameterization)
        x_hat = c_skip * plus_noise(base, x, sigma_low, seed, step, sample_id) + c_out * F.to(compute)
        base = x_hat if mask is None else base
    if x_hat is not None and mask is not None:
        base = torch.where(mask.reshape(-1, *[1] * (x.dim() - 1)), x_hat.to(compute), base)
    low, high = (plus_noise(base, x, level, seed, step, sample_id) for level in (sigma_low, sigma_high))
    if sigma_data is not None:
        data = per_sample(sigma_data, x, compute)
        low = c_in(per_sample(sigma_low, x, compute), data) * low
        high = c_in(per_sample(sigma_high, x, compute), data) * high
    return like_first(low, x), like_first(high, x)
