"""Shared by the solvers: the measurement, its distance and step size, and gradients with respect to a state."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.inverse.distances import Distance, chosen, measured
from bicm_diffusion.keys import AROUND
from bicm_diffusion.samplers import checks
from bicm_diffusion.samplers.prediction import Number
from bicm_kernels import add_noise, fold_in

Operator: TypeAlias = Callable[[Tensor], Tensor]
Integer: TypeAlias = int | Tensor


class Problem:
    """Find x0 with operator(x0) = y."""

    def __init__(
        self, operator: object, y: object, distance: Distance, z: Tensor, seed: Integer, sample_id: Integer
    ) -> None:
        if not callable(operator):
            raise TypeError(f"operator: expected a function or module, got {described(operator)}")
        if not isinstance(y, Tensor):
            raise TypeError(f"y: expected a tensor (B, …), got {described(y)}")
        if y.dim() == 0 or len(y) != len(z):
            raise ValueError(f"y: expected one measurement per sample, ({len(z)}, …), got shape {tuple(y.shape)}")
        if y.device != z.device:
            raise ValueError(f"y: expected a tensor on {z.device}, where z is, got one on {y.device}")
        self.operator, self.y, self.distance = operator, y.detach(), chosen(distance)
        self.around, self.sample_id = fold_in(seed, AROUND), sample_id

    def measure(self, x0: Tensor, radius: Number, step: int, draws: range) -> Tensor:
        """Return the distance at x0 + radius·n, (B,); of several draws -log mean exp(-distance)."""
        found = [self._once(x0, radius, step, k) for k in draws]
        if len(found) == 1:
            return found[0]
        # Pair by pair: the order of a reduction over draws could depend on the batch size.
        return math.log(len(found)) - reduce(_either, [-x for x in found])

    def _once(self, x0: Tensor, radius: Number, step: int, draw: int) -> Tensor:
        if isinstance(radius, Tensor) or radius != 0.0:
            x0 = add_noise(x0, radius, seed=fold_in(self.around, draw), step=step, sample_id=self.sample_id)
        return measured(self.distance, self.operator(x0), self.y, len(x0))


def _either(a: Tensor, b: Tensor) -> Tensor:
    """Return log(exp a + exp b), with bits independent of an element's position, unlike torch.logaddexp."""
    return torch.maximum(a, b) + torch.log1p(torch.exp(-(a - b).abs()))


def gradient(distances: Tensor, state: Tensor) -> Tensor:
    """Return the gradient of the distances' sum; by grad_outputs of ones, so that samples stay independent."""
    (found,) = torch.autograd.grad(distances, state, torch.ones_like(distances), allow_unused=True)
    if found is None:
        raise ValueError("model: expected a prediction that torch differentiates in z, got no gradient")
    return found.detach()


def leaf(z: Tensor) -> Tensor:
    """Return a state that gradients are taken with respect to."""
    return z.detach().requires_grad_()


def step_size(name: str, scale: object, batch: int, *levels: float) -> Any:
    """Return a step size, a number or a function of noise levels, as a number or a tensor (B,)."""
    found = scale(*levels) if callable(scale) else scale
    checks.check_per_sample(name, found, batch, " or a function of noise levels")
    return found


def check_size(name: str, scale: object, batch: int) -> None:
    """Raise unless a step size is a number, a tensor of one number for all or for each sample, or a function."""
    if not callable(scale):
        checks.check_per_sample(name, scale, batch, " or a function of noise levels")


def check_count(name: str, count: object) -> None:
    """Raise unless a count is an integer of at least 1."""
    if not isinstance(count, int):
        raise TypeError(f"{name}: expected an integer, got {described(count)}")
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {count}")


def check_radius(name: str, radius: object) -> None:
    """Raise unless the radius of noise is a number of at least 0."""
    checks.check_number(name, radius)
    if not radius >= 0:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a value of at least 0, got {radius}")
