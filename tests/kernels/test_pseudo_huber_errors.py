"""Wrong calls of the losses raise what names the argument, what was given and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import bicm_kernels as bk

X = torch.ones(2, 3)
IMAGES = torch.ones(4, 3, 8, 8)
ERRORS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (
        ValueError,
        r"target must have the shape of pred, \(2, 3\), got \(2, 4\)",
        lambda: bk.pseudo_huber(X, torch.ones(2, 4)),
    ),
    (
        TypeError,
        r"target must be given by name, target=…, where u is left out, got None, and a torch.float32 tensor .* as u",
        lambda: bk.consistency_loss(X, X, 2.0, X),
    ),
    (TypeError, "target must be a tensor, got None", lambda: bk.pseudo_huber(X, None)),  # type: ignore[arg-type]
    (TypeError, "pred must be float16, .* got torch.int64", lambda: bk.pseudo_huber(X.long(), X)),
    (ValueError, "pred must have a batch dimension", lambda: bk.pseudo_huber(torch.ones(()), torch.ones(()))),
    (
        ValueError,
        "kind must be one of vector, elementwise, squared, got 'huber'",
        lambda: bk.pseudo_huber(X, X, kind="huber"),
    ),
    (ValueError, "reduction must be one of mean, sum, none, got 3", lambda: bk.pseudo_huber(X, X, reduction=3)),  # type: ignore[arg-type]
    (ValueError, "c must be given for kind='elementwise'", lambda: bk.pseudo_huber(X, X, kind="elementwise")),
    (ValueError, "c must be None for kind='squared'.*0.1", lambda: bk.pseudo_huber(X, X, c=0.1, kind="squared")),
    (
        ValueError,
        "c must be None for kind='squared'.*a torch.float32 tensor",
        lambda: bk.consistency_loss(X, X, 1.0, None, X, c=X[:, 0], kind="squared"),
    ),
    (ValueError, "c must be at least 0, got -0.5", lambda: bk.pseudo_huber(X, X, c=-0.5)),
    (TypeError, "c must be a float", lambda: bk.pseudo_huber(X, X, c="0.5")),  # type: ignore[arg-type]
    (
        ValueError,
        r"weight must be 0-d, \(2,\) or broadcast to the shape of pred, \(2, 3\), with as many dimensions, got shape "
        r"\(3,\); pass weight\[None\]",
        lambda: bk.pseudo_huber(X, X, weight=X[0]),
    ),
    (
        ValueError,
        r"\(4, 3, 8, 8\), with as many dimensions, got shape \(4, 8, 8\); pass weight\[:, None\]$",
        lambda: bk.pseudo_huber(IMAGES, IMAGES, weight=torch.ones(4, 8, 8)),
    ),
    (
        ValueError,
        r"got shape \(8, 8\); pass weight\[None, None\]$",
        lambda: bk.consistency_loss(IMAGES, IMAGES, 1.0, None, IMAGES, weight=torch.ones(8, 8, dtype=torch.bool)),
    ),
    (ValueError, r"got shape \(5, 8\)$", lambda: bk.pseudo_huber(IMAGES, IMAGES, weight=torch.ones(5, 8))),
    (
        TypeError,
        r"weight must be a float, a floating tensor or a bool mask, got \[1, 0\] \(list\)",
        lambda: bk.pseudo_huber(X, X, weight=[1, 0]),  # type: ignore[arg-type]
    ),
    (TypeError, "weight must be a floating tensor", lambda: bk.pseudo_huber(X, X, weight=torch.tensor([1, 2]))),
    (
        ValueError,
        r"F must have the shape of x, \(2, 3\), got \(2, 4\)",
        lambda: bk.consistency_loss(X, torch.ones(2, 4), 1.0, None, X),
    ),
    (TypeError, "x must be a tensor, got None", lambda: bk.consistency_loss(None, X, 1.0, None, X)),  # type: ignore[arg-type]
    (
        ValueError,
        "u must be None for parameterization='cm'",
        lambda: bk.consistency_loss(X, X, 1.0, 0.5, X, parameterization="cm"),
    ),
    (
        ValueError,
        "u must be None for parameterization='edm'",
        lambda: bk.consistency_loss(X, X, 1.0, X[:, 0], X, parameterization="edm"),
    ),
    (
        ValueError,
        "parameterization must be one of bcm, cm, edm",
        lambda: bk.consistency_loss(X, X, 1.0, None, X, parameterization="v"),
    ),
    (ValueError, r"t must be a 0-d or a \(2,\) tensor", lambda: bk.consistency_loss(X, X, X, None, X)),
    (TypeError, "t must be a float", lambda: bk.consistency_loss(X, X, None, None, X)),  # type: ignore[arg-type]
    (TypeError, "sigma_data must be a float", lambda: bk.consistency_loss(X, X, 1.0, None, X, sigma_data="0.5")),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("error", "message", "call"), ERRORS, ids=[message for _, message, _ in ERRORS])
def test_errors(each_backend: str, error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()
