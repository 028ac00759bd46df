"""Checks that run before a kernel accesses memory.

Failures are RuntimeErrors, as from the native library; the public functions replace them by full messages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Number = float | Tensor
Integer = int | Tensor

FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
MAX_TERMS = 5
WORD = 2**32


def require(condition: bool, message: str) -> None:
    """Raise unless the condition holds."""
    if not condition:
        raise RuntimeError(f"bicm_kernels: {message}")


def check_states(tensors: Sequence[Tensor], terms: int) -> None:
    """Floating tensors (B, ...) of one shape on one device, as many as the terms or one more."""
    fits = 1 <= terms <= MAX_TERMS and len(tensors) in (terms, terms + 1)
    require(fits, "wrong number of tensors or coefficients")
    first = tensors[0]
    shape, device = first.shape, first.device
    require(len(shape) > 0, "tensors need a batch dimension")
    for x in tensors:
        require(x.dtype in FLOATING, "tensors must be floating")
        require(x.shape == shape and x.device == device, "tensors differ in shape or device")


def check_placed(value: Tensor, like: Tensor) -> None:
    """A 0-d tensor on this device or the host, or a (B,) tensor on this device."""
    one = value.dim() == 0
    require(one or (value.dim() == 1 and value.shape[0] == like.shape[0]), "an argument must be 0-d or (B,)")
    require(
        value.device == like.device or (one and value.is_cpu),
        "an argument must be on the tensors' device, or a 0-d tensor on the CPU",
    )


def check_number(value: Tensor, like: Tensor) -> None:
    """A 0-d or (B,) floating tensor."""
    require(value.dtype in FLOATING, "a number must be floating")
    check_placed(value, like)


def check_integer(value: Integer, like: Tensor, bound: int | None = None) -> None:
    """An int, in [0, bound) where there is a bound, or a 0-d or (B,) int64 tensor."""
    if isinstance(value, Tensor):
        require(value.dtype == torch.int64, "an integer must be an int64 tensor")
        check_placed(value, like)
    elif bound is not None:
        require(0 <= value < bound, f"step and sample_id must be in [0, 2**32), got {value}")


def check_key(seed: Integer, step: Integer, sample_id: Integer, like: Tensor) -> None:
    """The key of the noise of a batch like ``like``."""
    check_integer(seed, like)
    check_integer(step, like, WORD)
    check_integer(sample_id, like, min(WORD, WORD - like.shape[0] + 1))  # an empty batch has no last sample


def check_outputs(outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Outputs like the first input, without internal overlap, each exactly an input or disjoint from it."""
    first = inputs[0] if inputs else outs[0]
    for out in outs:
        require(out.dim() > 0 and out.dtype in FLOATING, "out must be floating, with a batch dimension")
        require(
            out.shape == first.shape and out.dtype == first.dtype and out.device == first.device,
            "out differs from the first tensor in shape, dtype or device",
        )
    check_places(outs, inputs)


def check_places(outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Outputs without internal overlap, each exactly an input or disjoint from it."""
    for k, out in enumerate(outs):
        require(out.is_contiguous() or nested(moving(out)), "out overlaps itself")
        require(all(same_elements(x, out) or apart(x, out) for x in inputs), "out overlaps a tensor")
        require(all(apart(other, out) for other in outs[:k]), "outputs overlap")


Extents = list[tuple[int, int]]


def moving(x: Tensor) -> Extents:
    """(stride, size) of the dimensions with more than one element, largest stride first."""
    if x.numel() == 0:
        return []
    return sorted(((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1), reverse=True)


def reach(extents: Extents) -> int:
    """The offset of the last element."""
    return sum(stride * (size - 1) for stride, size in extents)


def nested(extents: Extents) -> bool:
    """Whether each stride exceeds the range of the smaller ones, so that no two indices coincide."""
    return all(stride > reach(extents[k + 1 :]) for k, (stride, _) in enumerate(extents))


def same_strides(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape have the same strides."""
    strides = zip(x.shape, x.stride(), y.stride(), strict=True)
    return x.dtype == y.dtype and all(size == 1 or a == b for size, a, b in strides)


def same_elements(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same memory, element by element."""
    return x.data_ptr() == y.data_ptr() and same_strides(x, y)


def apart(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape share no memory: by address range, or exactly where strides are equal."""
    if x.numel() == 0:
        return True
    extents = moving(y)
    begin, other = x.data_ptr(), y.data_ptr()
    end = begin + (reach(moving(x)) + 1) * x.element_size()
    if end <= other or other + (reach(extents) + 1) * y.element_size() <= begin:
        return True
    distance, odd = divmod(other - begin, y.element_size())
    return same_strides(x, y) and not odd and nested(extents) and not reaches(distance, extents)


def reaches(distance: int, extents: Extents) -> bool:
    """Whether `distance` is the offset between two elements of a nested tensor."""
    if not extents:
        return distance == 0
    (stride, size), rest = extents[0], extents[1:]
    steps, short = divmod(distance, stride)
    return any(
        abs(count) < size and abs(left) <= reach(rest) and reaches(left, rest)
        for count, left in ((steps, short), (steps + 1, short - stride))
    )
