"""What must hold before a kernel may touch memory. Failures are RuntimeErrors, as from the native library: the public
functions turn them into explanations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bicm_kernels.triton_kernels.keys import WORD, Integer, Number

FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def check_states(tensors: Sequence[Tensor]) -> None:
    """Floating tensors (B, ...) of one shape on one device."""
    first = tensors[0]
    shape, device = first.shape, first.device
    require(len(shape) > 0, "tensors must have a batch dimension")
    for x in tensors:
        require(x.dtype in FLOATING, "tensors must be floating")
        require(x.shape == shape, "tensors must have one shape")
        require(x.device == device, "tensors must be on one device")


def check_placed(name: str, value: Tensor, like: Tensor) -> None:
    """A 0-d tensor here or on the host, or a (B,) tensor here."""
    require(
        value.dim() == 0 or (value.dim() == 1 and value.shape[0] == like.shape[0]), f"{name} must be 0-d or (B,)"
    )
    require(
        value.device == like.device or (value.dim() == 0 and value.device.type == "cpu"),
        f"{name} must be on the tensors' device",
    )


def check_number(name: str, value: Number | None, like: Tensor) -> None:
    """A float, a 0-d or a (B,) floating tensor."""
    if isinstance(value, Tensor):
        require(value.dtype in FLOATING, f"{name} must be floating")
        check_placed(name, value, like)


def check_integer(name: str, value: Integer, like: Tensor, bound: int | None = None) -> None:
    """An int, in [0, bound) where there is a bound, or a 0-d or (B,) int64 tensor."""
    if isinstance(value, Tensor):
        require(value.dtype == torch.int64, f"{name} must be int64")
        check_placed(name, value, like)
    elif bound is not None:
        require(0 <= value < bound, f"{name} must be in [0, {bound})")


def check_key(seed: Integer, step: Integer, sample_id: Integer, like: Tensor) -> None:
    """The key of the noise of a batch like ``like``."""
    check_integer("seed", seed, like)
    check_integer("step", step, like, WORD)
    check_integer("sample_id", sample_id, like, WORD - like.shape[0] + 1)


def check_output(name: str, out: Tensor, inputs: Sequence[Tensor] = ()) -> None:
    """A floating tensor (B, ...) that no element shares memory in, and that is an input or apart from it."""
    check_states([out])
    require(distinct(out), f"{name} must not overlap itself")
    for x in inputs:
        exact = x.data_ptr() == out.data_ptr() and x.dtype == out.dtype and x.stride() == out.stride()
        require(exact or apart(x, out), f"{name} must not overlap an input partially")


def distinct(x: Tensor) -> bool:
    """Whether no two indices reach one address. Ascending strides that each step over what lies below suffice."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return True


def apart(x: Tensor, y: Tensor) -> bool:
    """Whether the memory that two tensors span is disjoint."""
    if x.numel() == 0 or y.numel() == 0:
        return True
    start, end = span(x)
    other_start, other_end = span(y)
    return end <= other_start or other_end <= start


def span(x: Tensor) -> tuple[int, int]:
    """The first address of a tensor and the one behind its last."""
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
