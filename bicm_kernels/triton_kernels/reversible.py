"""Exact reversible steps: checks, arguments and launches of one kernel that steps and encodes, and one that decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bicm_kernels.triton_kernels import checks
from bicm_kernels.triton_kernels.checks import Integer, Number
from bicm_kernels.triton_kernels.keys import integer_argument, number_argument
from bicm_kernels.triton_kernels.operands import lay_out
from bicm_kernels.triton_kernels.reversible_kernels import decode_fixed_point, exact_step

#: Places after the binary point at most, by the dtype of the state.
FRACTION_BITS = {torch.int64: 62, torch.int32: 30}
MAX_RATIO = 2**20

Pair = tuple[Tensor, Tensor]


def check_bits(fraction_bits: int, dtype: torch.dtype) -> None:
    checks.require(dtype in FRACTION_BITS, "a fixed-point state is int64 or int32")
    checks.require(0 <= fraction_bits <= FRACTION_BITS[dtype], "fraction_bits out of range")


def check_tensors(tensors: Sequence[Tensor], info: Tensor, terms: int, bdia: bool) -> None:
    """A state, then the terms: floating tensors and states of its dtype, of one shape on one device."""
    checks.require(1 <= terms <= checks.MAX_TERMS, "wrong number of coefficients")
    checks.require(len(tensors) - 1 in (terms, terms + 1), "wrong number of tensors")
    first = tensors[0]
    checks.require(first.dim() > 0, "tensors need a batch dimension")
    checks.require(info.dtype == torch.int64, "info must be int64")
    for x in (*tensors, info):
        checks.require(x.shape == first.shape and x.device == first.device, "tensors differ in shape or device")
    for k, x in enumerate(tensors[1:]):
        checks.require(x.dtype in checks.FLOATING or x.dtype == first.dtype, "fixed-point states differ in dtype")
        fits = not bdia or (x.dtype == first.dtype) == (k == 0)
        checks.require(fits, "q must be an integer state, eps floating")


def check_outs(outs: Sequence[tuple[Tensor, Tensor | torch.dtype]], inputs: Sequence[Tensor]) -> None:
    """Each output like its tensor, or the first input in another dtype; exactly an input or disjoint from all."""
    first = inputs[0]
    for out, like in outs:
        dtype = like.dtype if isinstance(like, Tensor) else like
        fits = out.shape == first.shape and out.dtype == dtype and out.device == first.device
        checks.require(fits, "out differs from the state in shape, dtype or device")
    checks.check_places([out for out, _ in outs], inputs)


def check_ratio(n: Integer | None, m: Integer | None, first: Tensor) -> bool:
    """Whether the ratio multiplies, which takes an int64 state."""
    checks.require((n is None) == (m is None), "a ratio needs both its parts")
    if n is None or m is None:
        return False
    for part in (n, m):
        checks.check_integer(part, first)
        checks.require(isinstance(part, Tensor) or 1 <= part <= MAX_RATIO, "a ratio's parts must be in [1, 2**20]")
    multiplies = isinstance(n, Tensor) or isinstance(m, Tensor) or n != m
    checks.require(not multiplies or first.dtype == torch.int64, "a ratio other than 1 needs an int64 state")
    return multiplies


def notes(overflow: Tensor | None, mark: Integer, like: Tensor) -> tuple[tuple[Tensor, int] | None, Any]:
    """The overflow tensor and the mark; an empty tensor records nothing."""
    if overflow is None or overflow.shape == (0,):
        return None, (1, None)
    fits = overflow.dtype == torch.int64 and overflow.shape == like.shape[:1] and overflow.device == like.device
    checks.require(fits and checks.nested(checks.moving(overflow)), "overflow must be a (B,) int64 tensor")
    checks.check_integer(mark, like)
    checks.require(isinstance(mark, Tensor) or mark >= 1, "mark must be at least 1")
    return (overflow, overflow.stride(0)), integer_argument(mark, like.device)


def launch_exact(
    outs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    coefficients: Sequence[Number],
    *,
    fraction_bits: int,
    guidance: Number | None = None,
    last: Tensor | None = None,
    info: Tensor | None = None,
    ratio: tuple[Integer, Integer] = (1, 1),
    bdia: bool = False,
    inverse: bool = False,
    overflow: Tensor | None = None,
    mark: Integer = 1,
) -> None:
    """Write a step's or an encoding's results to `outs`: the state, then the buffer where there is one."""
    first = inputs[0]
    noted, (mark_value, mark_tensor) = notes(overflow, mark, first)
    (n, n_tensor), (m, m_tensor) = (integer_argument(part, first.device) for part in ratio)
    # Weights are formed in float64, whatever the tensors are.
    weights = tuple([number_argument(value, torch.float64, first) for value in coefficients])
    scale = None if guidance is None else number_argument(guidance, torch.float64, first)
    placed = [x for x in (*weights, scale) if x is not None and len(x) == 2]
    placed += [x for x in (n_tensor, m_tensor, noted) if x is not None]
    operands = [x for x in (*outs, last, info, *inputs) if x is not None]
    layout = lay_out(operands, per_sample=any(stride for _, stride in placed), in_order=False)
    given = iter(layout.operands)
    layout.launch(
        exact_step,
        spread=2,
        out=next(given),
        info_out=None if info is None else next(given),
        last=None if last is None else next(given),
        info=None if info is None else next(given),
        inputs=tuple(next(given) for _ in range(len(inputs) - (guidance is not None))),
        conditional=None if guidance is None else next(given),
        coefficients=weights,
        guidance_scale=scale,
        n=n,
        n_tensor=n_tensor,
        m=m,
        m_tensor=m_tensor,
        fraction_bits=fraction_bits,
        overflow=noted,
        mark=mark_value,
        mark_tensor=mark_tensor,
        TERMS=len(inputs) - (guidance is not None),
        BDIA=bdia,
        INVERSE=inverse,
    )


def exact_ops(bdia: bool, inverse: bool) -> tuple[Callable[..., Pair], Callable[..., None]]:
    """An op that returns its results and one that writes them, for numbers and for tensors alike."""

    def prepare(
        tensors: list[Tensor],
        info: Tensor,
        coefficients: list[Number],
        guidance_scale: Number | None,
        n: Integer | None,
        m: Integer | None,
        fraction_bits: int,
    ) -> tuple[bool, dict[str, Any]]:
        checks.require(len(tensors) > 0, "no tensors")
        checks.require(not bdia or len(coefficients) == 4, "expected 4 coefficients")
        terms, first = 2 if bdia else len(coefficients), tensors[0]
        check_bits(fraction_bits, first.dtype)
        check_tensors(tensors, info, terms, bdia)
        multiplies, guided = check_ratio(n, m, first), len(tensors) - 1 > terms
        checks.require(not guided or guidance_scale is not None, "a pair of predictions needs a guidance scale")
        return multiplies, {
            "inputs": tensors[1:],
            "coefficients": coefficients,
            "guidance": guidance_scale if guided else None,
            "fraction_bits": fraction_bits,
            "last": first,
            "info": info if multiplies else None,
            "ratio": (n, m) if multiplies else (1, 1),
            "bdia": bdia,
            "inverse": inverse,
        }

    def returning(tensors: list[Tensor], info: Tensor, *arguments: Any) -> Pair:
        multiplies, prepared = prepare(tensors, info, *arguments)
        out = torch.empty_like(tensors[0])
        info_out = torch.empty_like(info) if multiplies else info.new_empty((0,))
        launch_exact([out, info_out] if multiplies else [out], **prepared)
        return out, info_out

    def writing(
        tensors: list[Tensor], info: Tensor, *arguments: Any, out: Tensor, info_out: Tensor, overflow: Tensor
    ) -> None:
        multiplies, prepared = prepare(tensors, info, *arguments[:-1])
        outs = [(out, tensors[0]), (info_out, info)] if multiplies else [(out, tensors[0])]
        check_outs(outs, [*tensors, info] if multiplies else tensors)
        launch_exact([x for x, _ in outs], **prepared, overflow=overflow, mark=arguments[-1])

    return returning, writing


def fixed_point_encode(x: Tensor, fraction_bits: int, dtype: torch.dtype) -> Tensor:
    """rint(2^fraction_bits x)."""
    checks.check_states([x], 1)
    check_bits(fraction_bits, dtype)
    out = torch.empty_like(x, dtype=dtype)
    launch_exact([out], [x], [1.0], fraction_bits=fraction_bits)
    return out


def fixed_point_encode_out(
    x: Tensor, fraction_bits: int, dtype: torch.dtype, mark: Integer, *, out: Tensor, overflow: Tensor
) -> None:
    """The same into a tensor that the caller gives, overflows noted."""
    checks.check_states([x], 1)
    check_bits(fraction_bits, dtype)
    check_outs([(out, dtype)], [x])
    launch_exact([out], [x], [1.0], fraction_bits=fraction_bits, overflow=overflow, mark=mark)


def fixed_point_decode(q: Tensor, fraction_bits: int, dtype: torch.dtype) -> Tensor:
    """q 2^-fraction_bits."""
    check_bits(fraction_bits, q.dtype)
    checks.require(q.dim() > 0 and dtype in checks.FLOATING, "q must be (B, ...), the result floating")
    out = torch.empty_like(q, dtype=dtype)
    layout = lay_out([out, q], per_sample=False, in_order=False)
    layout.launch(decode_fixed_point, out=layout.operands[0], q=layout.operands[1], fraction_bits=fraction_bits)
    return out


STEPS = {
    "exact_affine_step": (False, False),
    "exact_affine_inverse_step": (False, True),
    "bdia_exact_step": (True, False),
    "bdia_exact_inverse_step": (True, True),
}


def implementations() -> dict[str, Callable[..., Any]]:
    """Every overload of the family by the name of its schema."""
    found: dict[str, Callable[..., Any]] = {
        "fixed_point_encode": fixed_point_encode,
        "fixed_point_encode.out": fixed_point_encode_out,
        "fixed_point_encode.tensor_out": fixed_point_encode_out,
        "fixed_point_decode": fixed_point_decode,
    }
    for name, kind in STEPS.items():
        returning, writing = exact_ops(*kind)
        found |= {name: returning, f"{name}.tensor": returning}
        found |= {f"{name}.out": writing, f"{name}.tensor_out": writing}
    return found
