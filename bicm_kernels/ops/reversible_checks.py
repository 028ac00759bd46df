"""What the arguments of the reversible family must be, asked before a traced call and after one that failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from bicm_kernels.ops import arguments, outputs

#: Places after the binary point at most, by the dtype of the state.
FRACTION_BITS = {torch.int64: 62, torch.int32: 30}
MAX_RATIO = 2**20


@dataclass
class Call:
    """The arguments of a step as they were given; ``operands`` without the first state."""

    last: Tensor
    operands: Sequence[Any]
    coefficients: list[Any]
    info: Tensor
    ratio: Any
    fraction_bits: int
    guidance_scale: Any
    overflow: Tensor | None
    mark: Any
    out: Any


def refuse_derivative(*values: object) -> None:
    """Raise where autograd or a transform would differentiate: rounding to integers has no derivative to give."""
    for x in values:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        tangent = forward_ad.unpack_dual(x).tangent if forward_ad._current_level >= 0 else None
        if tangent is not None or arguments.requires_grad(x):
            raise ValueError(
                "a tensor that requires grad was given, but fixed-point states are integers and have no derivative: "
                "call under torch.no_grad(), or detach the tensor"
            )


def check_fixed_point(name: str, q: object, first: Tensor | None = None, first_name: str = "") -> None:
    """Raise unless ``q`` is an integer (B, ...) state that agrees with the first one."""
    if not isinstance(q, Tensor):
        raise TypeError(f"{name} must be a tensor, got {arguments.describe(q)}")
    if q.dtype not in FRACTION_BITS:
        raise TypeError(f"{name} must be an int64 or int32 fixed-point state, got {q.dtype}")
    if q.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension, (B, ...), got a 0-d tensor")
    if first is not None:
        check_like(name, q, first, first_name)
        if q.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype}, got {q.dtype}")


def check_like(name: str, x: Tensor, first: Tensor, first_name: str) -> None:
    """Raise unless two tensors agree in shape and device."""
    if x.shape != first.shape:
        raise ValueError(f"{name} must have the shape of {first_name}, {tuple(first.shape)}, got {tuple(x.shape)}")
    if x.device != first.device:
        raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, got {x.device}")


def check_fraction_bits(fraction_bits: object, dtype: torch.dtype) -> None:
    """Raise unless the grid suits the state."""
    most = FRACTION_BITS[dtype]
    if not isinstance(fraction_bits, int | torch.SymInt) or isinstance(fraction_bits, bool):
        raise TypeError(f"fraction_bits must be an int, got {arguments.describe(fraction_bits)}")
    if not 0 <= fraction_bits <= most:
        raise ValueError(f"fraction_bits must be in [0, {most}] for {dtype} states, got {fraction_bits}")


def check_overflow(overflow: Any, mark: object, batch: int, device: torch.device) -> None:
    """Raise unless overflow and mark can note a batch's overflows."""
    arguments.check_integer("mark", mark, batch, device, 1, 2**63)
    if overflow is None:
        return
    if not isinstance(overflow, Tensor):
        raise TypeError(f"overflow must be a (B,) int64 tensor, got {arguments.describe(overflow)}")
    if overflow.dtype != torch.int64:
        raise TypeError(f"overflow must be int64, got {overflow.dtype}")
    if overflow.shape != (batch,):
        raise ValueError(f"overflow must be a ({batch},) tensor, got shape {tuple(overflow.shape)}")
    if overflow.device != device:
        raise ValueError(f"overflow must be on {device}, got {overflow.device}")
    if arguments.transformed():
        raise ValueError("overflow must not be given under a torch.func transform: what is noted there is lost to it")
    if outputs.has_memory(overflow) and outputs.overlaps_itself(overflow):
        raise ValueError(f"overflow must not overlap itself, got strides {overflow.stride()}")


def check_encode(x: Any, fraction_bits: object, dtype: object, overflow: Any, mark: object) -> None:
    """Raise what is wrong with the arguments of ``fixed_point_encode``, if anything is."""
    arguments.check_state("x", x)
    if dtype not in FRACTION_BITS:
        raise ValueError(f"dtype must be torch.int64 or torch.int32, got {dtype!r}")
    assert isinstance(dtype, torch.dtype)
    check_fraction_bits(fraction_bits, dtype)
    check_overflow(overflow, mark, x.shape[0], x.device)


def check_decode(q: Any, fraction_bits: object, dtype: object) -> None:
    """Raise what is wrong with the arguments of ``fixed_point_decode``, if anything is."""
    check_fixed_point("q", q)
    check_fraction_bits(fraction_bits, q.dtype)
    if dtype not in arguments.FLOATING:
        raise ValueError(f"dtype must be torch.float16, bfloat16, float32 or float64, got {dtype!r}")


def check_ratio(name: str, ratio: Any, last: Tensor) -> None:
    """Raise unless the ratio is a pair of numbers that the state can be multiplied with."""
    if not isinstance(ratio, tuple | list) or len(ratio) != 2:
        raise TypeError(f"{name} must be a pair (n, m) that stands for n/m, got {arguments.describe(ratio)}")
    for part, value in zip(("n", "m"), ratio, strict=True):
        arguments.check_integer(f"{part} of {name}", value, last.shape[0], last.device, 1, MAX_RATIO + 1)
    tensors = any(isinstance(value, Tensor) for value in ratio)
    if last.dtype == torch.int32 and (tensors or ratio[0] != ratio[1]):
        raise ValueError(f"{name} must be (1, 1) for int32 states: other ratios need int64, got {ratio!r}")


def check_numbers(ratio: str, call: Call) -> None:
    """Raise unless the integers beside the tensors are in range."""
    check_ratio(ratio, call.ratio, call.last)
    check_fraction_bits(call.fraction_bits, call.last.dtype)
    arguments.check_integer("mark", call.mark, call.last.shape[0], call.last.device, 1, 2**63)


def check_outs(out: Any, call: Call, tensors: dict[str, Tensor], first: str) -> None:
    """Raise unless (q_next, info) can take the results."""
    if arguments.transformed():
        raise ValueError("out must not be given under a torch.func transform: what is written there is lost to it")
    arguments.check_sequence("out", out, "(q, info)")
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise TypeError(f"out must be a pair of tensors for the state and the buffer, got {arguments.describe(out)}")
    check_fixed_point("out[0]", out[0], call.last, first)
    check_fixed_point("out[1]", out[1], call.info, "info")
    if not outputs.has_memory(out[0]):
        return
    for k, x in enumerate(out):
        if outputs.overlaps_itself(x):
            raise ValueError(f"out[{k}] must not overlap itself, got strides {x.stride()}")
        for name, other in tensors.items():
            if not outputs.same_place(x, other) and outputs.shares_memory(x, other):
                raise ValueError(f"out[{k}] must be exactly {name} or lie apart from it: they overlap in part")
    if outputs.shares_memory(*out):
        raise ValueError("out[0] and out[1] must not share memory")


def check_step(first: str, operands: tuple[str, ...], coefficients: tuple[str, ...], ratio: str, call: Call) -> None:
    """Raise what is wrong with a step's arguments, if anything is."""
    last = call.last
    check_fixed_point(first, last)
    arguments.check_sequence("tensors", call.operands)
    names = operands or tuple(f"tensors[{k}]" for k in range(len(call.operands)))
    if not 1 <= len(names) <= 5:
        raise ValueError(f"tensors must hold 1 to 5 tensors, got {len(names)}")
    tensors = {first: last}
    for name, operand in zip(names, call.operands, strict=True):
        pair = isinstance(operand, tuple | list) and name == names[-1]
        for k, x in enumerate(operand if pair else [operand]):
            _check_operand(f"{name}[{k}]" if pair else name, x, last, first, name if operands else "")
            tensors[f"{name}[{k}]" if pair else name] = x
    guided = len(tensors) - len(names) - 1
    if guided not in (0, 1) or bool(guided) != (call.guidance_scale is not None):
        raise ValueError(
            f"guidance_scale goes with a pair (eps_uncond, eps_cond) as {names[-1]}, "
            f"got guidance_scale={call.guidance_scale!r} and {arguments.describe(call.operands[-1])}"
        )
    if not isinstance(call.info, Tensor) or call.info.dtype != torch.int64:
        raise TypeError(f"info must be an int64 tensor, got {arguments.describe(call.info)}")
    check_like("info", call.info, last, first)
    if not coefficients and len(call.coefficients) != len(names):
        raise ValueError(f"weights must be as many as the tensors, {len(names)}, got {len(call.coefficients)}")
    labels = coefficients or [f"weights[{k}]" for k in range(len(names))]
    for name, number in zip(labels, call.coefficients, strict=True):
        arguments.check_number(name, number, last)
    if guided:
        arguments.check_number("guidance_scale", call.guidance_scale, last)
    check_ratio(ratio, call.ratio, last)
    check_fraction_bits(call.fraction_bits, last.dtype)
    check_overflow(call.overflow, call.mark, last.shape[0], last.device)
    if call.out is not None:
        check_outs(call.out, call, tensors | {"info": call.info}, first)


def _check_operand(name: str, x: Any, last: Tensor, first: str, role: str) -> None:
    """Raise unless ``x`` can be weighed: a network's output, a state in floating point, or a fixed-point state."""
    fixed = isinstance(x, Tensor) and x.dtype in FRACTION_BITS
    if role == "q" or (fixed and role != "eps"):
        check_fixed_point(name, x, last, first)
    else:
        arguments.check_state(name, x, last, first)
