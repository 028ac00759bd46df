"""The gaussian family as rows of the table of ops: a step, and densities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bicm_kernels.ops import arguments, checks
from bicm_kernels.ops.op import Op
from bicm_kernels.ops.reduction import Reduction, check_choice
from bicm_kernels.ops.row import Call

#: The codes of the schemas' reduction flag.
ADDS_UP = {"mean": False, "sum": True}
_REDUCTIONS = {adds_up: name for name, adds_up in ADDS_UP.items()}


def _check_deviation(op: Op, call: Call) -> None:
    std = dict(op.labelled(call))["std"]
    if isinstance(std, float | int) and not arguments.compiling() and not std >= 0:
        raise ValueError(f"std must be at least 0, got {std!r}")


class Step(Op):
    """A step and its log-probability, which makes its results itself."""

    @property
    def writes(self) -> bool:
        return False

    def fake(self, tensors: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
        wide = any(x.dtype == torch.float64 for x in tensors)
        row = tensors[0].new_empty(tensors[0].shape[:1], dtype=torch.float64 if wide else torch.float32)
        return torch.empty_like(tensors[0]), row

    def named(self, call: Call) -> dict[str, Any]:
        named = super().named(call)
        return named | {"reduction": _REDUCTIONS[named.pop("adds_up")]}

    def check(self, call: Call, outs: Any) -> None:
        super().check(call, outs)
        _check_deviation(self, call)


class Density(Reduction):
    """A number per sample from states, all of which it is differentiated in: (tensors, weights, guidance_scale, std,
    reduction).
    """

    def named(self, call: Call) -> dict[str, Any]:
        named = super().named(call)
        return named | {"reduction": named.pop("adds_up")}

    def plain_value(self, tensors: Sequence[Any], rest: Sequence[Any]) -> Tensor:
        weights, guidance, std, adds_up = rest
        operands: list[Any] = [*tensors]
        if self.tensors and len(operands) == len(self.tensors) + len(weights) + 1:
            operands[-2:] = [(operands[-2], operands[-1])]
        else:
            guidance = None
        value: Tensor = self.reference((operands, weights, guidance, std, _REDUCTIONS[adds_up]))
        return value

    def spelled(self, call: Call) -> tuple[Sequence[Any], Sequence[Any]]:
        tensors, full = self.spread(call)
        return tensors, (*full[1:4], ADDS_UP[full[4]])

    def rest_as_tensors(self, call: Call, rest: Sequence[Any]) -> Sequence[Any]:
        return self.as_tensors(call, [None, *rest])[1:]

    def check(self, call: Call, outs: Any) -> None:
        super().check(call, outs)
        _check_deviation(self, call)
        check_choice("reduction", call[-1], ADDS_UP)


class Divergence(Density):
    """The divergence of two means. Schemas take their tensors as one list: the reference's, then the policy's."""

    def named(self, call: Call) -> dict[str, Any]:
        named = super().named(call)
        named.pop("guidance_scale")
        half = len(call[0]) // 2
        return named | {"reference": call[0][:half], "tensors": call[0][half:]}

    def spread(self, call: Call) -> tuple[list[Tensor], list[Any]]:
        tensors, weights, _, std, reduction = call
        if len(tensors) != 2 * len(weights) or not all(isinstance(x, Tensor) for x in tensors):
            raise TypeError("as many tensors of the reference as weights, and no pairs")
        return [*tensors], [[*tensors], weights, 0.0, std, reduction]

    def check_tensors(self, call: Call) -> dict[str, Any]:
        half = len(call[0]) // 2
        names = [f"{name}[{k}]" for name in ("reference", "tensors") for k in range(half)]
        found = dict(zip(names, call[0], strict=True))
        for name in (*names[half:], *names[:half]):
            checks.check_state(name, found[name], None if name == names[half] else found[names[half]], names[half])
        return found

    def labelled(self, call: Call) -> list[tuple[str, Any]]:
        return [*[(f"weights[{k}]", weight) for k, weight in enumerate(call[1])], ("std", call[3])]

    def check_lists(self, tensors: Any, reference: Any, weights: Any) -> None:
        """Raise unless there are as many tensors of each kind as weights."""
        for name, value in (("tensors", tensors), ("reference", reference)):
            checks.check_sequence(name, value)
        if not 1 <= len(tensors) <= 5:
            raise ValueError(f"tensors must hold 1 to 5 tensors, got {len(tensors)}")
        for name, value in (("reference", reference), ("weights", weights)):
            if len(value) != len(tensors):
                raise ValueError(f"{name} must be as many as the tensors, {len(tensors)}, got {len(value)}")


GAUSSIAN_STEP = Step(
    "gaussian_step",
    guided=True,
    weights=("weights",),
    numbers=("std",),
    flags=("bool adds_up",),
    noise="std",
    outs=("next", "log_prob"),
)
GAUSSIAN_LOG_PROB = Density(
    "gaussian_log_prob", ("next",), guided=True, weights=("weights",), numbers=("std",), flags=("bool adds_up",)
)
GAUSSIAN_KL = Divergence("gaussian_kl", guided=True, weights=("weights",), numbers=("std",), flags=("bool adds_up",))
