"""Calls to be made wrongly, and the check of what they raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import bicm_kernels as bk

X = torch.zeros(2, 3)
WIDE = torch.zeros(2, 4)
IDS = torch.arange(2)
BDIA = {"a": 1.0, "b": 0.5, "a_last": 1.0, "b_last": 0.5}
DENOISED: dict[str, Any] = {"x0_weights": [1.0], "weights": [1.0], "x0_weight": 1.0}


def ddim(z: Any = X, eps: Any = X, **changes: Any) -> Any:
    return bk.ddim_step(z, eps, **{"a": 1.0, "b": 0.5, **changes})


def affine(tensors: Any = (X,), weights: Any = (1.0,), **changes: Any) -> Any:
    return bk.affine_step(tensors, weights, **changes)


def denoised(tensors: Any = (X,), **changes: Any) -> Any:
    numbers = {**DENOISED, **changes}
    return bk.denoised_step(tensors, numbers.pop("x0_weights"), numbers.pop("weights"), **numbers)


def noisy(x: Any = X, sigma: Any = 1.0, **changes: Any) -> Any:
    return bk.add_noise(x, sigma, **{"seed": 1, **changes})


def normal(shape: Any = (2, 3), **changes: Any) -> Any:
    return bk.normal(shape, **{"seed": 1, **changes})


# What was called, the exception, and words that its message must hold.
Wrong = tuple[Callable[[], Any], type[Exception], tuple[str, ...]]


def check_messages(table: dict[str, Wrong]) -> None:
    """Every call of the table raises its exception with its words."""
    failures = []
    for name, (wrong, kind, words) in table.items():
        try:
            given = wrong()
        except Exception as error:
            if type(error) is kind and all(word in str(error) for word in words) and len(str(error)) < 400:
                continue
            failures.append(f"{name}: {type(error).__name__}: {error}")
        else:
            failures.append(f"{name}: returned {given}")
    assert not failures, "\n".join(failures)
