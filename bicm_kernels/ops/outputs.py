"""Outputs given by the caller: checks of shape, dtype and overlap with inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from bicm_kernels.ops import arguments, checks
from bicm_kernels.torch_internals import transforms_alone

LARGE = 2**26  # bytes


def has_memory(x: Tensor) -> bool:
    """Whether a tensor has memory: it is not traced, meta or fake."""
    return not arguments.compiling() and x.untyped_storage().device.type != "meta"


def _elements(x: Tensor) -> tuple[int, int]:
    """The addresses of the first byte of a tensor and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def shares_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have a byte in common; exact, and as slow as touching every byte.

    Large tensors whose address ranges overlap count as sharing: an exact check would take many times their memory.
    """
    if x.numel() == 0 or y.numel() == 0 or x.device != y.device:
        return False
    (x_begin, x_end), (y_begin, y_end) = _elements(x), _elements(y)
    if x_end <= y_begin or y_end <= x_begin:
        return False
    if max(x_end, y_end) - min(x_begin, y_begin) > LARGE:
        return True
    begin = min(x_begin, y_begin)
    touched = torch.zeros(max(x_end, y_end) - begin, dtype=torch.bool)
    touched[_bytes(x, begin)] = True
    return bool(touched[_bytes(y, begin)].any())


def _bytes(x: Tensor, begin: int) -> Tensor:
    offsets = torch.full((), x.data_ptr() - begin)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride * x.element_size()
    return (offsets.unsqueeze(-1) + torch.arange(x.element_size())).flatten()


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements of a tensor share an address."""
    dims = sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    span = 0
    for stride, size in dims:
        if stride <= span:
            break
        span += (size - 1) * stride
    else:
        return False  # each stride exceeds the range of the smaller ones
    offsets = _bytes(x, x.data_ptr())
    return offsets.unique().numel() != offsets.numel()


def same_place(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape are the same memory, element by element."""
    return x.data_ptr() == y.data_ptr() and x.dtype == y.dtype and x.stride() == y.stride()


def is_same(x: object, y: object) -> bool:
    """Whether two tensors are the same memory, as far as that can be seen."""
    if x is y or transforms_alone() or not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return x is y
    return has_memory(x) and has_memory(y) and same_place(x, y)


def write(outs: Sequence[Tensor], results: Any, tracked: bool) -> None:
    """Copy the results of a reference into the caller's outputs, which carry no derivative."""
    if tracked:
        raise ValueError("out must not be given where a tensor requires grad: results written to it have no derivative")
    results = (results,) if isinstance(results, Tensor) else results
    for out, result in zip(outs, results, strict=False):  # results that were not requested are None, and last
        if out is not result:
            out.copy_(result)


def check_apart(outs: Sequence[Tensor], numbers: Sequence[Any]) -> None:
    """Raise where an output shares memory with a number's tensor, which is read while outputs are written."""
    for x in numbers:
        if isinstance(x, Tensor) and has_memory(x) and any(has_memory(out) and shares_memory(out, x) for out in outs):
            raise ValueError("out must not share memory with a tensor of weights, coefficients or keys")


def check_outs(outs: Mapping[str, Any], tensors: Mapping[str, Tensor], check: Callable[[str, Any], None]) -> None:
    """Raise unless the outputs pass ``check`` and overlap no tensor, except one that is exactly the same memory."""
    if outs and transforms_alone():
        raise ValueError("out must not be given under a torch.func transform, which cannot record writes to it")
    for name, out in outs.items():
        check(name, out)
    # Without memory, the kernel checks when the graph runs.
    real = {name: out for name, out in outs.items() if has_memory(out)}
    for name, out in real.items():
        if overlaps_itself(out):
            raise ValueError(f"{name} must not overlap itself, got strides {out.stride()}")
        for other, x in tensors.items():
            if not same_place(out, x) and shares_memory(out, x):
                raise ValueError(f"{name} must be exactly {other} or disjoint from it: they overlap in part")
    for (name, out), (other, x) in combinations(real.items(), 2):
        if shares_memory(out, x):
            raise ValueError(f"{name} and {other} must not share memory")


def check_out(name: str, out: object, first: Tensor, first_name: str) -> None:
    """Raise unless ``out`` can take a result like ``first``: shape, dtype and device, and no gradient."""
    checks.check_state(name, out, first, first_name)
    assert isinstance(out, Tensor)
    if out.dtype != first.dtype:
        raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype}, got {out.dtype}")
    if not arguments.compiling() and out.is_neg():
        raise ValueError(f"{name} must not have torch's negative bit, which kernels do not write; give new memory")
    if arguments.requires_grad(out):
        raise ValueError(f"{name} must not require grad: results written to it have no derivative")
