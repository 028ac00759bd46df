"""Arguments of a step: whether a kernel reads them as the original would, and a timestep as a number."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from numpy import float32
from torch import Tensor

from bicm_diffusion.adapters.diffusers.tables import Timesteps, overrides

#: Dtypes with which the originals index or compute differently from the number.
NARROW = frozenset((torch.bool, torch.uint8, torch.int8, torch.int16))
#: What most arguments are that are no tensors.
NO_TENSORS = frozenset((float, int, bool, type(None)))


def plain(argument: Any) -> bool:
    """Whether an argument, if it is a tensor, has values that a kernel reads as the original would.

    Subclasses may override operations, and tensors without values have no number.
    """
    if not isinstance(argument, Tensor):
        return True
    return not (argument.is_meta or overrides(argument))


def check_plain(arguments: Iterable[Any]) -> None:
    """Raise TypeError for a tensor of a subclass with its own operations. Every step of a scheduler calls this."""
    for argument in arguments:
        kind = type(argument)
        if kind is not Tensor and kind not in NO_TENSORS and not plain(argument):
            raise TypeError("a tensor of a subclass")


def numbers(**arguments: Any) -> None:
    """Raise TypeError unless every argument is a number of Python's or NumPy's, and not NaN."""
    for name, value in arguments.items():
        kind: type[Any] = type(value)
        if kind is not float and (kind is float32 or not issubclass(kind, Real)):
            raise TypeError(f"{name} as {kind.__name__}")
        if value != value:
            raise TypeError(f"{name} that is not a number")


def constant(noise: Tensor) -> None:
    """Raise TypeError for noise that requires a gradient: a launch would make x0 a function of it."""
    if noise.requires_grad and torch.is_grad_enabled():
        raise TypeError("noise that requires a gradient")


def host_value(timestep: Any, known: Timesteps) -> Any:
    """A timestep as a number, None if it is not a plain one. known: the scheduler's own, whose values are not read."""
    if not isinstance(timestep, Tensor):
        if not isinstance(timestep, Real) or timestep is True or timestep is False or timestep != timestep:
            return None
        # NumPy's narrow floats compare with numbers in their own precision.
        return timestep if isinstance(timestep, Integral) else float(timestep)
    if timestep.dim():
        return None
    value = known.at(timestep)
    if value is None:
        if timestep.dtype in NARROW or overrides(timestep):
            return None
        try:
            value = timestep.item()
        except RuntimeError:  # under a transform, or without a value
            return None
    return value if value == value else None  # NaN


def is_whole(timestep: Any) -> bool:
    """Whether a timestep is an integer, which the originals refuse."""
    return not timestep.dtype.is_floating_point if isinstance(timestep, Tensor) else isinstance(timestep, int)
