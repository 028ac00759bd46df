"""The losses as rows of the table of ops: pseudo-Huber distances of two states, or of a denoised state and another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from bicm_kernels import backend
from bicm_kernels.ops import arguments, checks
from bicm_kernels.ops.op import direct_call, may_go_direct
from bicm_kernels.ops.reduction import Reduction, check_choice
from bicm_kernels.ops.reduction_functions import APPLIES, GRADIENTS
from bicm_kernels.ops.row import Call, Types
from bicm_kernels.torch_internals import undisturbed

CODES: dict[str, dict[Any, int]] = {
    "parameterization": {"bcm": 0, "cm": 1, "edm": 2},
    "scaled": {False: 0, True: 1},
    "kind": {"vector": 0, "elementwise": 1, "squared": 2},
    "reduction": {"mean": 0, "sum": 1, "none": 2},
}
_NAMES = {name: tuple(codes) for name, codes in CODES.items()}
_PER_SAMPLE = CODES["reduction"]["none"]


def element_weight(weight: Tensor | None, first: Tensor) -> Tensor | None:
    """A weight as the kernels take it: masks as numbers, weights of elements like the inputs, without a copy."""
    if weight is None:
        return None
    if weight.dtype == torch.bool:
        weight = weight.to(first.dtype)
    if 0 < weight.dim() == first.dim() and weight.shape != first.shape:
        weight = weight.expand(first.shape)
    return weight


def _unsqueezed(weight: Tensor, first: Tensor) -> str:
    """A hint how to unsqueeze a mask that lacks dimensions, such as one of pixels."""
    forms = {"weight[None]": weight[None], "weight[None, None]": weight[None, None]}
    if weight.dim() > 1:
        forms["weight[:, None]"] = weight[:, None]
    fitting = [how for how, value in forms.items() if _broadcasts(value, first)]
    return f"; pass {' or '.join(fitting)}" if fitting else ""


def _broadcasts(weight: Tensor, first: Tensor) -> bool:
    return weight.dim() == first.dim() and all(a in (1, b) for a, b in zip(weight.shape, first.shape, strict=True))


def check_weight(weight: object, first: Tensor, first_name: str) -> None:
    """Raise unless a weight is a number, or floating or a mask, and one number, one per sample or one per element."""
    if not isinstance(weight, Tensor):
        if not isinstance(weight, Real | torch.SymFloat | torch.SymInt):
            what = checks.describe(weight)
            raise TypeError(f"weight must be a float, a floating tensor or a bool mask, got {what}")
        return
    if weight.dtype != torch.bool and weight.dtype not in checks.FLOATING:
        raise TypeError(f"weight must be a floating tensor or a bool mask, got {weight.dtype}")
    per_sample = weight.dim() == 1 and len(weight) == len(first)
    if weight.dim() and not per_sample and not _broadcasts(weight, first):
        shape, given = tuple(first.shape), tuple(weight.shape)
        raise ValueError(
            f"weight must be 0-d, ({len(first)},) or broadcast to the shape of {first_name}, {shape}, "
            f"with as many dimensions, got shape {given}{_unsqueezed(weight, first)}"
        )
    if weight.device != first.device and not (weight.dim() == 0 and weight.device.type == "cpu"):
        raise ValueError(f"weight must be on {first.device}, got {weight.device}")


@dataclass(eq=False)
class LossOp(Reduction):
    """A loss: tensors, the first of which are states; numbers; and flags, which have codes."""

    states_end: int | None = 2
    sums: ClassVar[int] = 1
    goes_direct: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        tables = [CODES[name] for name in self.flag_names]
        #: The codes of names.
        self.codes = {names: tuple(t[n] for t, n in zip(tables, names, strict=True)) for names in product(*tables)}

    def loss(self, tensors: Sequence[Any], numbers: Sequence[Any], names: tuple[Any, ...], gradient: str) -> Tensor:
        """The value of a call, past the dispatcher where possible."""
        direct = backend.direct
        if direct is not None and not arguments.dynamo():
            try:
                way, rest, given = GRADIENTS[gradient], (*numbers, *self.codes[names]), tensors
                for x in tensors:
                    tensor = x is not None and type(x) is not float and isinstance(x, Tensor)
                    if tensor and x.is_inference() and torch.is_grad_enabled():
                        raise ValueError("torch saves no tensor of inference mode")
                if type(tensors[-1]) is float and undisturbed():
                    given = (*tensors[:-1], arguments.coefficient(tensors[-1]))
                operands = given
                found = getattr(direct, self.name)(way, *given, *rest)
                if found is None:
                    # Floats among the tensors, a mask, or a weight that is to be expanded.
                    operands = self.laid_out(tensors) if undisturbed() else tensors
                    if may_go_direct() or any(a is not b for a, b in zip(given, operands, strict=True)):
                        found = direct_call(self.name, way, *operands, *rest)
                if type(found) is tuple:
                    kept, needs, tracked, *made = found
                    apply = APPLIES[gradient if kept else "backward"]
                    found = apply((self, self.kernels["bare"], rest, needs), made, operands, *tracked)
                if found is not None:
                    value: Tensor = found
                    return value
            except arguments.FAILURES:
                pass  # the long way says why
        return self.reduced((*tensors, *numbers, *names), gradient)

    def parameters(self, types: Types) -> list[str]:
        number = types[0].rstrip("?")
        kinds = [*[("Tensor", name) for name in self.tensors], *[(number, name) for name in self.numbers]]
        found = [f"{kind}{'?' * (name in self.optional)} {name}" for kind, name in kinds]
        return [*found, *self.flags]

    def value_like(self, tensors: Sequence[Any], rest: Sequence[Any]) -> Tensor:
        each = super().value_like(tensors, rest)
        return each if rest[-1] == _PER_SAMPLE else each.new_empty(())

    def plain_value(self, tensors: Sequence[Any], rest: Sequence[Any]) -> Tensor:
        count = len(self.numbers)
        names = [_NAMES[name][code] for name, code in zip(self.flag_names, rest[count:], strict=True)]
        value: Tensor = self.reference((*tensors, *rest[:count], *names))
        return value

    def spelled(self, call: Call) -> tuple[Sequence[Any], Sequence[Any]]:
        at, names = self.first_number, self.first_integer  # there are no integers: names come next
        return call[:at], (*call[at:names], *self.codes[tuple(call[names:])])

    def laid_out(self, tensors: Sequence[Any]) -> Sequence[Any]:
        *levels, weight = arguments.coefficients(tensors[self.states_end :])
        return (*tensors[: self.states_end], *levels, element_weight(weight, tensors[0]))

    def rest_as_tensors(self, call: Call, rest: Sequence[Any]) -> Sequence[Any]:
        count = len(self.numbers)
        return (*arguments.coefficients(rest[:count]), *rest[count:])

    def check(self, call: Call, outs: Any) -> None:
        values = dict(zip((*self.tensors, *self.numbers, *self.flag_names), call, strict=True))
        first = "x" if "x" in values else self.tensors[0]
        checks.check_state(first, values[first])
        if values["target"] is None and values.get("u") is not None:
            given = checks.describe(values["u"])
            raise TypeError(f"target must be given by name, target=…, where u is left out, got None, and {given} as u")
        for name in self.tensors[: self.states_end]:
            checks.check_state(name, values[name], values[first], first)
        for name in (*self.tensors[self.states_end :], *self.numbers):
            if name == "weight" and values[name] is not None:
                check_weight(values[name], values[first], first)
            elif values[name] is not None or name not in self.optional:
                checks.check_number(name, values[name], values[first])
        for name in self.flag_names:
            check_choice(name, values[name], CODES[name])
        c = values["c"]
        if c is None and values["kind"] == "elementwise":
            raise ValueError("c must be given for kind='elementwise', where it has no default, got None")
        if c is not None and values["kind"] == "squared":
            raise ValueError(f"c must be None for kind='squared', which does not use it, got {checks.describe(c)}")
        if isinstance(c, float | int) and not arguments.compiling() and not c >= 0:
            raise ValueError(f"c must be at least 0, got {c!r}")
        if (u := values.get("u")) is not None and (name := values["parameterization"]) != "bcm":
            given = checks.describe(u)
            raise ValueError(f"u must be None for parameterization={name!r}: only 'bcm' takes it, got {given}")


PSEUDO_HUBER = LossOp(
    "pseudo_huber", ("pred", "target", "weight?"), numbers=("c?",), flags=("int kind", "int reduction")
)
CONSISTENCY_LOSS = LossOp(
    "consistency_loss",
    ("F", "target", "x", "t", "u?", "weight?"),
    numbers=("c?", "sigma_data", "sigma_min"),
    flags=("int parameterization", "int scaled", "int kind", "int reduction"),
    states_end=3,
)
