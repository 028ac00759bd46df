"""Sums of tensors in one launch, with the shapes and dtypes that the same sums have in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.samplers.checks import hint_for
from bicm_kernels import affine_step, denoised_step


def broadcast(*tensors: Tensor) -> Sequence[Tensor]:
    """Return the tensors broadcast to one shape."""
    shape = tensors[0].shape
    for x in tensors:
        if x.shape != shape:
            return torch.broadcast_tensors(*tensors)
    return tensors


def promoted(x: Tensor, other: Tensor) -> Sequence[Tensor]:
    """Return two tensors in one shape, the first in the dtype of their sum, which is the dtype of an op's result."""
    return broadcast(x.to(torch.result_type(x, other)), other)


def joined(x: Tensor, *others: Any) -> Sequence[Tensor]:
    """Return the tensors in one shape; x keeps its dtype, unless it is integer, or real where another is complex.

    Others may be numbers too, and 0-d tensors on any device.
    """
    if not (x.is_floating_point() or x.is_complex()):
        x = x.to(torch.get_default_dtype())
    for other in others:
        if type(other) is not Tensor or other.shape != x.shape or other.is_complex() != x.is_complex():
            break
    else:
        return x, *others
    tensors = [_as_tensor(other, x) for other in others]
    if not x.is_complex() and any(other.is_complex() for other in tensors):
        x = x.to(torch.promote_types(x.dtype, torch.complex64))  # few functions support complex halves
    return broadcast(x, *(other if other.dim() else other.to(x.device) for other in tensors))


def _as_tensor(other: Any, x: Tensor) -> Tensor:
    if isinstance(other, Tensor):
        return other
    try:
        return torch.tensor(other, dtype=x.dtype) if isinstance(other, float) else torch.as_tensor(other)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"model: expected a tensor, got {described(other)}{hint_for(other)}") from None


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return sum w_k x_k for tensors of one shape, in the dtype of the first; complex ones too."""
    if tensors[0].is_complex():
        terms = (weight * x for weight, x in zip(weights[1:], tensors[1:], strict=True))
        return sum(terms, weights[0] * tensors[0]).to(tensors[0].dtype)
    return affine_step(tensors, weights)


def two_sums(tensors: Sequence[Tensor], first: Sequence[float], second: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return `weighted_sum` with either weights, in one launch."""
    if tensors[0].is_complex():
        return weighted_sum(tensors, first), weighted_sum(tensors, second)
    one, other, _ = denoised_step(tensors, second, first, x0_weight=0.0)
    return one, other
