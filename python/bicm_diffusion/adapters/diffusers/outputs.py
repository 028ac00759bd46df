"""What a step returns: diffusers' output classes, and the dtype that PyTorch's promotion gives a state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bicm_kernels.inputs import output


def as_output(graph: bool, cls: Any, previous: Tensor, name: str = "", x0: Tensor | None = None) -> Any:
    """Make a scheduler's output without the dataclass's constructor, which takes as long as a small kernel."""
    if graph:
        return cls(**({"prev_sample": previous, name: x0} if name else {"prev_sample": previous}))
    if name:
        return output(cls, "prev_sample", previous, name, x0)
    return output(cls, "prev_sample", previous)


def as_state(sample: Tensor, model_output: Tensor) -> Tensor:
    """The sample in the dtype that PyTorch's promotion gives the original's result."""
    if sample.dtype is model_output.dtype:
        return sample
    return sample.to(torch.promote_types(sample.dtype, model_output.dtype))


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; itself, without a call of PyTorch, where it has it."""
    return x if x.dtype is dtype else x.to(dtype)
