"""Distances between a prediction of the measurement and the measurement itself, one number per sample.

Reductions are per sample and independent of the batch: the norms are `pseudo_huber` at c = 0, whose bits do not depend
on the other samples, and whose gradient at a residual of zero is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from bicm_diffusion.described import described
from bicm_kernels import pseudo_huber

Distance: TypeAlias = Literal["norm", "half_squared", "mse", "cross_entropy"] | Callable[[Tensor, Tensor], Tensor]


def norm(prediction: Tensor, y: Tensor) -> Tensor:
    """Return ‖prediction - y‖ of each sample, (B,); the gradient at 0 is 0.

    prediction, y: (B, …) of one shape, any floating dtype. Raises ValueError where shapes differ.

    >>> norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2))
    tensor([5., 0.])
    """
    if prediction.shape != y.shape:
        raise ValueError(f"y: expected the shape of operator(x0), {tuple(prediction.shape)}, got {tuple(y.shape)}")
    return pseudo_huber(prediction, y.detach(), c=0.0, kind="vector", reduction="none")


def half_squared(prediction: Tensor, y: Tensor) -> Tensor:
    """Return ½‖prediction - y‖² of each sample, (B,). Arguments as for `norm`.

    >>> half_squared(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    tensor([12.5000])
    """
    length = norm(prediction, y)
    return length * length * 0.5


def mse(prediction: Tensor, y: Tensor) -> Tensor:
    """Return ‖prediction - y‖²/d of each sample of d elements, (B,). Arguments as for `norm`.

    >>> mse(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    tensor([12.5000])
    """
    length = norm(prediction, y)
    return length * length * (1.0 / max(prediction[:1].numel(), 1))


def cross_entropy(prediction: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of each sample, (B,), the mean over positions where there are several.

    prediction: logits (B, C) or (B, C, …). y: classes (B,) or (B, …) int64, or probabilities like the logits.

    >>> cross_entropy(torch.zeros(1, 2), torch.tensor([1]))
    tensor([0.6931])
    """
    losses = functional.cross_entropy(prediction, y, reduction="none")
    if losses.dim() == 1:
        return losses
    losses = losses.flatten(1)
    # torch sums a single row in another order than several: each sample is summed separately.
    return torch.stack([sample.mean() for sample in losses]) if len(losses) else losses.sum(1)


_NAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "norm": norm,
    "half_squared": half_squared,
    "mse": mse,
    "cross_entropy": cross_entropy,
}


def chosen(distance: object) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function of a distance; raises ValueError or TypeError for an unknown one."""
    if isinstance(distance, str) and distance in _NAMED:
        return _NAMED[distance]
    names = ", ".join(map(repr, _NAMED))
    if isinstance(distance, str):
        raise ValueError(f"distance: expected {names} or a function, got {distance!r}")
    if not callable(distance):
        raise TypeError(f"distance: expected {names} or a function, got {described(distance)}")
    return distance


def measured(distance: Callable[[Tensor, Tensor], Tensor], prediction: object, y: Tensor, batch: int) -> Tensor:
    """Return distance(prediction, y); raises unless it is one number per sample, with a gradient."""
    if not isinstance(prediction, Tensor):
        raise TypeError(f"operator: expected a tensor, got {described(prediction)}")
    found = distance(prediction, y)
    if not isinstance(found, Tensor) or found.shape != (batch,):
        raise ValueError(f"distance: expected one number per sample, ({batch},), got {described(found)}")
    if not found.requires_grad:
        raise ValueError("operator, distance: expected functions that torch differentiates, got no gradient in x0")
    return found
