"""The terms of a loss that is a weighted sum of distances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from bicm_diffusion.objectives.evaluation import Loss
from bicm_kernels import pseudo_huber


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
