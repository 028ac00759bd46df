"""The two ways of a call to the CPU kernels: the direct one, beside the dispatcher, and the long way round."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bicm_kernels import backend
from tests.support.torch_versions import KEEPS_RESULTS

Bits = Callable[[Tensor, Tensor], None]
#: The calls that the direct way was asked for, and whether it took them.
Taken = list[tuple[str, bool]]
Op = Callable[..., Any]
#: Constants whose references are counted: since Python 3.12 by code for older ones alone, and to no effect.
COUNTED: tuple[bool | None, ...] = (True, None) if sys.version_info < (3, 12) else ()


class Spy:
    """The direct way, and which calls it took."""

    def __init__(self, taken: Taken) -> None:
        self.direct, self.taken = backend.direct, taken

    def __getattr__(self, name: str) -> Op:
        function = getattr(self.direct, name)

        def call(*args: Any) -> Any:
            result = function(*args)
            self.taken.append((name, result is not None))
            return result

        return call


def long_way(op: Op, *args: Any) -> Any:
    before, backend.direct = backend.direct, None
    try:
        return op(*args)
    finally:
        backend.direct = before


def opened(results: Any) -> list[Any]:
    return list(results) if isinstance(results, tuple) else [results]


def agree(ours: Any, theirs: Any, same_bits: Bits) -> None:
    for actual, expected in zip(opened(ours), opened(theirs), strict=True):
        assert type(actual) is type(expected)
        if expected is None:
            continue
        same_bits(actual, expected)
        assert actual.stride() == expected.stride()
        assert actual.is_inference() == expected.is_inference()
        assert actual.requires_grad == expected.requires_grad
        if KEEPS_RESULTS:  # else the dispatcher's results are of torch's allocator
            assert actual.untyped_storage().resizable() == expected.untyped_storage().resizable()


class Counter(TorchDispatchMode):
    """Counts the ops that the dispatcher sees."""

    seen: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Passes every function on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


#: Where somebody watches or takes part.
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "dispatch mode": Counter,
    "function mode": Functions,
    "default device": lambda: torch.device("cpu"),
    "forward mode": forward_ad.dual_level,
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
}

#: Layouts of a state.
LAYOUTS: dict[str, Op] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "every other": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
    "expanded": lambda x: x[:, :1].expand_as(x),
    "a stride for nothing": lambda x: x[:, :, None].as_strided((2, 3, 1, 5, 4), (60, 20, 77, 4, 1)),
    "one sample": lambda x: x[1:].repeat(2, 1, 1, 1),
    "flat": lambda x: x.flatten(1),
}


class Sub(Tensor):
    """A subclass that changes nothing."""


# What must go the long way because of a tensor: how a plain one becomes it.
TENSORS: dict[str, Op] = {
    "requires grad": lambda x: x.clone().requires_grad_(),
    "in a graph": lambda x: x.clone().requires_grad_() * 1.0,
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "subclass": lambda x: x.as_subclass(Sub),
    "negated": lambda x: torch.complex(x, -x).conj().imag,
    "negated, dense": lambda x: torch._neg_view(x),
    "without memory": lambda x: torch._efficientzerotensor(x.shape),
}

#: A program that is run with the direct way on or off.
SWITCHED = """
import torch, bicm_kernels as bk
assert (bk.backend.direct is None) == {off}
x = torch.ones(1, 3)
assert torch.equal(bk.ddim_step(x, x, a=2.0, b=0.5), 2.5 * x)
"""
