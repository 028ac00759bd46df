"""The terms of a loss that is a weighted sum of distances: weights inside them, one gradient for several goals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.objectives.evaluation import Loss
from bicm_kernels import affine_step, pseudo_huber


class Terms:
    """Terms, and their weighted sum; weights are applied inside the distances, so that gradients need no scaling.

    options: of `pseudo_huber`, for all distances.
    """

    def __init__(self, weights: Mapping[str, float], options: Mapping[str, Any]) -> None:
        self.weights, self.options = weights, {"kind": "squared", **options}
        self.terms: dict[str, Tensor] = {}
        self.parts: list[Tensor] = []

    def weighted(self, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        """The distance of a term, times its weight."""
        weight = self.weights[name]
        return partial(pseudo_huber, weight=None if weight == 1 else weight, **self.options)

    def distance(self, name: str, sample: Tensor, goal: Tensor) -> None:
        """Add D(sample, goal), a mean over samples."""
        self.add_weighted(name, self.weighted(name)(sample, goal))

    def distances(self, names: tuple[str, str], sample: Tensor, goals: tuple[Tensor, Tensor]) -> None:
        """Add D(sample, goal) of two goals."""
        given = self.options["kind"], self.options.get("c"), self.options["gradient"]
        found = None
        if given in _SHARED and not (torch.compiler.is_compiling() or any(goal.requires_grad for goal in goals)):
            with suppress(RuntimeError):  # transforms of torch.func and forward derivatives refuse it
                found = _TwoSquares.apply(sample, *goals, [self.weights[name] for name in names])
        if found is None:
            for name, goal in zip(names, goals, strict=True):
                self.distance(name, sample, goal)
            return
        part, *terms = found
        self.parts.append(part)
        self.terms.update(zip(names, terms, strict=True))

    def each(self, name: str, sample: Tensor, goal: Tensor) -> Tensor:
        """Add D(sample, goal), and return that of every sample, (B,), detached."""
        # The weight inside makes a step's upstream gradients 1, for which a gradient kept with the value is final.
        weight = self.weights[name] / max(1, len(sample))
        if not weight:
            values = pseudo_huber(sample.detach(), goal, reduction="none", **self.options)
            self.terms[name] = values.mean()
            return values
        values = pseudo_huber(sample, goal, weight=weight, reduction="none", **self.options)
        self.add_weighted(name, values.sum())
        return values.detach() / weight

    def add_weighted(self, name: str, part: Tensor) -> None:
        """Add a term that has been multiplied by its weight."""
        weight = self.weights[name]
        self.parts.append(part)
        self.terms[name] = part if weight == 1 else part / weight

    def add(self, name: str, term: Tensor, *, weight: float | None = None) -> None:
        """Add a term with weight 1."""
        self.terms[name] = term
        self.parts.append(term * (self.weights[name] if weight is None else weight))

    def loss(self) -> Loss:
        """The sum."""
        total = self.parts[0]
        for part in self.parts[1:]:
            total = total + part
        return Loss(total, self.terms)


#: Options of distances whose gradients are one affine map of the sample and its goals.
_SHARED = [("squared", None, gradient) for gradient in ("auto", "backward")]


class _TwoSquares(torch.autograd.Function):
    """Mean ‖sample - goal‖² of two goals: their weighted sum, and each.

    The gradient of the sum is formed in the backward pass by one op, instead of two that are kept and then added. It is
    that of the distance from a weighted mean of the goals, which is exactly 0 where both are the sample.
    """

    @staticmethod
    def forward(ctx: Any, sample: Tensor, goal: Tensor, other: Tensor, weights: Sequence[float]) -> tuple[Tensor, ...]:
        ctx.weights = weights
        ctx.save_for_backward(sample, goal, other)
        ctx.set_materialize_grads(False)
        terms = [pseudo_huber(sample, x, kind="squared") for x in (goal, other)]
        return weights[0] * terms[0] + weights[1] * terms[1], *terms

    @staticmethod
    def backward(ctx: Any, part: Tensor | None, *terms: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        sample, *goals = ctx.saved_tensors
        of_mean, gradient = 2 / max(1, len(sample)), None
        if part is not None:
            total = sum(ctx.weights)
            factor = part * (of_mean * total)
            gradient = affine_step([sample, tuple(goals)], [factor, -factor], guidance_scale=ctx.weights[1] / total)
        for term, goal in zip(terms, goals, strict=True):
            if term is not None:
                own = (of_mean * term * (sample - goal)).to(sample.dtype)
                gradient = own if gradient is None else gradient + own
        return gradient, None, None, None
