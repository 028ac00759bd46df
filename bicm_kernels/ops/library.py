"""The torch library that every family defines its schemas in; implementations register from C++, CUDA or Triton."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("bicm_kernels", "DEF")

#: Optional outputs: empty where a call does not need them.
_PLACEHOLDERS = frozenset(("next", "info_out", "overflow"))
#: Numbers that may be given per element, with the shape of the states.
_OF_ELEMENTS = frozenset(("weight",))
#: Tensors that may be of other samples, and the arguments that have their places then, int64.
_PLACED = {"F": "mask"}


def define(schema: str, states: Sequence[str], fake: Callable[..., Any]) -> None:
    """Define an op, and what it returns for tensors without values.

    Args:
        schema: name, arguments and results.
        states: the arguments that are tensors (B, ...) of one shape, or lists of such; others are 0-d or (B,).
        fake: makes the results. It is called with tensors on one device and of these shapes.
    """
    library.define(schema)
    name, _, signature = schema.partition("(")
    given = signature.partition(") ->")[0].split(", ")
    names = [argument.split()[-1] for argument in given if argument != "*"]

    @functools.wraps(fake)
    def checked(*positional: Any, **keywords: Any) -> Any:
        _check_alike(dict(zip(names, positional, strict=False)) | keywords, states)
        return fake(*positional, **keywords)

    torch.library.register_fake(f"bicm_kernels::{name}", checked, lib=library)
    if _LIST.search(signature.partition("->")[0]):
        _define_without_lists(name, signature, [names.index(found) for found in _LIST.findall(signature)])


# The stable ABI moves the tensors out of a list argument. A list in TorchScript's graphs may be a constant, or
# shared with another op, whose next read would find undefined tensors: there, ops take tensors one by one.
_LIST = re.compile(r"\bTensor\[\] (\w+)")
_MOST = 7
_WITHOUT_LISTS: dict[Any, Callable[..., Any]] = {}


def _define_without_lists(name: str, signature: str, lists: Sequence[int]) -> None:
    packet, _, overload = name.partition(".")
    twin = f"{packet}_traced.{overload}" if overload else f"{packet}_traced"
    arguments, arrow, results = signature.partition("->")
    one_by_one = _LIST.sub(lambda found: ", ".join(f"Tensor? {found[1]}{k}" for k in range(_MOST)), arguments)
    library.define(f"{twin}({one_by_one}{arrow}{results}")
    op, opened = (
        getattr(getattr(torch.ops.bicm_kernels, found), overload or "default") for found in (packet, f"{packet}_traced")
    )

    def closed(*flat: Any, **keywords: Any) -> Any:
        rest = list(flat)
        call: list[Any] = []
        while rest:
            count = _MOST if len(call) in lists else 1
            taken, rest = rest[:count], rest[count:]
            call.append([x for x in taken if x is not None] if count > 1 else taken[0])
        return op(*call, **keywords)

    def spread(*call: Any, **keywords: Any) -> Any:
        filled = [[*x, *[None] * (_MOST - len(x))] if k in lists else [x] for k, x in enumerate(call)]
        return opened(*[x for part in filled for x in part], **keywords)

    # Implicit, because the op inside records its own derivative.
    library.impl(twin, closed, "CompositeImplicitAutograd")
    _WITHOUT_LISTS[op] = spread


def without_lists(op: Any) -> Callable[..., Any]:
    """The replacement of an op under TorchScript, with the same arguments."""
    return _WITHOUT_LISTS[op]


def _check_alike(call: Mapping[str, Any], states: Sequence[str]) -> None:
    """Raise unless the tensors of a call agree.

    With a meta tensor among others the dispatcher calls the fake, whose result would be uninitialised memory.
    """
    tensors = [(name, x) for name, value in call.items() for x in _opened(value)]
    devices = {x.device for _, x in tensors if x.dim() or x.device.type != "cpu"}
    shaped = [
        (name in states or (name in _OF_ELEMENTS and x.dim() > 1), _shape_in(call, name, x))
        for name, x in tensors
        if not (name in _PLACEHOLDERS and x.shape == (0,))
    ]
    shapes = [shape for is_state, shape in shaped if is_state]
    rows = [shape for is_state, shape in shaped if not is_state and shape]
    if len(devices) > 1 or any(shape != shapes[0] or not shape for shape in shapes):
        raise RuntimeError("bicm_kernels: tensors differ in shape or device")
    if any(row != (shapes or rows)[0][:1] for row in rows):
        raise RuntimeError("bicm_kernels: a number must be 0-d or (B,)")


def _shape_in(call: Mapping[str, Any], name: str, x: Tensor) -> torch.Size:
    """The shape of a tensor of a call; of one that is placed, as if it were of all samples."""
    places = call.get(_PLACED.get(name, ""))
    placed = isinstance(places, Tensor) and places.dtype == torch.int64 and x.dim() > 0
    return places.shape + x.shape[1:] if placed else x.shape  # type: ignore[union-attr]


def _opened(value: Any) -> list[Tensor]:
    return [x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, Tensor)]
