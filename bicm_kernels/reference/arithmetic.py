"""Shared by all references: the compute type, and per-sample arguments."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor


def check_sequence(name: str, value: Any, instead: str = "[x]") -> None:
    """Raise where one tensor is given for a sequence of them: iterating over it would give its samples."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a sequence of tensors, got one tensor; write {instead}")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any tensor is float64, else float32: halves are computed in float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def per_sample(value: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A float, 0-d or (B,) argument as a tensor of the compute type that broadcasts over ``like`` (B, ...)."""
    if not isinstance(value, Tensor):
        number = cast(Any, value)
        if isinstance(number, Fraction):  # tensors cannot be multiplied by it
            number = float(number)
        # A product, because torch.compile specialises on a float that is a fill value.
        scaled: Tensor = torch.ones((), dtype=torch.float64, device=like.device) * number
        return scaled.to(dtype)
    value = value.to(device=like.device, dtype=dtype)
    return value.reshape(-1, *[1] * (like.dim() - 1)) if value.dim() == 1 else value


def like_first(result: Tensor, first: Tensor) -> Tensor:
    """``result`` in the dtype and the layout of the first state tensor."""
    result = result.to(first.dtype)
    layout = torch.empty_like(first)
    if result.stride() == layout.stride():
        return result
    return torch.empty_strided(layout.shape, layout.stride(), dtype=result.dtype, device=result.device).copy_(result)


def root(x: Tensor) -> Tensor:
    """The correctly rounded root. Torch's own is off by a unit for some inputs, in float32 and in float64."""
    if x.dtype == torch.float32:
        return x.double().sqrt().float()
    y = x.sqrt()
    # One Newton step from the exact remainder x - y y, whose product is split into halves as Dekker does.
    with torch.no_grad():
        high = y * 134217729.0
        high = high - (high - y)
        low = y - high
        square = y * y
        remainder = (x - square) - (((high * high - square) + 2.0 * (high * low)) + low * low)
        step = remainder / (y + y)
        step = torch.where(step.isfinite(), step, torch.zeros_like(step))
    return y + step
