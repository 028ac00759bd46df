"""Plain calls that the native library hands to torch's dispatcher: the same results, and nothing left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bicm_kernels as bk
from bicm_kernels import backend
from tests.support.plain_calls import CALLS, MASK, X, Y, Z

pytestmark = pytest.mark.skipif(backend.library is None, reason="the native library does not run")


class Counted:
    """The native library, and the answers of its way through the dispatcher."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.answers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)

    def call_through_dispatcher(self, *arguments: Any) -> Any:
        self.answers.append(self.library.call_through_dispatcher(*arguments))
        return self.answers[-1]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted(backend.library)
    monkeypatch.setattr(backend, "direct", None)
    monkeypatch.setattr(backend, "library", counted)
    return counted


def flat(results: Any) -> list[Tensor | None]:
    return [results] if isinstance(results, Tensor) else [*results]


@pytest.mark.parametrize("name", CALLS)
def test_plain_calls_give_the_references_bits(name: str, library: Counted) -> None:
    actual = CALLS[name]()
    assert len(library.answers) == 1 and library.answers[0] is not NotImplemented
    assert type(library.answers[0]) is not list
    with backend.use("reference"):
        expected = CALLS[name]()
    for one, other in zip(flat(actual), flat(expected), strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or (one.dtype == other.dtype and torch.equal(one, other))


def test_an_output_is_the_tensor_that_was_given(library: Counted) -> None:
    out = torch.empty(2, 5)
    assert bk.ddim_step(X, Y, a=1.5, b=2.0, out=out) is out
    assert library.answers == [out]


def test_a_tensor_among_the_numbers_asks_for_the_other_overload(library: Counted) -> None:
    assert torch.equal(bk.ddim_step(X, Y, a=torch.tensor(1.5), b=2.0), 1.5 * X + 2.0 * Y)
    assert [type(answer) for answer in library.answers] == [list]


TRACKED = X.clone().requires_grad_()
NOT_PLAIN: dict[str, Callable[[], Any]] = {
    "a derivative": lambda: bk.affine_step([X, TRACKED], [1.0, 2.0]),
    "an output that carries one": lambda: bk.ddim_step(X, Y, a=1.0, b=2.0, out=TRACKED),
    "a large seed": lambda: bk.add_noise(X, 1.0, seed=2**64 - 1),
    "None for a number": lambda: bk.ddim_step(X, Y, a=None, b=2.0),  # type: ignore[arg-type]
    "a float for an integer": lambda: bk.add_noise(X, 1.0, seed=1, step=2.0),  # type: ignore[arg-type]
    "too many weights": lambda: bk.affine_step([X], [1.0, 2.0]),
    "noise without a seed": lambda: bk.affine_step([X], [1.0], noise_weight=2.0),
    "another shape": lambda: bk.ddim_step(X, Y[:1], a=1.0, b=2.0),
    "an output of another shape": lambda: bk.ddim_step(X, Y, a=1.0, b=2.0, out=torch.empty(2, 4)),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_the_long_way_has_the_last_word(name: str, library: Counted) -> None:
    try:
        NOT_PLAIN[name]()
    except (TypeError, ValueError):
        assert name not in ("a derivative", "a large seed")
    else:
        assert name in ("a derivative", "a large seed")
    assert library.answers == [NotImplemented]


@pytest.mark.parametrize("name", ["a pair", "three results", "optional tensors", "three outputs"])
def test_no_reference_is_kept(name: str, library: Counted) -> None:
    CALLS[name]()
    library.answers.clear()
    tensors = (X, Y, Z, MASK)
    before = [sys.getrefcount(x) for x in tensors], [x._use_count() for x in tensors]
    for _ in range(10):
        CALLS[name]()
        library.answers.clear()
    assert ([sys.getrefcount(x) for x in tensors], [x._use_count() for x in tensors]) == before


WITHOUT_HANDLES = """
import torch, bicm_kernels as bk
from bicm_kernels import backend
from tests.support.plain_calls import CALLS
before = {name: call() for name, call in CALLS.items()}
backend.library.forget_handles()
for name, call in CALLS.items():
    results = call()
    for one, other in zip(*[[x] if isinstance(x, torch.Tensor) else x for x in (results, before[name])], strict=True):
        assert (one is None and other is None) or torch.equal(one, other), name
print("alike")
"""


@pytest.mark.slow
def test_without_handles_the_dispatcher_is_called_from_python(python: Callable[..., Any]) -> None:
    assert python(WITHOUT_HANDLES, BICM_KERNELS_DIRECT="0").stdout.strip() == "alike"
