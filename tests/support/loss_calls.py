"""Losses that tests share: kinds, inputs that take gradients, and what a call allocates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bicm_kernels as bk
from tests.support.tensors import F64, random

EVERY_KIND: list[dict[str, Any]] = [
    {},
    {"c": 0.0},
    {"c": 0.3},
    {"kind": "elementwise", "c": 0.03},
    {"kind": "elementwise", "c": 0.0},
    {"kind": "squared"},
]
KINDS: list[dict[str, Any]] = [{"c": 0.3}, {"kind": "elementwise", "c": 0.2}, {"kind": "squared"}]
#: The codes of the schemas.
CODES = {"vector": 0, "elementwise": 1, "squared": 2}


def code_of(options: dict[str, Any]) -> int:
    return CODES[options.get("kind", "vector")]


def with_c(kind: str, c: Any) -> dict[str, Any]:
    """A kind and its c, which the squared distance does not take."""
    return {"kind": kind} if kind == "squared" else {"kind": kind, "c": c}


def leaves(count: int, *shape: int, dtype: torch.dtype = F64) -> list[Tensor]:
    return [random(*shape, dtype=dtype, seed=k).requires_grad_() for k in range(count)]


class Allocations(TorchDispatchMode):
    """The bytes of every storage that an operation returned, by its address."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        storages = [x.untyped_storage() for x in tree_leaves(results) if isinstance(x, Tensor)]
        self.found |= {storage.data_ptr(): storage.nbytes() for storage in storages}
        return results


def step(x: Tensor, F: Tensor, target: Tensor, t: Any, c: Any, options: dict[str, Any]) -> Tensor:
    more = {key: value for key, value in options.items() if key != "c"}
    c = None if more.get("kind") == "squared" else c
    return bk.consistency_loss(x, 2 * F, t, None, target, c=c, **more) + bk.pseudo_huber(F, target, c=c, **more)


def keeps(loss: Tensor) -> bool:
    """Whether gradients were formed with the value."""
    assert loss.grad_fn is not None
    name = type(loss.grad_fn).__name__
    assert name in ("KeptBesideBackward", "TrackedBackward"), name
    return name == "KeptBesideBackward"
