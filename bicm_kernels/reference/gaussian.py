"""Steps as Gaussian policies in PyTorch: the step, the log-density of a state under it, the divergence of two steps.

The residual is formed in the compute type. Sums over a sample, and everything that exists once per sample, are float64;
the result is rounded once to the compute type. A sum is a tree over the elements in their logical order, which depends
on their number alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bicm_kernels.reference.arithmetic import compute_dtype, like_first, per_sample
from bicm_kernels.reference.multistep import Number, TensorOrPair, first_of, flatten, fold, guide
from bicm_kernels.reference.noise import plus_noise

_HALF_LOG_TWO_PI = 0.9189385332046727


def _total(terms: Tensor) -> Tensor:
    """The sums of the rows of (B, d)."""
    if terms.shape[1] == 0:
        return terms.sum(1)
    while (count := terms.shape[1]) > 1:
        half = (count + 1) // 2
        front, back = terms[:, :half], terms[:, half:]
        terms = front + torch.nn.functional.pad(back, (0, half - (count - half)))
    return terms[:, 0]


def _squares(residual: Tensor, std: Number, reduction: str) -> tuple[Tensor, Tensor]:
    """r^2 / (2 s^2) of every sample, reduced over its elements; and s, both float64."""
    flat = residual.reshape(residual.shape[0], math.prod(residual.shape[1:]))
    # The noise's weight in the compute type.
    s = per_sample(std, flat[:, :0].sum(1), residual.dtype).double()
    total = _total(flat.double().square())
    if reduction == "mean":
        # A division by a tensor: torch multiplies by the reciprocal of a number on some devices.
        total = total / torch.full((), flat.shape[1], dtype=torch.float64, device=flat.device)
    # A step without noise has no density; its log-probability counts as 0.
    return total / torch.where(s == 0, 1.0, 2.0 * s * s), s


def _mean(
    tensors: Sequence[TensorOrPair], weights: Sequence[Number], guidance_scale: Number | None, like: Tensor
) -> Tensor:
    compute = like.dtype
    table = [per_sample(weight, like, compute) for weight in weights]
    return fold(guide(tensors, guidance_scale, compute), table)


def _log_density(residual: Tensor, std: Number, reduction: str) -> Tensor:
    distance, s = _squares(residual, std, reduction)
    constant = torch.where(s == 0, 1.0, s).log() + _HALF_LOG_TWO_PI
    if reduction == "sum":
        constant = math.prod(residual.shape[1:]) * constant
    return torch.where(s == 0, 0.0, -distance - constant).to(residual.dtype)


def gaussian_step(
    tensors: Sequence[TensorOrPair],
    weights: Sequence[Number],
    *,
    std: Number,
    seed: int | Tensor | None,
    step: int | Tensor = 0,
    sample_id: int | Tensor = 0,
    guidance_scale: Number | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """next = m + s n with m = sum w_k x_k, and the log-density of the rounded next state, which counts as given."""
    first = first_of(tensors)
    like = first.to(compute_dtype(*flatten(tensors)))
    mean = _mean(tensors, weights, guidance_scale, like)
    result = mean if seed is None else plus_noise(mean, first, std, seed, step, sample_id)
    result = like_first(result, first)
    return result, _log_density(result.detach().to(like.dtype) - mean, std, reduction)


def gaussian_log_prob(
    next: Tensor,  # noqa: A002
    tensors: Sequence[TensorOrPair],
    weights: Sequence[Number],
    *,
    std: Number,
    guidance_scale: Number | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-(next - m)^2 / (2 s^2) - ln s - ln(2 pi) / 2 of every sample, the mean or the sum over its elements."""
    like = next.to(compute_dtype(next, *flatten(tensors)))
    return _log_density(like - _mean(tensors, weights, guidance_scale, like), std, reduction)


def gaussian_kl(
    tensors: Sequence[Tensor],
    reference: Sequence[Tensor],
    weights: Sequence[Number],
    *,
    std: Number,
    reduction: str = "mean",
) -> Tensor:
    """(m - m_ref)^2 / (2 s^2) of every sample, the mean or the sum over its elements."""
    first = first_of(tensors)
    like = first.to(compute_dtype(*tensors, *reference))
    residual = _mean(reference, weights, None, like) - _mean(tensors, weights, None, like)
    distance, s = _squares(residual, std, reduction)
    return torch.where(s == 0, 0.0, distance).to(residual.dtype)
