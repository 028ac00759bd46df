"""Wrong calls of the gaussian family raise what names the argument, what was given and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import bicm_kernels as bk

X, WIDE = torch.ones(2, 3), torch.ones(2, 4)


def step(tensors: Any = (X,), weights: Any = (1.0,), **changes: Any) -> Any:
    return bk.gaussian_step(tensors, weights, **{"std": 1.0, "seed": 1, **changes})


def density(after: Any = X, tensors: Any = (X,), weights: Any = (1.0,), **changes: Any) -> Any:
    return bk.gaussian_log_prob(after, tensors, weights, **{"std": 1.0, **changes})


def divergence(tensors: Any = (X,), reference: Any = (X,), weights: Any = (1.0,), **changes: Any) -> Any:
    return bk.gaussian_kl(tensors, reference, weights, **{"std": 1.0, **changes})


ERRORS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (ValueError, "std must be at least 0, got -0.5", lambda: step(std=-0.5)),
    (ValueError, "std must be at least 0, got -0.5", lambda: density(std=-0.5)),
    (ValueError, "std must be at least 0, got nan", lambda: divergence(std=float("nan"))),
    (TypeError, "std must be a float, a 0-d tensor or a .* got None", lambda: step(std=None, seed=1)),
    (TypeError, "std must be a float", lambda: density(std="1")),
    (ValueError, r"std must be a 0-d or a \(2,\) tensor, got shape \(3,\)", lambda: density(std=X[0])),
    (TypeError, "std must be a floating tensor, got torch.int64", lambda: divergence(std=torch.tensor(1))),
    (ValueError, "reduction must be one of mean, sum, got 'none'", lambda: step(reduction="none")),
    (ValueError, "reduction must be one of mean, sum, got 3", lambda: density(reduction=3)),
    (ValueError, r"reduction must be one of mean, sum, got \[\]", lambda: divergence(reduction=[])),
    (ValueError, "gradient must be one of auto, backward, forward, got 'both'", lambda: density(gradient="both")),
    (ValueError, "seed must be given where noise is drawn, got None and std=1.0", lambda: step(seed=None)),
    (TypeError, "seed must be an int", lambda: step(seed=1.5)),
    (ValueError, "step must be in", lambda: step(step=-1)),
    (TypeError, r"tensors: expected a sequence of tensors, got one tensor; write \[x\]", lambda: step(tensors=X)),
    (TypeError, r"tensors: expected a sequence of tensors, got one tensor; write \[x\]", lambda: density(X, X)),
    (TypeError, r"reference: expected a sequence of tensors, got one tensor", lambda: divergence([X], X)),
    (TypeError, "tensors: expected a sequence of tensors, got 3", lambda: density(X, 3)),
    (ValueError, "tensors must hold 1 to 5 tensors, got 0", lambda: density(X, [], [])),
    (ValueError, "tensors must hold 1 to 5 tensors, got 6", lambda: step([X] * 6, [1.0] * 6)),
    (ValueError, "tensors must hold 1 to 5 tensors, got 6", lambda: divergence([X] * 6, [X] * 6, [1.0] * 6)),
    (ValueError, "weights must be as many as the tensors, 2, got 1", lambda: density(X, [X, X])),
    (ValueError, "weights must be as many as the tensors, 2, got 1", lambda: step([X, X])),
    (ValueError, "weights must be as many as the tensors, 1, got 2", lambda: divergence(weights=[1.0, 2.0])),
    (ValueError, "reference must be as many as the tensors, 1, got 2", lambda: divergence([X], [X, X])),
    (TypeError, "weights must hold one weight per tensor, got 1.0", lambda: density(X, [X], 1.0)),
    (TypeError, r"weights\[0\] must be a float", lambda: density(X, [X], ["1"])),
    (TypeError, r"weights\[0\] must be a float", lambda: divergence(weights=["1"])),
    (ValueError, r"tensors\[0\] must have the shape of next, \(2, 3\), got \(2, 4\)", lambda: density(X, [WIDE])),
    (ValueError, r"tensors\[1\] must have the shape of tensors\[0\]", lambda: step([X, WIDE], [1.0, 1.0])),
    (ValueError, r"reference\[0\] must have the shape of tensors\[0\], \(2, 3\)", lambda: divergence([X], [WIDE])),
    (TypeError, "next must be a tensor, got None", lambda: density(None)),
    (TypeError, "next must be float16, .* got torch.int64", lambda: density(X.long())),
    (ValueError, "next must have a batch dimension", lambda: density(X[0, 0], [X[0, 0]])),
    (ValueError, r"guidance_scale goes with a pair .* as tensors\[0\]", lambda: density(X, [(X, X)])),
    (ValueError, r"guidance_scale goes with a pair .* as tensors\[0\]", lambda: step(guidance_scale=2.0)),
    (TypeError, "a pair .* goes last", lambda: density(X, [(X, X), X], [1.0, 1.0], guidance_scale=1.0)),
    (TypeError, r"reference\[0\] must be a tensor, got a tuple", lambda: divergence([X], [(X, X)])),
    (ValueError, "tensors.0. must be on the device of next, cpu, got meta", lambda: density(X, [X.to("meta")])),
]


@pytest.mark.parametrize(("error", "message", "call"), ERRORS, ids=[message for _, message, _ in ERRORS])
def test_errors(each_backend: str, error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()
