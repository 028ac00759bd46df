"""Sums of tensors in one launch, with the shapes that the same sums have in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bicm_kernels import affine_step, denoised_step


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return sum w_k x_k, broadcast, in the dtype of the first tensor; complex where one of them is.

    Tensors but the first may be numbers too, and 0-d tensors on any device.
    """
    try:
        return affine_step(tensors, weights)
    except (TypeError, ValueError):
        first, *others = joined(*tensors)
    if first.is_complex():
        return _complex_sum([first, *others], weights)
    return affine_step([first, *others], weights)


def two_sums(tensors: Sequence[Tensor], first: Sequence[float], second: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return `weighted_sum` with either weights, in one launch."""
    try:
        one, other, _ = denoised_step(tensors, second, first, x0_weight=0.0)
    except (TypeError, ValueError):
        tensors = joined(*tensors)
        if tensors[0].is_complex():
            return _complex_sum(tensors, first), _complex_sum(tensors, second)
        one, other, _ = denoised_step(tensors, second, first, x0_weight=0.0)
    return one, other


def joined(x: Tensor, *others: Tensor) -> Sequence[Tensor]:
    """Return the tensors in one shape; x keeps its dtype, unless it is whole, or real where another is not.

    Others may be numbers too, and 0-d tensors on any device.
    """
    tensors = [torch.as_tensor(other) for other in others]
    if not (x.is_floating_point() or x.is_complex()):
        x = x.to(torch.get_default_dtype())
    if not x.is_complex() and any(other.is_complex() for other in tensors):
        x = x.to(x.dtype.to_complex())
    return torch.broadcast_tensors(x, *(other if other.dim() else other.to(x.device) for other in tensors))


def copy(x: Tensor) -> Tensor:
    """Return a copy of a tensor, in memory that is kept for results."""
    return weighted_sum([x], [1.0])


def filled(x: Tensor, shape: Sequence[int], value: float, dtype: torch.dtype) -> Tensor:
    """Return a tensor of one value on the device of x; infinite where its dtype does not hold the value."""
    try:
        return x.new_full(shape, value, dtype=dtype)
    except RuntimeError:
        return x.new_ones(shape, dtype=dtype) * value


def promoted(x: Tensor, other: Tensor) -> Tensor:
    """Return x in the dtype of its sum with another tensor."""
    return x if x.dtype is other.dtype else x.to(torch.result_type(x, other))


def _complex_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    terms = (weight * x for weight, x in zip(weights[1:], tensors[1:], strict=True))
    return sum(terms, weights[0] * tensors[0]).to(tensors[0].dtype)
