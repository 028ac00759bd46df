"""Checks of arguments that every family shares, and their messages.

They apply the kernels' rules, and name the argument, what was given and what was expected. Valid calls skip them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from bicm_kernels.reference import arithmetic

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WORD = 2**32


def describe(value: object) -> str:
    """A short description of a value, for error messages."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    kind, text = type(value).__name__, repr(value)
    if len(text) <= 60 and "tensor(" not in text and "array(" not in text:
        return f"{text} ({kind})"
    if isinstance(value, list | tuple):
        return f"a {kind} of {len(value)} ({', '.join(dict.fromkeys(type(x).__name__ for x in value))})"
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"a {kind}{shape}"


def tensor_in(value: Any) -> str:
    """The tensor's place in a network's output, for error messages; empty where it is not known."""
    if isinstance(value, tuple | list):
        return "; pass its first element" if value and isinstance(value[0], Tensor) else ""
    for name in ("sample", *getattr(value, "__dict__", {})):
        if isinstance(getattr(value, name, None), Tensor):
            return f"; pass its .{name}"
    if isinstance(value, Mapping):
        return next((f"; pass its [{name!r}]" for name, x in value.items() if isinstance(x, Tensor)), "")
    return "; torch.from_numpy makes one of it" if type(value).__module__ == "numpy" and hasattr(value, "shape") else ""


def check_sequence(name: str, value: Any, instead: str = "[x]") -> None:
    """Raise unless ``value`` is a sequence of tensors rather than one tensor."""
    arithmetic.check_sequence(name, value, instead)
    if not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        raise TypeError(f"{name}: expected a sequence of tensors, got {describe(value)}")


def check_state(
    name: str,
    x: object,
    first: Tensor | None = None,
    first_name: str = "",
    dtypes: Collection[torch.dtype] = FLOATING,
    expected: str = "float16, bfloat16, float32 or float64",
) -> None:
    """Raise unless ``x`` is a (B, ...) tensor of one of these dtypes that agrees with the first in shape and device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(x)}{tensor_in(x)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {expected}, got {x.dtype}")
    if not torch.compiler.is_compiling() and x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}; {name}.to_dense() makes one")
    if x.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension, (B, ...), got a 0-d tensor")
    if first is None:
        return
    if x.shape != first.shape:
        raise ValueError(f"{name} must have the shape of {first_name}, {tuple(first.shape)}, got {tuple(x.shape)}")
    if x.device != first.device:
        raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, got {x.device}")


def check_number(name: str, value: object, first: Tensor) -> None:
    """Raise unless ``value`` is a float, a 0-d or a (B,) floating tensor."""
    if isinstance(value, int) and value.bit_length() > 1000:
        try:
            float(value)
        except OverflowError:
            raise ValueError(f"{name} must fit into a float, got an int of {value.bit_length()} bits") from None
    if not isinstance(value, Tensor):
        if not isinstance(value, Real | torch.SymFloat | torch.SymInt):
            raise TypeError(f"{name} must be a float, a 0-d tensor or a (B,) tensor, got {describe(value)}")
        return
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be a floating tensor, got {value.dtype}")
    check_per_sample(name, value, first.shape[0], first.device)


def check_per_sample(name: str, value: Tensor, batch: int, device: torch.device) -> None:
    """Raise unless a tensor argument is 0-d or (B,) and on a device that the kernel can read."""
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != batch):
        raise ValueError(f"{name} must be a 0-d or a ({batch},) tensor, got shape {tuple(value.shape)}")
    if value.device != device and not (value.dim() == 0 and value.device.type == "cpu"):
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def check_integer(name: str, value: object, batch: int, device: torch.device, low: int, high: int) -> None:
    """Raise unless ``value`` is an int in [low, high), or a 0-d or (B,) int64 tensor."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            whole = not (value.is_floating_point() or value.is_complex())
            hint = f"; {name}.long() makes one" if whole else ""
            raise TypeError(f"{name} must be an int or an int64 tensor, got {value.dtype}{hint}")
        check_per_sample(name, value, batch, device)
    elif not (isinstance(value, Integral | torch.SymInt) or is_index(value)):
        several = hasattr(value, "__len__") and not isinstance(value, str | bytes)
        hint = f"; torch.as_tensor({name}, dtype=torch.int64) makes one" if several else ""
        if isinstance(value, torch.Generator):
            raise TypeError(f"{name} must be an int or an int64 tensor, got a torch.Generator; pass its initial_seed()")
        raise TypeError(f"{name} must be an int or an int64 tensor, got {describe(value)}{hint}")
    else:
        check_range(name, value, low, high)


def is_index(value: Any) -> bool:
    """Whether a value is an integer to Python, as NumPy's integer of no dimensions is."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def flag(name: str, value: object) -> bool:
    """A flag as a bool: NumPy's, 0 and 1 too."""
    if isinstance(value, Tensor | str) or value not in (0, 1):
        raise TypeError(f"{name} must be a bool, got {describe(value)}")
    return bool(value)


def check_range(name: str, value: object, low: int, high: int) -> None:
    """Raise unless an int is in [low, high); tensors are not read."""
    if not isinstance(value, Tensor) and not low <= value < high:  # type: ignore[operator]
        raise ValueError(f"{name} must be in [{power(low)}, {power(high)}), got {value}")


def power(bound: int) -> str:
    """A bound of an integer range in readable form, such as 2**32."""
    if abs(bound) < WORD:
        return str(bound)
    return f"{'-' if bound < 0 else ''}2**{round(math.log2(abs(bound)))}"


def check_key(seed: object, step: object, sample_id: Any, batch: int, device: torch.device) -> None:
    """Raise unless seed, step and sample_id can key the noise of a batch."""
    if seed is None:
        raise ValueError("seed must be given where noise is drawn (noise_weight is not zero), got None")
    check_integer("seed", seed, batch, device, -(2**63), 2**64)
    check_integer("step", step, batch, device, 0, WORD)
    check_integer("sample_id", sample_id, batch, device, 0, WORD)
    if not isinstance(sample_id, int | Tensor | torch.SymInt):
        sample_id = operator.index(sample_id)  # arithmetic on NumPy's integers overflows
    if isinstance(sample_id, int) and not torch.compiler.is_exporting() and sample_id + batch > WORD:
        raise ValueError(f"sample_id + B must be at most 2**32, got {sample_id} + {batch}")
    per_sample_seed = isinstance(seed, Tensor) and seed.dim() == 1
    if per_sample_seed and (isinstance(sample_id, Tensor) or sample_id != 0):
        raise ValueError(f"sample_id must be left at 0 where seed holds one seed per sample, got {describe(sample_id)}")
