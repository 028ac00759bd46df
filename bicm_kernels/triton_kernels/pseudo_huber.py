"""Pseudo-Huber losses: sums of chunks, then of samples and of the batch; and the derivatives from the inputs again.

Chunks depend on a sample's size alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicm_kernels.triton_kernels import checks
from bicm_kernels.triton_kernels.checks import Number
from bicm_kernels.triton_kernels.counter import counted
from bicm_kernels.triton_kernels.keys import Argument, number_argument
from bicm_kernels.triton_kernels.operands import TILE, WARPS, Layout, device_of, lay_out
from bicm_kernels.triton_kernels.pseudo_huber_gradients import gradients, resident, scale
from bicm_kernels.triton_kernels.pseudo_huber_kernels import sums

CHUNK = 8 * TILE  # elements that one program sums
#: Elements of a sample whose float32 residuals fit in the registers of a program, for every distance.
RESIDENT = 3 * TILE
#: Samples finished together, by whether distances are elementwise: the largest numbers that compile without spills.
FINISH_BLOCK = {False: 128, True: 256}
PARAMETERIZATIONS = ("bcm", "cm", "edm")
REDUCTIONS = ("mean", "sum", "none")


class LossCall:
    """A loss's checked arguments, in the form that the kernels take."""

    def __init__(
        self,
        inputs: Sequence[Tensor],
        levels: Sequence[Number],
        weight: Number | None,
        c: Number | None,
        form: str,
        scaled: bool,
        kind: int,
        reduction: int,
    ) -> None:
        self.inputs, self.elementwise, self.squared = list(inputs), kind == 1, kind == 2
        self.reduction, self.form, self.scaled = REDUCTIONS[reduction], form, scaled
        first = inputs[0]
        self.batch, self.elements = first.shape[0], math.prod(first.shape[1:])
        self.float64 = any(x.dtype == torch.float64 for x in inputs)
        self.compute = torch.float64 if self.float64 else torch.float32
        self.levels = tuple([self.number(value) for value in levels])
        self.element_weight = [weight] if isinstance(weight, Tensor) and weight.dim() > 1 else []
        checks.check_states([*inputs, *self.element_weight], len(inputs))
        self.weight = 1.0 if weight is None or self.element_weight else weight
        checks.require(c is not None or not self.elementwise, "elementwise needs c")
        checks.require(c is None or not self.squared, "squared takes no c")
        checks.require(isinstance(c, Tensor) or c is None or c >= 0, "c must not be negative")
        self.c = 0.00054 * math.sqrt(self.elements) if c is None else c

    @property
    def transition(self) -> Argument | None:
        """c, which the squared distance does not use."""
        return None if self.squared else self.number(self.c)

    def number(self, value: Number) -> Argument:
        """A number in the compute type."""
        return number_argument(value, self.compute, self.inputs[0])

    def operands(self, layout: Layout, first: int) -> dict[str, Any]:
        """The inputs' pointers and strides from an index on, and the arguments shared by every kernel."""
        prediction, target, *x = layout.operands[first : first + len(self.inputs)]
        return {
            "prediction": prediction,
            "target": target,
            "x": x[0] if x else None,
            "levels": self.levels,
            "FORM": self.form,
            "SCALED": self.scaled,
            "ELEMENTWISE": self.elementwise,
            "COMPUTE": tl.float64 if self.float64 else tl.float32,
        }

    @property
    def each(self) -> bool:
        """Whether every sample has its own loss (reduction "none")."""
        return self.reduction == "none"

    def numbers(self) -> tuple[Tensor, Tensor]:
        """The loss and the samples' sums, uninitialised."""
        loss = self.inputs[0].new_empty((self.batch,) if self.each else (), dtype=self.compute)
        return loss, self.inputs[0].new_empty((self.batch,), dtype=torch.float64)

    def summing(self, layout: Layout) -> dict[str, Any]:
        """Arguments of the summing kernels: how chunks are divided, and how their sums are combined."""
        columns = min(TILE, max(8, triton.next_power_of_2(self.elements)))
        return {
            "sizes": layout.plan.sizes,
            "batch": self.batch,
            "elements": self.elements,
            "c": self.transition,
            "weight": self.number(self.weight),
            "REDUCTION": self.reduction,
            "COLUMNS": columns,
            "STEPS": -(-min(self.elements, CHUNK) // columns),
            "BLOCK": FINISH_BLOCK[self.elementwise],
            "INDEX": layout.index,
            "num_warps": WARPS,
            "enable_fp_fusion": False,
            **self.operands(layout, 0),
        }

    def counted(self, programs: int) -> AbstractContextManager[dict[str, Any]]:
        """What programs that sum count themselves by, where the last of them makes the loss."""
        alone = self.elements <= CHUNK and (self.each or self.batch == 1)
        return counted(self.inputs[0].device, None if alone else programs)

    def value(self) -> tuple[Tensor, Tensor]:
        """The loss and the samples' sums."""
        first = self.inputs[0]
        loss, totals = self.numbers()
        if not self.batch:
            return loss if self.each else loss.fill_(math.nan if self.reduction == "mean" else 0.0), totals
        layout = lay_out([*self.inputs, *self.element_weight], per_sample=True, in_order=False)
        chunks = max(1, -(-self.elements // CHUNK))
        with device_of(first), self.counted(self.batch * chunks) as count:
            sums[(self.batch * chunks,)](
                **count,
                totals=totals,
                partial=totals if chunks == 1 else first.new_empty((self.batch * chunks,), dtype=torch.float64),
                loss=loss.reshape(-1),
                chunks=chunks,
                element_weight=layout.operands[-1] if self.element_weight else None,
                **self.summing(layout),
            )
        return loss, totals

    def value_and_gradients(self, needs: int) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the derivatives for an upstream of 1; one program per sample, where its residuals fit."""
        results = self.outputs(needs)
        layout = lay_out([*self.inputs, *results.values()], per_sample=True, in_order=False)
        fits = 0 < self.elements <= RESIDENT and not (self.float64 or layout.plan.sizes or self.element_weight)
        if not (fits and results and self.batch):
            loss, totals = self.value()
            return loss, self.differentiate(1.0, totals, results)
        loss, totals = self.numbers()
        with device_of(self.inputs[0]), self.counted(self.batch) as count:
            resident[(self.batch,)](
                **count,
                outs=self.places(results, layout.operands[len(self.inputs) :]),
                totals=totals,
                loss=loss.reshape(-1),
                **self.summing(layout),
            )
        return loss, list(results.values())

    def gradients(self, upstream: Tensor, totals: Tensor, needs: int) -> list[Tensor]:
        """The derivatives of the inputs whose bit is set."""
        shape = (self.batch,) if self.each else ()
        checks.require(upstream.shape == shape, "the gradient must have the shape of the loss")
        fits = totals.shape == (self.batch,) and totals.dtype == torch.float64 and totals.is_contiguous()
        checks.require(fits and totals.device == self.inputs[0].device, "sums must be what the forward pass returned")
        return self.differentiate(upstream, totals, self.outputs(needs))

    def outputs(self, needs: int) -> dict[int, Tensor]:
        """Tensors for the derivatives, by the place of their inputs."""
        return {k: torch.empty_like(x) for k, x in enumerate(self.inputs) if needs >> k & 1}

    def places(self, results: dict[int, Tensor], operands: Sequence[Any]) -> tuple[Any, ...]:
        """The operands of the derivatives, None where there is none."""
        found = dict(zip(results, operands, strict=False))
        return tuple([found.get(k) for k in range(3)])

    def differentiate(self, upstream: Number, totals: Tensor, results: dict[int, Tensor]) -> list[Tensor]:
        """Fill the derivatives."""
        tensors = [*results.values(), *self.inputs, *self.element_weight]
        layout = lay_out(tensors, per_sample=True, in_order=False)
        layout.launch(
            gradients,
            outs=self.places(results, layout.operands),
            c=self.transition,
            weight=self.number(self.weight),
            upstream=self.number(upstream),
            totals=totals,
            element_weight=layout.operands[-1] if self.element_weight else None,
            REDUCTION=self.reduction,
            **self.operands(layout, len(results)),
        )
        return list(results.values())


def distance_of(
    pred: Tensor, target: Tensor, weight: Number | None, c: Number | None, kind: int, reduction: int
) -> LossCall:
    """The loss of a schema of pseudo_huber."""
    return LossCall((pred, target), (), weight, c, "", False, kind, reduction)


def consistency_of(
    F: Tensor,
    target: Tensor,
    x: Tensor,
    t: Number,
    u: Number | None,
    weight: Number | None,
    c: Number | None,
    sigma_data: Number,
    sigma_min: Number,
    parameterization: int,
    scaled: int,
    kind: int,
    reduction: int,
) -> LossCall:
    """The loss of a schema of consistency_loss."""
    name = PARAMETERIZATIONS[parameterization]
    checks.require(u is None or name == "bcm", "only bcm takes u")
    end: Number = 0.0 if name == "edm" else sigma_min if u is None else u
    form = "cm" if name == "cm" else "bcm"
    return LossCall((F, target, x), (t, end, sigma_data), weight, c, form, scaled == 1, kind, reduction)


def scale_gradients(upstream: Tensor, kept: Sequence[Tensor]) -> None:
    """Multiply gradients for an upstream of 1 by another, in place."""
    for x in kept:
        compute = tl.float64 if x.dtype == torch.float64 else tl.float32
        argument = number_argument(upstream, torch.float64 if x.dtype == torch.float64 else torch.float32, x)
        layout = lay_out([x], per_sample=True, in_order=False)
        layout.launch(scale, gradient=layout.operands[0], upstream=argument, COMPUTE=compute)


def passes(make: Callable[..., LossCall]) -> tuple[Callable[..., Any], ...]:
    """A loss's op, its derivative and both at once, for numbers and for tensors alike."""

    def value(*call: Any) -> tuple[Tensor, Tensor]:
        return make(*call).value()

    def derivative(upstream: Tensor, totals: Tensor, needs: int, *call: Any) -> list[Tensor]:
        return make(*call).gradients(upstream, totals, needs)

    def both(needs: int, *call: Any) -> tuple[Tensor, list[Tensor]]:
        return make(*call).value_and_gradients(needs)

    return value, derivative, both


def implementations() -> dict[str, Callable[..., Any]]:
    """Every overload of the family by the name of its schema."""
    found: dict[str, Callable[..., Any]] = {"scale_gradients_": scale_gradients}
    for name, make in (("pseudo_huber", distance_of), ("consistency_loss", consistency_of)):
        for suffix, function in zip(("", "_backward", "_with_gradients"), passes(make), strict=True):
            found |= {f"{name}{suffix}": function, f"{name}{suffix}.tensor": function}
    return found
