"""The terms of a loss that is a weighted sum of distances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.objectives.evaluation import Loss
from bicm_kernels import backend, pseudo_huber


class Terms:
    """Terms, and their weighted sum; weights are applied inside the distances, so that gradients need no scaling.

    options: of `pseudo_huber`, for all distances.
    """

    def __init__(self, weights: Mapping[str, float], options: Mapping[str, Any]) -> None:
        self.weights, self.options = weights, {"kind": "squared", **options}
        self.terms: dict[str, Tensor] = {}
        self.parts: list[Tensor] = []

    def weighted(self, name: str, sign: int = 1) -> Callable[[Tensor, Tensor], Tensor]:
        """The distance of a term, times its weight and a sign."""
        weight = sign * self.weights[name]
        return partial(pseudo_huber, weight=None if weight == 1 else weight, **self.options)

    def distance(self, name: str, sample: Tensor, goal: Tensor) -> None:
        """Add D(sample, goal), a mean over samples."""
        self.add_weighted(name, self.weighted(name)(sample, goal))

    def each(self, name: str, count: int, evaluate: Callable[[Callable[[Tensor, Tensor], Tensor]], Tensor]) -> Tensor:
        """Add evaluate(D), D of every one of so many samples, and return it, (B,), detached."""
        # The weight inside makes a step's upstream gradients 1, for which a gradient kept with the value is final.
        weight = self.weights[name] / max(1, count)
        values = evaluate(partial(pseudo_huber, weight=weight, reduction="none", **self.options))
        self.add_weighted(name, values.sum() if count else values.mean())
        return values.detach() / weight

    def values(self, sample: Tensor, goal: Tensor) -> Tensor:
        """D(sample, goal) of every sample, (B,), without gradients."""
        return pseudo_huber(sample.detach(), goal.detach(), reduction="none", **self.options)

    def bounded(self, name: str, sample: Tensor, goal: Tensor, reach: Tensor, away: Tensor) -> None:
        """Subtract reach·tanh(D(sample, goal)/reach), a mean over samples; differentiable in the sample.

        reach: (B,). away: D(sample, goal), so that the derivative is known before the sample is read.
        """
        share = reach * (-self.weights[name] / max(1, len(sample)))
        divisor = reach.clamp_min(torch.finfo(reach.dtype).tiny)  # where it is 0, so is what is multiplied by it
        options = self.options  # without self, which has the term: a graph that refers to itself is never freed

        def formula(sample: Tensor) -> Tensor:
            distances = pseudo_huber(sample, goal, reduction="none", **options)
            return (share * (distances / divisor).tanh()).sum()

        if torch.compiler.is_compiling():
            self.add_weighted(name, formula(sample))
            return
        level = (away / divisor).tanh()
        slope = share / divisor * (1 - level * level)
        tangent = pseudo_huber(sample, goal, weight=slope, reduction="sum", **options)
        again = (formula, sample) if _keeps_inputs(sample, options["gradient"]) else (None, None)
        self.add_weighted(name, _Valued.apply((share * level).sum(), tangent, *again))

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


def _keeps_inputs(sample: Tensor, gradient: str) -> bool:
    """Whether `pseudo_huber` has the derivatives of its gradient: see there for halves."""
    return gradient != "forward" or sample.dtype.itemsize == 2 or backend.running(sample.device.type) == "reference"


class _Valued(torch.autograd.Function):
    """A value with the derivative of a tangent, or where that is differentiated, of a formula if there is one."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, tangent: Tensor, formula: Callable[[Tensor], Tensor] | None, sample: Tensor | None
    ) -> Tensor:
        ctx.formula = formula
        ctx.save_for_backward(sample)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.formula is None or not torch.is_grad_enabled():
            return None, upstream[0], None, None
        (sample,) = ctx.saved_tensors
        return None, None, None, *torch.autograd.grad(ctx.formula(sample), (sample,), upstream, create_graph=True)
