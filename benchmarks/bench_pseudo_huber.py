"""A loss and its backward pass against the formulas of training scripts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

import bicm_kernels as bk
from benchmarks.cases import Case, column


def ours_pseudo_huber(pred: Tensor, target: Tensor, weight: Tensor, *, gradient: str = "backward") -> Tensor:
    """``pseudo_huber``, weighted."""
    return bk.pseudo_huber(pred, target, weight=weight, gradient=gradient)


def pseudo_huber(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """BCM eq. 11 without the cancellation of small residuals, weighted."""
    c = 0.00054 * pred[0].numel() ** 0.5
    s = (pred.float() - target.float()).flatten(1).square().sum(1)
    return (weight * (s / ((s + c * c).sqrt() + c))).mean()


def ours_elementwise(pred: Tensor, target: Tensor, weight: Tensor, *, gradient: str = "backward") -> Tensor:
    """The elementwise distance."""
    return bk.pseudo_huber(pred, target, weight=weight, c=0.03, kind="elementwise", gradient=gradient)


def elementwise(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The elementwise distance, as written."""
    r = pred.float() - target.float()
    return (weight * ((r.square() + 0.03**2).sqrt() - 0.03).flatten(1).mean(1)).mean()


def ours_squared(pred: Tensor, target: Tensor, weight: Tensor, *, gradient: str = "backward") -> Tensor:
    """The squared distance."""
    return bk.pseudo_huber(pred, target, weight=weight, kind="squared", gradient=gradient)


def squared(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The squared distance, as written."""
    return (weight * (pred.float() - target.float()).flatten(1).square().sum(1)).mean()


def ours_consistency(
    F: Tensor, target: Tensor, x: Tensor, u: Tensor, t: Tensor, *, gradient: str = "backward"
) -> Tensor:
    """``consistency_loss`` with times per sample, one of which serves as weight."""
    return bk.consistency_loss(x, F, t, u, target, weight=u, gradient=gradient)


def consistency(F: Tensor, target: Tensor, x: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    """BCM eq. 20 and 11: the denoised sample, then the distance."""
    u, t = column(weight, x), column(t, x)
    s = 0.25 + t * t
    denoised = (0.25 + t * u) / s * x + 0.5 * (t - u) / s.sqrt() * F
    return pseudo_huber(denoised, target, weight)


def kept(ours: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same with the gradient formed forward, the default."""
    return partial(ours, gradient="auto")


# Every pass reads its inputs, and the backward pass writes one gradient; or one pass does both.
CASES = tuple(
    Case(name + suffix, route(ours), eager, tensors, reads=passes * tensors, writes=1, trains=True, per_sample=numbers)
    for name, ours, eager, tensors, numbers in (
        ("pseudo_huber", ours_pseudo_huber, pseudo_huber, 2, 1),
        ("pseudo_huber_elementwise", ours_elementwise, elementwise, 2, 1),
        ("pseudo_huber_squared", ours_squared, squared, 2, 1),
        ("consistency_loss", ours_consistency, consistency, 3, 2),
    )
    for suffix, route, passes in (("", partial, 2), ("_kept", kept, 1))
)
