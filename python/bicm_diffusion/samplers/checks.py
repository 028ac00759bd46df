"""Checks of samplers' arguments, under the callers' names for them; cheap for valid arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.consistency.schedules import PRESETS
from bicm_diffusion.described import described
from bicm_diffusion.schedules import Schedule

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_model(model: object, called: str = "model(z, times)", name: str = "model") -> None:
    """Raise TypeError unless a model can be called."""
    if not callable(model):
        raise TypeError(f"{name}: expected a function or module, called as {called}, got {described(model)}")


def check_state(name: str, z: object, expected: str = "a tensor (B, …)") -> None:
    """Raise unless z is a floating tensor with a batch dimension."""
    if not isinstance(z, Tensor):
        hint = "; its .z is a tensor" if isinstance(getattr(z, "z", None), Tensor) else ""
        raise TypeError(f"{name}: expected {expected}, got {described(z)}{hint}")
    if z.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {z.dtype}")
    if z.dim() == 0:
        raise ValueError(f"{name}: expected a batch dimension, (B, …), got a 0-d tensor")


def check_schedule(schedule: object) -> None:
    """Raise TypeError unless a schedule is a `Schedule`."""
    if isinstance(schedule, Schedule):
        return
    made = "Schedule(times, alpha, sigma) makes one of any levels"
    if isinstance(schedule, int):
        made = f"vp_schedule({schedule}) makes one of {schedule} steps"
    elif isinstance(schedule, str):
        preset = f", and PRESETS[{schedule!r}] would be for consistency_sample" if schedule in PRESETS else ""
        made = f"vp_schedule(steps) makes one{preset}"
    elif hasattr(schedule, "set_timesteps"):
        made = "adapters.diffusers.from_diffusers(network, scheduler, steps=…) makes one of a diffusers scheduler"
    elif hasattr(schedule, "levels") and hasattr(schedule, "zigzags"):
        made = "a ConsistencySchedule is for consistency_sample"
    raise TypeError(f"schedule: expected a Schedule, got {described(schedule)}; {made}")


def check_guidance(guidance_scale: object, batch: int) -> None:
    """Raise unless a guidance scale is None, a number, or a tensor of one number for all or for each sample."""
    if guidance_scale is not None:
        check_per_sample("guidance_scale", guidance_scale, batch, ", or None")


def check_per_sample(name: str, number: object, batch: int, other: str = "") -> None:
    """Raise unless it is a number, or a floating tensor of one number for all or for each sample."""
    if isinstance(number, Tensor):
        if not number.is_floating_point():
            raise TypeError(f"{name}: expected a floating tensor, got {number.dtype}")
        if number.dim() > 1 or (number.dim() == 1 and len(number) != batch):
            raise ValueError(f"{name}: expected a 0-d or a ({batch},) tensor, got shape {tuple(number.shape)}")
    elif not isinstance(number, Real):
        raise TypeError(f"{name}: expected a number or a tensor{other}, got {described(number)}")


def check_integer(name: str, number: object) -> None:
    """Raise TypeError unless a number is an integer."""
    if not isinstance(number, Integral | torch.SymInt):
        raise TypeError(f"{name}: expected an integer, got {described(number)}")


def check_batch(batch: object) -> None:
    """Raise unless it is a number of samples."""
    check_integer("batch", batch)
    if batch < 0:  # type: ignore[operator]
        raise ValueError(f"batch: expected at least 0 samples, got {batch}")


def check_number(name: str, number: object) -> None:
    """Raise TypeError unless it is a number."""
    if not isinstance(number, Real):
        raise TypeError(f"{name}: expected a number, got {described(number)}")


def check_level(name: str, level: object, *, zero: bool = False) -> None:
    """Raise unless it is a finite number above 0, or of at least 0; tensors and traced numbers are not read."""
    if torch.compiler.is_compiling() or (type(level) is float and 0.0 < level < math.inf):
        return
    if isinstance(level, Tensor) and level.dim() == 0 and level.is_floating_point():
        return
    check_number(name, level)
    if not (0 < level < math.inf or (zero and level == 0)):  # type: ignore[operator]
        raise ValueError(f"{name}: expected a number {'of at least' if zero else 'above'} 0, got {level}")


def check_key(**key: object) -> None:
    """Raise TypeError unless the numbers of a key are integers, or int64 tensors of one for all or for each sample."""
    for name, number in key.items():
        if type(number) is int:
            continue
        if isinstance(number, Tensor):
            if number.dtype != torch.int64 or number.dim() > 1:
                raise TypeError(f"{name}: expected an int, or an int64 tensor, 0-d or (B,), got {described(number)}")
        elif not isinstance(number, Integral | torch.SymInt):
            raise TypeError(f"{name}: expected an int or an int64 tensor, got {described(number)}")


def check_arguments(name: str, arguments: object) -> None:
    """Raise TypeError unless keyword arguments of a model are a mapping from their names."""
    if arguments is not None and not (isinstance(arguments, Mapping) and all(isinstance(k, str) for k in arguments)):
        raise TypeError(f"{name}: expected a mapping from names to values, got {described(arguments)}")


def check_callback(callback: object) -> None:
    """Raise TypeError unless a callback can be called."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: expected a function or None, got {described(callback)}")


def check_output(output: object, z: Tensor, guidance_scale: object = None, *, name: str = "model") -> None:
    """Raise unless a model returned a tensor like z, or under guidance a pair of them.

    name: the caller's name of the model.
    """
    pair = isinstance(output, tuple | list) and len(output) == 2 and all(isinstance(x, Tensor) for x in output)
    if guidance_scale is None:
        if pair and name == "model":
            raise TypeError(
                f"model: expected {_like(z)}, got a pair of tensors; guidance_scale=… combines a pair (uncond, cond)"
            )
        _check_tensor(name, output, z)
        return
    if not pair:
        doubled = isinstance(output, Tensor) and output.dim() > 0 and len(output) == 2 * len(z) > 0
        hint = "; output.chunk(2) makes a pair of a doubled batch" if doubled else hint_for(output)
        expected = f"a pair (uncond, cond) of tensors of shape {tuple(z.shape)}, because guidance_scale is given"
        raise TypeError(f"model: expected {expected}, got {described(output)}{hint}")
    for half in output:  # type: ignore[attr-defined]
        _check_tensor("model", half, z)


def _like(z: Tensor) -> str:
    return f"a tensor of shape {tuple(z.shape)}"


def _check_tensor(name: str, output: object, z: Tensor) -> None:
    if not isinstance(output, Tensor):
        raise TypeError(f"{name}: expected {_like(z)}, got {described(output)}{hint_for(output)}")
    if output.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {output.dtype}")
    if output.shape != z.shape:
        raise ValueError(f"{name}: expected {_like(z)}, as its input has, got shape {tuple(output.shape)}")
    if output.device != z.device:
        raise ValueError(f"{name}: expected a tensor on {z.device}, where its input is, got one on {output.device}")


def hint_for(output: Any) -> str:
    """A hint how to make a tensor of another type of output."""
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return "; return its first element"
    if type(output).__module__.partition(".")[0] == "numpy":
        return "; torch.from_numpy makes a tensor of it"
    named = [
        name for name in ("sample", *getattr(output, "__dict__", {})) if isinstance(getattr(output, name, None), Tensor)
    ]
    if named:
        return f"; return its .{named[0]}"
    if isinstance(output, Mapping):
        found = [name for name, value in output.items() if isinstance(value, Tensor)]
        return f"; return its [{found[0]!r}]" if found else ""
    return ""
