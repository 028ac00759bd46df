"""The memory that tensors hold between operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """The most bytes that lived at once between two operations, those of `known` tensors left out."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.known:
                    self.living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.living = {key: one for key, one in self.living.items() if not one[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.living.values()))
        return results


def most(run: Callable[[], Tensor], *known: Tensor) -> int:
    with Held(*known) as held:
        run()
    return held.most


def state_bytes(z: Tensor) -> int:
    return z.numel() * z.element_size()
