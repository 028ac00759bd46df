"""Pseudo-Huber losses in PyTorch.

The residual is formed in the compute type. Sums over a sample, and everything that exists once per sample, are float64;
the loss is rounded once to the compute type.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bicm_kernels.reference.arithmetic import compute_dtype, per_sample, root
from bicm_kernels.reference.preconditioning import c_skip_c_out

Number = float | Tensor


def distance(s: Tensor, c: Tensor) -> Tensor:
    """sqrt(s + c^2) - c as s / (sqrt(s + c^2) + c); 0, and so is its derivative, at s = c = 0."""
    square = s + c * c
    zero = square == 0
    divisor = root(torch.where(zero, 1.0, square)) + c
    return torch.where(zero, 0.0, s / divisor)


def reduced(residual: Tensor, c: Number | None, weight: Number | None, kind: str, reduction: str) -> Tensor:
    """The loss of a residual (B, ...) in the compute type."""
    batch, elements = residual.shape[0], math.prod(residual.shape[1:])
    flat = residual.reshape(batch, elements)
    per_batch = flat.new_empty((batch,))
    if kind == "vector":
        if c is None:
            c = 0.00054 * math.sqrt(elements)
        values = distance(flat.double().square().sum(1), per_sample(c, per_batch, torch.float64))
    else:
        assert c is not None
        values = distance(flat * flat, per_sample(c, flat, flat.dtype)).double().mean(1)
    if weight is not None:
        values = per_sample(weight, per_batch, torch.float64) * values
    if reduction != "none":
        values = values.mean() if reduction == "mean" else values.sum()
    return values.to(residual.dtype)


def pseudo_huber(
    pred: Tensor,
    target: Tensor,
    *,
    c: Number | None = None,
    weight: Number | None = None,
    kind: str = "vector",
    reduction: str = "mean",
) -> Tensor:
    """BCM eq. 11: sqrt(|pred - target|^2 + c^2) - c per sample, or the mean of the same over elements."""
    compute = compute_dtype(pred, target)
    return reduced(pred.to(compute) - target.to(compute), c, weight, kind, reduction)


def consistency_loss(
    x: Tensor,
    F: Tensor,
    t: Number,
    u: Number | None,
    target: Tensor,
    *,
    c: Number | None = None,
    weight: Number | None = None,
    kind: str = "vector",
    reduction: str = "mean",
    parameterization: str = "bcm",
    sigma_data: Number = 0.5,
    sigma_min: Number = 0.002,
    scaled: bool = False,
) -> Tensor:
    """The pseudo-Huber distance between c_skip x + c_out F, which is not rounded to the dtype of x, and the target."""
    compute = compute_dtype(x, F, target)
    if u is None:
        u = 0.0 if parameterization == "edm" else sigma_min
    t_, u_, data, least = (per_sample(value, x, compute) for value in (t, u, sigma_data, sigma_min))
    c_skip, c_out = c_skip_c_out(t_, u_, data, least, parameterization, scaled)
    denoised = c_skip * x.to(compute) + c_out * F.to(compute)
    return reduced(denoised - target.to(compute), c, weight, kind, reduction)
