"""How a sampler update reaches its kernel: schemas, fakes and checks, and the reference where something asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bicm_kernels import reference
from bicm_kernels.ops import arguments, outputs
from bicm_kernels.ops.arguments import Number
from bicm_kernels.ops.library import define, without_lists

Operand = Tensor | tuple[Tensor, Tensor]
Values = tuple[Any, ...]
Key = tuple[Any, ...]

_ops = torch.ops.bicm_kernels

# Every op in two flavours: numbers for eager calls, tensors for traced graphs (where a number would be compiled in) and
# for per-sample arguments. And each with outputs that the caller gives.
_FORM = ("float[] coefficients, float guidance_scale", "Tensor[] coefficients, Tensor? guidance_scale")
_NOISE = (
    "float noise_weight, SymInt? seed, SymInt step, SymInt sample_id",
    "Tensor? noise_weight, Tensor? seed, Tensor? step, Tensor? sample_id",
)
_DENOISED = (
    "float[] x0_weights, float[] weights, float guidance_scale, float x0_weight, float? clip, float noise_weight, "
    "float? next_scale, SymInt? seed, SymInt step, SymInt sample_id",
    "Tensor[] x0_weights, Tensor[] weights, Tensor? guidance_scale, Tensor? x0_weight, Tensor? clip, "
    "Tensor? noise_weight, Tensor? next_scale, Tensor? seed, Tensor? step, Tensor? sample_id",
)
_ONE = ("Tensor", "Tensor(a!) out")
_OUTS = ("out", "x0", "next")
_THREE = ("(Tensor, Tensor, Tensor)", "Tensor(a!) out, Tensor(b!) x0, Tensor(c!) next")
_SCHEMAS = {
    "ddim_step": (_FORM, _ONE),
    "bdia_step": (_FORM, _ONE),
    "bdia_inverse_step": (_FORM, _ONE),
    "affine_step": (tuple(f"{form}, {noise}" for form, noise in zip(_FORM, _NOISE, strict=True)), _ONE),
    "denoised_step": (_DENOISED, _THREE),
}


def _fake_one(tensors: list[Tensor], *_: Any) -> Tensor:
    return torch.empty_like(tensors[0])


def _fake_three(tensors: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    first = tensors[0]
    scaled = torch.empty_like(first) if rest[6] is not None else first.new_empty((0,))
    return torch.empty_like(first), torch.empty_like(first), scaled


def _fake_out(tensors: list[Tensor], *_: Any, **outs: Tensor) -> None:
    """Nothing: the outputs are there."""


for _name, (_flavours, (_returns, _out)) in _SCHEMAS.items():
    for _overload, _arguments in zip(("", "tensor"), _flavours, strict=True):
        _returning = f"{_name}.{_overload}" if _overload else _name
        _writing = f"{_name}.{_overload}_out" if _overload else f"{_name}.out"
        _fake = _fake_one if _returns == "Tensor" else _fake_three
        define(f"{_returning}(Tensor[] tensors, {_arguments}) -> {_returns}", ["tensors"], _fake)
        define(f"{_writing}(Tensor[] tensors, {_arguments}, *, {_out}) -> ()", ["tensors", *_OUTS], _fake_out)


@dataclass(frozen=True)
class _Step:
    """A step op: what its arguments are called, in the schema's order, and how the reference is called with them."""

    name: str
    operands: tuple[str, ...]
    values: tuple[str | tuple[str, ...], ...]
    reference: Callable[[Sequence[Operand], Values, Number | None, Key], Any]


def _form(name: str, operands: tuple[str, ...], coefficients: tuple[str, ...]) -> _Step:
    def call(tensors: Sequence[Operand], values: Values, guidance_scale: Number | None, _: Key) -> Tensor:
        numbers = dict(zip(coefficients, values[0], strict=True))
        return getattr(reference, name)(*tensors, **numbers, guidance_scale=guidance_scale)

    return _Step(name, operands, (coefficients, "guidance_scale"), call)


def _noisy(name: str, values: tuple[str, ...]) -> _Step:
    def call(tensors: Sequence[Operand], numbers: Values, guidance_scale: Number | None, key: Key) -> Any:
        named = dict(zip(values, numbers, strict=True)) | dict(zip(_KEY, key, strict=True))
        return getattr(reference, name)(tensors, **named | {"guidance_scale": guidance_scale})

    return _Step(name, (), values, call)


_KEY = ("seed", "step", "sample_id")
_BDIA = ("a", "b", "a_last", "b_last", "gamma")
DDIM_STEP = _form("ddim_step", ("z", "eps"), ("a", "b"))
BDIA_STEP = _form("bdia_step", ("z_last", "z", "eps"), _BDIA)
BDIA_INVERSE_STEP = _form("bdia_inverse_step", ("z_next", "z", "eps"), _BDIA)
AFFINE_STEP = _noisy("affine_step", ("weights", "guidance_scale", "noise_weight"))
DENOISED_STEP = _noisy(
    "denoised_step",
    ("x0_weights", "weights", "guidance_scale", "x0_weight", "clip", "noise_weight", "next_scale"),
)
_MAY_BE_NONE = ("clip", "next_scale")


def _check(
    step: _Step, operands: Sequence[Any], values: Values, guidance_scale: object, key: Key, outs: Sequence[Any]
) -> None:
    """Raise what is wrong with a step's arguments, if anything is."""
    arguments.check_sequence("tensors", operands)
    names = step.operands or tuple(f"tensors[{k}]" for k in range(len(operands)))
    if not 1 <= len(operands) <= 5:
        raise ValueError(f"tensors must hold 1 to 5 tensors, got {len(operands)}")
    tensors: list[Any] = []
    for name, operand in zip(names, operands, strict=True):
        pair = isinstance(operand, tuple | list) and name == names[-1]
        for half in operand if pair else [operand]:
            arguments.check_state(name, half, tensors[0] if tensors else None, names[0])
            tensors.append(half)
    guided = len(tensors) - len(operands)
    if guided not in (0, 1) or bool(guided) != (guidance_scale is not None):
        raise ValueError(
            f"guidance_scale goes with a pair (eps_uncond, eps_cond) as {names[-1]}, "
            f"got guidance_scale={guidance_scale!r} and {arguments.describe(operands[-1])}"
        )
    first = tensors[0]
    for label, value in zip(step.values, values, strict=True):
        if not isinstance(value, list):
            if value is not None or label not in _MAY_BE_NONE:
                arguments.check_number(str(label), value, first)
            continue
        labels = label if isinstance(label, tuple) else [f"{label}[{k}]" for k in range(len(value))]
        if not isinstance(label, tuple) and len(value) != len(operands):
            raise ValueError(f"{label} must be as many as the tensors, {len(operands)}, got {len(value)}")
        for name, number in zip(labels, value, strict=True):
            arguments.check_number(name, number, first)
    if key and key[0] is not None:
        arguments.check_key(key[0], key[1], key[2], first.shape[0], first.device)
    if values[-1] is None:  # no next_scale: its output is a placeholder
        outs = outs[:2]
    outputs.check_outs(dict(zip(_OUTS, outs, strict=False)), dict(zip(names, tensors, strict=False)), first)


def run(
    step: _Step,
    operands: Any,
    values: Values,
    guidance_scale: Number | None,
    key: Key = (),
    outs: Sequence[Tensor] = (),
) -> Any:
    """Run a step's kernel, or its reference where a derivative, a transform or the backend asks for it.

    ``values`` are in the schema's order, lists of coefficients as lists; ``outs`` is empty or holds every result.
    """
    try:
        if isinstance(operands, Tensor):
            raise TypeError("one tensor for a sequence of them")
        last = operands[-1]
        paired = not isinstance(last, Tensor)
        if paired != (guidance_scale is not None):
            raise TypeError("guidance_scale and a pair of predictions go together")
        # A kernel takes one tensor more than weights for a pair.
        if not step.operands and len(values[0]) != len(operands):
            raise TypeError("as many weights as tensors")
        tensors: list[Any] = [*operands[:-1], *last] if paired else [*operands]
        op = getattr(_ops, step.name)
        tracked = arguments.requires_grad(*tensors, *arguments.numbers(values), *outs)
        fallback = arguments.needs_reference(tensors[0], tracked=tracked)
        if fallback or arguments.unseen(tensors[0]):
            _check(step, operands, values, guidance_scale, key, outs)
        if fallback:
            results = step.reference(operands, values, guidance_scale, key)
            return outputs.write(outs, results, tracked) if outs else results
        if arguments.plain(values) and arguments.plain(key):
            function, full = (op.out if outs else op.default), (*values, *key)
        else:
            function = op.tensor_out if outs else op.tensor
            counters = arguments.key(key[0], key[1], key[2], tensors[0]) if key else ()
            full = (*arguments.coefficients(values), *counters)
        if arguments.scripting():
            function = without_lists(function)
        if not outs:
            return function(tensors, *full)
        function(tensors, *full, **dict(zip(_OUTS, outs, strict=False)))
        return tuple(outs) if len(outs) > 1 else outs[0]
    except (RuntimeError, TypeError, AttributeError, OverflowError, IndexError) as error:
        arguments.explain(error, lambda: _check(step, operands, values, guidance_scale, key, outs))
