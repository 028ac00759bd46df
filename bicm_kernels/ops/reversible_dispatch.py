"""The reversible family as rows of the table of ops: integers have no derivative, and overflow is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bicm_kernels.ops import arguments, checks, outputs, reversible_checks
from bicm_kernels.ops.op import Op
from bicm_kernels.ops.reversible_checks import FRACTION_BITS, check_fixed_point
from bicm_kernels.ops.row import Call, Types

Pair = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Encode(Op):
    """An op on integers, without a derivative. Its call ends with overflow, or None, and mark."""

    outs: tuple[str, ...] = ("out", "overflow")
    results: int = 1
    respells: ClassVar[bool] = True

    def extra(self, types: Types) -> list[str]:
        return [f"{types[2][1].rstrip('?')} mark"]

    def states(self) -> tuple[str, ...]:
        return tuple(name for name in super().states() if name != "overflow")

    def returns(self, call: Call, outs: Any) -> bool:
        return outs is None and call[-2] is None

    def is_writable(self, call: Call, outs: Any) -> bool:
        return outs is None and call[-2] is None

    def step(self, call: Call) -> Call:
        return call[:-2]

    def tracking(self, tensors: list[Tensor], full: Call, outs: Any) -> tuple[bool, bool]:
        reversible_checks.refuse_derivative(*tensors, *arguments.numbers(full[self.first_number :]))
        return False, False

    def loose(self, call: Call, full: Call) -> Sequence[Any]:
        return *super().loose(call, full), call[-1]

    def places(self, call: Call, outs: Any) -> Sequence[Tensor]:
        x, _, dtype, overflow, _ = call
        reversible_checks.check_encode(*call)
        return torch.empty_like(x, dtype=dtype), overflow

    def extras(self, call: Call, plain: bool) -> Sequence[Any]:
        return (call[-1] if plain else arguments.integer(call[-1]),)

    def named(self, call: Call) -> dict[str, Any]:
        return super().named(self.step(call)) | {"overflow": call[-2], "mark": call[-1]}

    def check(self, call: Call, outs: Any) -> None:
        reversible_checks.check_encode(*call)


@dataclass(eq=False)
class Decode(Op):
    """The numbers that a state represents: (state, fraction_bits, dtype)."""

    def check(self, call: Call, outs: Any) -> None:
        reversible_checks.check_decode(*call)


@dataclass(eq=False)
class ExactStep(Encode):
    """An exact step: (first state, other tensors, info, coefficients, guidance_scale, ratio, fraction_bits, overflow,
    mark).

    A ratio of 1 needs no buffer: the op then returns, and takes as info_out, an empty tensor. An empty overflow records
    nothing. With tensors, n and m of None are 1.
    """

    respells: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    guided: bool = True
    others: tuple[str, ...] = ("info",)
    integers: tuple[str, ...] = ("n", "m")
    flags: tuple[str, ...] = ("SymInt fraction_bits",)
    outs: tuple[str, ...] = ("out", "info_out", "overflow")
    results: int = 2
    #: The name of the ratio argument n/m.
    ratio: str = "ratio"

    def fake(self, tensors: list[Tensor], info: Tensor, *rest: Any) -> Pair:
        n, m = rest[2:4]
        unit = n is None if n is None or isinstance(n, Tensor) else n == m
        return torch.empty_like(tensors[0]), info.new_empty((0,)) if unit else torch.empty_like(info)

    def listed(self, call: Call) -> Call:
        weights = arguments.weight_list("weights", call[3])  # the first state and the other tensors come apart
        return (*call[:3], weights, *call[4:])

    def run(self, call: Call, outs: Any) -> Any:
        given = isinstance(outs, tuple | list) and len(outs) == 2 and isinstance(call[2], Tensor)
        if given and outputs.is_same(outs[0], call[2]):
            # The buffer is read after the state was written where the ratio is 1.
            call = (*call[:2], call[2].clone(), *call[3:])
        return super().run(call, outs)

    def step(self, call: Call) -> Call:
        last, operands, info, table, guidance, ratio, fraction_bits, _, _ = call
        # The types that most calls have are asked for first.
        known = type(ratio) is tuple and type(operands) in (list, tuple)
        if not known and (arguments.is_tensor(operands) or arguments.is_tensor(ratio)):
            raise TypeError("one tensor for a sequence of them")
        n, m = ratio
        return (last, *operands), info, table, guidance, n, m, fraction_bits

    def as_tensors(self, step: Call, full: Call) -> list[Any]:
        # Checked before conversion, because a tensor's value is not read later.
        self.check_integers(step[0][0], step[4:6], step[6])
        values = super().as_tensors(step, full)
        if is_one(step[4:6]):
            values[self.first_integer : self.first_flag] = None, None
        return values

    def with_given(self, call: Call, results: Any) -> Pair:
        return results[0], call[2] if is_one(call[5]) else results[1]

    def places(self, call: Call, outs: Any) -> Sequence[Tensor]:
        last, _, info, *_, ratio, _, overflow, mark = call
        if isinstance(outs, Tensor):
            raise TypeError("one tensor for a sequence of them")
        checks.check_integer("mark", mark, last.shape[0], last.device, 1, 2**63)
        if outs is not None and (is_one(ratio) or any(x is None for x in outs)):
            self.check(call, outs)  # the kernel does not see the second
        out, kept = (torch.empty_like(last), None) if outs is None else outs
        nothing = info.new_empty((0,))
        if is_one(ratio):
            kept = nothing
        elif kept is None:
            kept = torch.empty_like(info)
        return out, kept, nothing if overflow is None else overflow

    def named(self, call: Call) -> dict[str, Any]:
        named = super().named(call)
        return named | {self.ratio: (named.pop("n"), named.pop("m"))}

    def check(self, call: Call, outs: Any) -> None:
        last, operands, info, table, guidance, ratio, fraction_bits, overflow, mark = call
        first = self.tensors[0]
        self.check_tensor(first, last, None, first)
        checks.check_sequence("tensors", operands)
        step = ((last, *operands), info, table, guidance)
        tensors = self.check_tensors(step)
        reversible_checks.check_info(info, last, first)
        for name, number in self.labelled(step):
            checks.check_number(name, number, last)
        self.check_integers(last, ratio, fraction_bits)
        reversible_checks.check_overflow(overflow, mark, last.shape[0], last.device)
        if outs is not None:
            self.check_outs(outs, tensors | {"info": info})

    def check_integers(self, last: Tensor, ratio: Any, fraction_bits: object) -> None:
        """Raise unless the integer arguments are in range."""
        reversible_checks.check_ratio(self.ratio, ratio, last)
        reversible_checks.check_fraction_bits(fraction_bits, last.dtype)

    def check_tensor(self, name: str, x: object, first: Tensor | None, first_name: str) -> None:
        """Terms may be floating-point tensors or fixed-point states."""
        fixed = isinstance(x, Tensor) and x.dtype in FRACTION_BITS
        if first is None or name == "q" or (fixed and name != "eps"):
            check_fixed_point(name, x, first, first_name)
        else:
            checks.check_state(name, x, first, first_name)

    def check_outs(self, outs: Any, tensors: dict[str, Tensor]) -> None:
        """Raise unless (q_next, info) can hold the results."""
        checks.check_sequence("out", outs, "(q, info)")
        if not isinstance(outs, tuple | list) or len(outs) != 2:
            given = checks.describe(outs)
            raise TypeError(f"out must be a pair of tensors for the state and the buffer, got {given}")
        like = {"out[0]": self.tensors[0], "out[1]": "info"}
        outputs.check_outs(
            dict(zip(like, outs, strict=True)),
            tensors,
            lambda name, out: check_fixed_point(name, out, tensors[like[name]], like[name]),
        )


def is_one(ratio: Sequence[Any]) -> bool:
    """Whether a ratio needs no buffer: equal numbers; tensors are not read."""
    n, m = ratio
    if type(n) is int and type(m) is int:
        return n == m
    return not arguments.is_tensor(n) and not arguments.is_tensor(m) and n == m


_BDIA: dict[str, Any] = {"coefficients": ("a", "b", "a_last", "b_last"), "ratio": "gamma"}
AFFINE_STEP = ExactStep("exact_affine_step", ("q_last",), weights=("weights",))
AFFINE_INVERSE_STEP = ExactStep("exact_affine_inverse_step", ("q_next",), weights=("weights",))
BDIA_STEP = ExactStep("bdia_exact_step", ("q_last", "q", "eps"), **_BDIA)
BDIA_INVERSE_STEP = ExactStep("bdia_exact_inverse_step", ("q_next", "q", "eps"), **_BDIA)
ENCODE = Encode("fixed_point_encode", ("x",), flags=("SymInt fraction_bits", "ScalarType dtype"))
DECODE = Decode("fixed_point_decode", ("q",), flags=("SymInt fraction_bits", "ScalarType dtype"))
