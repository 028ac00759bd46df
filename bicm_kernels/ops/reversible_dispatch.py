"""How an exact step reaches its kernel: schemas, fakes and outputs, and the reference where something asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bicm_kernels import reference
from bicm_kernels.ops import arguments
from bicm_kernels.ops.library import define, without_lists
from bicm_kernels.ops.reversible_checks import Call, check_numbers, check_step, refuse_derivative

Pair = tuple[Tensor, Tensor]

_ops = torch.ops.bicm_kernels
FAMILY = "reversible"

# Numbers for eager calls, tensors for traced graphs and per-sample arguments; n and m of None are 1. A ratio of 1 needs
# no buffer: the op then returns, and takes as info_out, an empty tensor. An empty overflow notes nothing.
_NUMBERS = "float[] coefficients, float guidance_scale, SymInt n, SymInt m, SymInt fraction_bits"
_TENSORS = "Tensor[] coefficients, Tensor? guidance_scale, Tensor? n, Tensor? m, SymInt fraction_bits"
_OUTS = "Tensor(a!) out, Tensor(b!) info_out, Tensor(c!) overflow"
_STEPS = ("exact_affine_step", "exact_affine_inverse_step", "bdia_exact_step", "bdia_exact_inverse_step")


def _fake_step(
    tensors: list[Tensor], info: Tensor, coefficients: Any, guidance_scale: Any, n: Any, m: Any, fraction_bits: int
) -> Pair:
    unit = n is None if n is None or isinstance(n, Tensor) else n == m
    return torch.empty_like(tensors[0]), info.new_empty((0,)) if unit else torch.empty_like(info)


def _fake_out(*_: Any, **outs: Tensor) -> None:
    """Nothing: the outputs are there."""


def _fake_encode(x: Tensor, fraction_bits: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


_STATES = ("tensors", "info", "x", "out", "info_out")
for _name in _STEPS:
    _inputs = "Tensor[] tensors, Tensor info"
    define(f"{_name}({_inputs}, {_NUMBERS}) -> (Tensor, Tensor)", _STATES, _fake_step)
    define(f"{_name}.tensor({_inputs}, {_TENSORS}) -> (Tensor, Tensor)", _STATES, _fake_step)
    define(f"{_name}.out({_inputs}, {_NUMBERS}, SymInt mark, *, {_OUTS}) -> ()", _STATES, _fake_out)
    define(f"{_name}.tensor_out({_inputs}, {_TENSORS}, Tensor mark, *, {_OUTS}) -> ()", _STATES, _fake_out)
for _name in ("fixed_point_encode", "fixed_point_decode"):
    define(f"{_name}(Tensor x, SymInt fraction_bits, ScalarType dtype) -> Tensor", _STATES, _fake_encode)
define(
    "fixed_point_encode.out(Tensor x, SymInt fraction_bits, Tensor mark, *, Tensor(a!) out, Tensor(b!) overflow) -> ()",
    _STATES,
    _fake_out,
)


@dataclass(frozen=True)
class ExactStep:
    """A step op: its schema's name, what its arguments are called, and its reference."""

    name: str
    first: str
    operands: tuple[str, ...]
    coefficients: tuple[str, ...]
    ratio: str

    def reference(self, call: Call) -> Pair:
        """The result of the same call in plain PyTorch."""
        named: dict[str, Any] = {
            "fraction_bits": call.fraction_bits,
            "guidance_scale": call.guidance_scale,
            "overflow": call.overflow,
            "mark": call.mark,
            self.ratio: call.ratio,
        }
        if self.coefficients:
            named |= dict(zip(self.coefficients, call.coefficients, strict=True))
            return getattr(reference, self.name)(call.last, *call.operands, call.info, **named)
        return getattr(reference, self.name)(call.last, call.operands, call.coefficients, call.info, **named)


_BDIA = (("q", "eps"), ("a", "b", "a_last", "b_last"), "gamma")
AFFINE_STEP = ExactStep("exact_affine_step", "q_last", (), (), "ratio")
AFFINE_INVERSE_STEP = ExactStep("exact_affine_inverse_step", "q_next", (), (), "ratio")
BDIA_STEP = ExactStep("bdia_exact_step", "q_last", *_BDIA)
BDIA_INVERSE_STEP = ExactStep("bdia_exact_inverse_step", "q_next", *_BDIA)


def run(step: ExactStep, call: Call) -> Pair:
    """Run a step's kernel, or its reference where a transform or the backend asks for it."""

    def check() -> None:
        check_step(step.first, step.operands, step.coefficients, step.ratio, call)

    try:
        if any(isinstance(x, Tensor) for x in (call.operands, call.ratio, call.out)):
            raise TypeError("one tensor for a sequence of them")
        n, m = call.ratio
        unit = not isinstance(n, Tensor) and not isinstance(m, Tensor) and n == m
        last = call.operands[-1]
        paired = not isinstance(last, Tensor)
        if paired != (call.guidance_scale is not None):
            raise TypeError("guidance_scale and a pair of predictions go together")
        if not step.operands and len(call.coefficients) != len(call.operands):
            raise TypeError("as many weights as tensors")
        tensors = [call.last, *call.operands[:-1], *(last if paired else [last])]
        values = (call.coefficients, call.guidance_scale if paired else 0.0)
        op = getattr(_ops, step.name)
        integers = (n, m, call.fraction_bits)
        refuse_derivative(*tensors, *arguments.numbers(values))
        fallback = arguments.needs_reference(call.last, tracked=False)
        if fallback or arguments.unseen(call.last):
            check()
        if fallback:
            return _keep(call, *step.reference(call))
        outs = _outputs(call, unit)
        if arguments.plain(values) and arguments.plain((*integers, call.mark)):
            overload = op.default if outs is None else op.out
            full = [call.info, *values, *integers]
            marks = [call.mark]
        else:
            # A tensor cannot tell any more what is wrong with the number that it was.
            check_numbers(step.ratio, call)
            overload = op.tensor if outs is None else op.tensor_out
            ratio = (None, None) if unit else (arguments.integer(n), arguments.integer(m))
            full = [call.info, *arguments.coefficients(values), *ratio, call.fraction_bits]
            marks = [arguments.integer(call.mark)]
        if arguments.scripting():
            overload = without_lists(overload)
        if outs is None:
            result, kept = overload(tensors, *full)
        else:
            result, kept, overflow = outs
            overload(tensors, *full, *marks, out=result, info_out=kept, overflow=overflow)
        return _keep(call, result, call.info if unit else kept)
    except (RuntimeError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
        arguments.explain(error, check)


def _outputs(call: Call, unit: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """What the kernel writes to: (out, info_out, overflow); None where it may allocate its results."""
    if call.out is None and call.overflow is None:
        return None
    result, kept = (torch.empty_like(call.last), None) if call.out is None else call.out
    nothing = call.info.new_empty((0,))
    if unit:
        kept = nothing
    elif kept is None:
        kept = torch.empty_like(call.info)
    return result, kept, nothing if call.overflow is None else call.overflow


def _keep(call: Call, result: Tensor, kept: Tensor) -> Pair:
    """The results, in the caller's outputs where there are any."""
    if call.out is None:
        return result, kept
    for out, x in zip(call.out, (result, kept), strict=True):
        if out is not x:
            out.copy_(x)
    return call.out[0], call.out[1]
