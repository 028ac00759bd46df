"""Argument checks of the reversible family, run before a traced call and after a failed one."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from bicm_kernels.ops import arguments, checks, outputs
from bicm_kernels.torch_internals import forward_level, transformed

#: Places after the binary point at most, by the dtype of the state.
FRACTION_BITS = {torch.int64: 62, torch.int32: 30}
MAX_RATIO = 2**20


def refuse_derivative(*values: object) -> None:
    """Raise where autograd or a transform would differentiate: rounding to integers has no derivative."""
    for x in values:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        tangent = forward_ad.unpack_dual(x).tangent if forward_level() >= 0 else None
        if tangent is not None or arguments.requires_grad(x):
            raise ValueError(
                "a tensor that requires grad was given, but fixed-point states are integers and have no derivative: "
                "call under torch.no_grad(), or detach the tensor"
            )


def check_fixed_point(name: str, q: object, first: Tensor | None = None, first_name: str = "") -> None:
    """Raise unless ``q`` is an integer (B, ...) state that agrees with the first one."""
    checks.check_state(name, q, first, first_name, FRACTION_BITS, "an int64 or int32 fixed-point state")
    if first is not None and q.dtype != first.dtype:  # type: ignore[attr-defined]
        raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype}, got {q.dtype}")  # type: ignore[attr-defined]


def check_fraction_bits(fraction_bits: Any, dtype: torch.dtype) -> None:
    """Raise unless the grid suits the state."""
    most = FRACTION_BITS[dtype]
    whole = isinstance(fraction_bits, int | torch.SymInt) or checks.is_index(fraction_bits)
    if not whole or isinstance(fraction_bits, bool):
        raise TypeError(f"fraction_bits must be an int, got {checks.describe(fraction_bits)}")
    if not 0 <= fraction_bits <= most:
        raise ValueError(f"fraction_bits must be in [0, {most}] for {dtype} states, got {fraction_bits}")


def check_overflow(overflow: Any, mark: object, batch: int, device: torch.device) -> None:
    """Raise unless overflow and mark fit the batch."""
    checks.check_integer("mark", mark, batch, device, 1, 2**63)
    if overflow is None:
        return
    if not isinstance(overflow, Tensor):
        raise TypeError(f"overflow must be a (B,) int64 tensor, got {checks.describe(overflow)}")
    if overflow.dtype != torch.int64:
        raise TypeError(f"overflow must be int64, got {overflow.dtype}")
    if overflow.shape != (batch,):
        raise ValueError(f"overflow must be a ({batch},) tensor, got shape {tuple(overflow.shape)}")
    if overflow.device != device:
        raise ValueError(f"overflow must be on {device}, got {overflow.device}")
    if transformed():
        raise ValueError("overflow must not be given under a torch.func transform, which cannot record writes to it")
    if outputs.has_memory(overflow) and outputs.overlaps_itself(overflow):
        raise ValueError(f"overflow must not overlap itself, got strides {overflow.stride()}")


def check_encode(x: Any, fraction_bits: object, dtype: object, overflow: Any, mark: object) -> None:
    """Raise if an argument of ``fixed_point_encode`` is invalid."""
    checks.check_state("x", x)
    if dtype not in FRACTION_BITS:
        raise ValueError(f"dtype must be torch.int64 or torch.int32, got {dtype!r}")
    assert isinstance(dtype, torch.dtype)
    check_fraction_bits(fraction_bits, dtype)
    check_overflow(overflow, mark, x.shape[0], x.device)


def check_decode(q: Any, fraction_bits: object, dtype: object) -> None:
    """Raise if an argument of ``fixed_point_decode`` is invalid."""
    check_fixed_point("q", q)
    check_fraction_bits(fraction_bits, q.dtype)
    if dtype not in checks.FLOATING:
        raise ValueError(f"dtype must be torch.float16, bfloat16, float32 or float64, got {dtype!r}")


def check_ratio(name: str, ratio: Any, last: Tensor) -> None:
    """Raise unless the ratio is a pair of numbers that the state can be multiplied with."""
    if not isinstance(ratio, tuple | list) or len(ratio) != 2:
        hint = f"; pass {ratio.as_integer_ratio()}" if isinstance(ratio, Fraction) else ""
        raise TypeError(f"{name} must be a pair (n, m), the ratio n/m, got {checks.describe(ratio)}{hint}")
    for part, value in zip(("n", "m"), ratio, strict=True):
        checks.check_integer(f"{part} of {name}", value, last.shape[0], last.device, 1, MAX_RATIO + 1)
    tensors = any(isinstance(value, Tensor) for value in ratio)
    if last.dtype == torch.int32 and (tensors or ratio[0] != ratio[1]):
        raise ValueError(f"{name} must be (1, 1) for int32 states: other ratios need int64, got {ratio!r}")


def check_info(info: object, first: Tensor, first_name: str) -> None:
    """Raise unless ``info`` is a buffer for the state."""
    checks.check_state("info", info, first, first_name, (torch.int64,), "an int64 tensor")
