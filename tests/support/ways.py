"""The two ways of a call to the CPU kernels: the direct one, beside the dispatcher, and the long way round."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bicm_kernels import backend

Bits = Callable[[Tensor, Tensor], None]
#: The calls that the direct way was asked for, and whether it took them.
Taken = list[tuple[str, bool]]
Op = Callable[..., Any]


class Spy:
    """The direct way, and which calls it took."""

    def __init__(self, taken: Taken) -> None:
        self.direct, self.taken = backend.direct, taken

    def __getattr__(self, name: str) -> Op:
        def call(*args: Any) -> Any:
            result = getattr(self.direct, name)(*args)
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
