"""Spherical interpolation between noises."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bicm_diffusion.samplers.checks import check_per_sample, check_state

# Below this angle the sines cancel, and the arc is a straight line to seven digits.
STRAIGHT = 1e-3


def slerp(first: Tensor, second: Tensor, weight: float | Tensor) -> Tensor:
    """Return sin((1-α)ψ)/sin ψ·first + sin(αψ)/sin ψ·second, ψ the angle between two samples (BCM eq. 15).

    first, second: (B, …) of one shape and floating dtype. weight: α, a float or (B,), 0 = first, 1 = second.
    Computed in float64 where it is given, else in float32; the result has the dtype of `first`. Almost parallel
    samples, ψ < 1e-3, are interpolated linearly.
    Raises TypeError for arguments of another kind, and ValueError where shapes, dtypes or devices differ, or where two
    samples are almost opposite, where the shortest arc is not unique.

    >>> slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.5)
    tensor([[0.7071, 0.7071]])
    """
    check_state("first", first)
    check_state("second", second)
    if first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
        given = " and ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (first, second))
        raise ValueError(f"first, second: expected one shape and dtype on one device, got {given}")
    if first.dim() < 2:
        raise ValueError(
            f"first, second: expected batches (B, …), got shape {tuple(first.shape)}; x[None] is one of one"
        )
    check_per_sample("weight", weight, len(first))
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    a, b = (x.to(dtype).flatten(1) for x in (first, second))
    lengths = a.norm(dim=1) * b.norm(dim=1)
    psi = torch.where(lengths > 0, (a * b).sum(1) / lengths, 1.0).clamp(-1.0, 1.0).arccos()
    if bool((psi > math.pi - STRAIGHT).any()):
        widest = psi.max().item()
        raise ValueError(f"first, second: expected samples that are not opposite, got angles up to {widest:.6f}")
    alpha = torch.as_tensor(weight, dtype=dtype, device=first.device).expand(len(first))
    straight = psi < STRAIGHT
    sine = torch.where(straight, 1.0, psi.sin())
    from_first = torch.where(straight, 1 - alpha, ((1 - alpha) * psi).sin() / sine)
    from_second = torch.where(straight, alpha, (alpha * psi).sin() / sine)
    return (from_first[:, None] * a + from_second[:, None] * b).reshape(first.shape).to(first.dtype)
