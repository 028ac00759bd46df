"""Exact steps as rows of the table of ops: they also take a buffer, a ratio and a place to note overflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bicm_kernels import reference
from bicm_kernels.ops import arguments, reversible_checks
from bicm_kernels.ops.library import define, without_lists
from bicm_kernels.ops.op import PLAIN, Call, Op, Types, write_nothing
from bicm_kernels.ops.reversible_checks import FRACTION_BITS, refuse_derivative

Pair = tuple[Tensor, Tensor]


@dataclass(eq=False)
class ExactStep(Op):
    """An exact step: (first state, other tensors, info, coefficients, guidance_scale, ratio, fraction_bits, overflow,
    mark).

    A ratio of 1 needs no buffer: the op then returns, and takes as info_out, an empty tensor. An empty overflow notes
    nothing. With tensors, n and m of None are 1.
    """

    guided: bool = True
    outs: tuple[str, ...] = ("out", "info_out", "overflow")
    results: int = 2
    #: What the ratio n/m is called.
    ratio: str = "ratio"

    def parameters(self, types: Types) -> list[str]:
        tensors, *numbers = super().parameters(types)
        return [tensors, "Tensor info", *numbers, f"{types[2][1]} n", f"{types[2][1]} m", "SymInt fraction_bits"]

    def extra(self, types: Types) -> list[str]:
        return [f"{types[2][1].rstrip('?')} mark"]

    def states(self) -> tuple[str, ...]:
        return "tensors", "info", "out", "info_out"

    def fake(self, tensors: list[Tensor], info: Tensor, *rest: Any) -> Pair:
        n, m = rest[2:4]
        unit = n is None if n is None or isinstance(n, Tensor) else n == m
        return torch.empty_like(tensors[0]), info.new_empty((0,)) if unit else torch.empty_like(info)

    def run(self, call: Call, outs: Any) -> Pair:
        last, operands, info, table, guidance, ratio, fraction_bits, overflow, mark = call
        if self.weights:
            table = arguments.weight_list("weights", table)
        call = (last, operands, info, table, *call[4:])
        try:
            if any(isinstance(x, Tensor) for x in (operands, ratio, outs)):
                raise TypeError("one tensor for a sequence of them")
            n, m = ratio
            unit = not isinstance(n, Tensor) and not isinstance(m, Tensor) and n == m
            step = ((last, *operands), table, guidance)
            tensors, (_, *values) = self.spread(step)
            integers = (n, m, fraction_bits)
            simple = self.simple((tensors, *values)) and PLAIN.issuperset(map(type, integers))
            if outs is overflow is None and simple and arguments.quiet(last, tensors):
                result, kept = self.bare(tensors, info, *values, *integers)
                return result, info if unit else kept
            refuse_derivative(*tensors, *arguments.numbers(values))
            fallback = arguments.needs_reference(last, tracked=False)
            if fallback or arguments.unseen(last):
                self.check(call, outs)
            if fallback:
                return _keep(outs, *self.reference(call))
            given = _outputs(last, info, unit, overflow, outs)
            if arguments.plain(values) and arguments.plain((*integers, mark)):
                overload = self.default if given is None else self.out
                full = [*values, *integers]
                marks = [mark]
            else:
                # A tensor cannot tell any more what is wrong with the number that it was.
                self.check_integers(last, ratio, fraction_bits, mark)
                overload = self.tensor if given is None else self.tensor_out
                parts = (None, None) if unit else (arguments.integer(n), arguments.integer(m))
                full = [*arguments.coefficients([values[0], guidance]), *parts, fraction_bits]
                marks = [arguments.integer(mark)]
            if arguments.scripting():
                overload = without_lists(overload)
            if given is None:
                result, kept = overload(tensors, info, *full)
            else:
                overload(tensors, info, *full, *marks, **dict(zip(self.outs, given, strict=True)))
                result, kept, _ = given
            return _keep(outs, result, info if unit else kept)
        except arguments.FAILURES as error:
            arguments.explain(error, lambda: self.check(call, outs))

    def named(self, call: Call) -> dict[str, Any]:
        last, operands, info, table, guidance, ratio, fraction_bits, overflow, mark = call
        given = {"info": info, self.ratio: ratio, "fraction_bits": fraction_bits, "overflow": overflow, "mark": mark}
        return super().named(((last, *operands), table, guidance)) | given

    def check(self, call: Call, outs: Any) -> None:
        last, operands, info, table, guidance, ratio, fraction_bits, overflow, mark = call
        first = self.tensors[0]
        self.check_tensor(first, last, None, first)
        arguments.check_sequence("tensors", operands)
        step = ((last, *operands), table, guidance)
        tensors = self.check_tensors(step)
        reversible_checks.check_info(info, last, first)
        for name, number in self.labelled(step):
            arguments.check_number(name, number, last)
        self.check_integers(last, ratio, fraction_bits, mark)
        reversible_checks.check_overflow(overflow, mark, last.shape[0], last.device)
        if outs is not None:
            reversible_checks.check_outs(outs, tensors | {"info": info})

    def check_integers(self, last: Tensor, ratio: Any, fraction_bits: object, mark: object) -> None:
        """Raise unless the integers beside the tensors are in range."""
        reversible_checks.check_ratio(self.ratio, ratio, last)
        reversible_checks.check_fraction_bits(fraction_bits, last.dtype)
        arguments.check_integer("mark", mark, last.shape[0], last.device, 1, 2**63)

    def check_tensor(self, name: str, x: object, first: Tensor | None, first_name: str) -> None:
        """A network's output and a state in floating point can be weighed, and a fixed-point state."""
        fixed = isinstance(x, Tensor) and x.dtype in FRACTION_BITS
        if first is None or name == "q" or (fixed and name != "eps"):
            reversible_checks.check_fixed_point(name, x, first, first_name)
        else:
            arguments.check_state(name, x, first, first_name)


_BDIA: dict[str, Any] = {"coefficients": ("a", "b", "a_last", "b_last"), "ratio": "gamma"}
AFFINE_STEP = ExactStep("exact_affine_step", ("q_last",), weights=("weights",))
AFFINE_INVERSE_STEP = ExactStep("exact_affine_inverse_step", ("q_next",), weights=("weights",))
BDIA_STEP = ExactStep("bdia_exact_step", ("q_last", "q", "eps"), **_BDIA)
BDIA_INVERSE_STEP = ExactStep("bdia_exact_inverse_step", ("q_next", "q", "eps"), **_BDIA)


def _fake_encode(x: Tensor, fraction_bits: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@dataclass(eq=False)
class Decode(Op):
    """The numbers that a state stands for: (state, fraction_bits, dtype)."""

    def define(self) -> None:
        define(f"{self.name}(Tensor x, SymInt fraction_bits, ScalarType dtype) -> Tensor", ["x"], _fake_encode)

    def run(self, call: Call, outs: Any) -> Tensor:
        q, fraction_bits, dtype = call
        try:
            fallback = arguments.needs_reference(q, tracked=False)
            if fallback or arguments.unseen(q):
                reversible_checks.check_decode(*call)
            if fallback:
                return reference.fixed_point_decode(q, fraction_bits=fraction_bits, dtype=dtype)
            return self.default(*call)
        except arguments.FAILURES as error:
            arguments.explain(error, lambda: reversible_checks.check_decode(*call))


DECODE = Decode("fixed_point_decode")

_MARKED = "Tensor mark, *, Tensor(a!) out, Tensor(b!) overflow"
define("fixed_point_encode(Tensor x, SymInt fraction_bits, ScalarType dtype) -> Tensor", ["x"], _fake_encode)
define(f"fixed_point_encode.out(Tensor x, SymInt fraction_bits, {_MARKED}) -> ()", ["x", "out"], write_nothing)


def _outputs(
    last: Tensor, info: Tensor, unit: bool, overflow: Tensor | None, outs: Pair | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What the kernel writes to: (out, info_out, overflow); None where it may allocate its results."""
    if outs is None and overflow is None:
        return None
    result, kept = (torch.empty_like(last), None) if outs is None else outs
    nothing = info.new_empty((0,))
    if unit:
        kept = nothing
    elif kept is None:
        kept = torch.empty_like(info)
    return result, kept, nothing if overflow is None else overflow


def _keep(outs: Pair | None, result: Tensor, kept: Tensor) -> Pair:
    """The results, in the caller's outputs where there are any."""
    if outs is None:
        return result, kept
    for out, x in zip(outs, (result, kept), strict=True):
        if out is not x:
            out.copy_(x)
    return outs[0], outs[1]
