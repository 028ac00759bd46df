"""What a step asks in one call: the native library's functions answer as their Python twins do, and as documented."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from bicm_kernels.inputs import ALIKE, OTHER, READY, SINGLE
from tests.support.step_inputs import WAYS, functions_of


@pytest.fixture(params=WAYS)
def functions(request: pytest.FixtureRequest) -> Any:
    return functions_of(request.param)


class Marked(Tensor):
    """A tensor of a subclass."""


def noted(functions: Any, own: dict[str, Any]) -> Any:
    return functions.note((("levels", own["levels"], own["levels"]._version),), (), "", (), True)


X, PLAIN = torch.ones(2, 3), READY | SINGLE | ALIKE
KNOWN: dict[str, tuple[tuple[Any, ...], int]] = {
    "float32": ((X, 0.5, X, None, torch.tensor(0.5)), PLAIN),
    "a timestep of int64": ((X, torch.tensor(3), X), PLAIN | OTHER),
    "a timestep of float64": ((X, torch.tensor(3.0, dtype=torch.float64), X), PLAIN | OTHER),
    "other shapes": ((X, X[:, :2]), READY | SINGLE),
    "another number of dimensions": ((X, X[0]), READY | SINGLE),
    "other strides": ((X, torch.ones(3, 2).T), PLAIN),
    "float64": ((X, X.double()), READY | OTHER),
    "float16": ((X.half(), X.half()), READY | OTHER),
    "whole numbers": ((X, X.long()), READY | OTHER),
    "a derivative": ((X, X.clone().requires_grad_()), READY),
    "a derivative of a number": ((X, torch.tensor(1.0, requires_grad=True)), READY),
    "no memory": ((X.to("meta"), X.to("meta")), READY | SINGLE),
    "another layout": ((X.to_sparse(), X), READY | SINGLE),
    "no tensors": ((1.0, "x"), READY | SINGLE),
    "a subclass": ((X, X.as_subclass(Marked)), 0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_of_arguments(name: str, functions: Any) -> None:
    own = {"levels": torch.ones(3)}
    read = noted(functions, own)
    arguments, expected = KNOWN[name]
    assert functions.ready(read, own, arguments, {}) == expected
    named = {f"a{k}": x for k, x in enumerate(arguments[1:])}
    assert functions.ready(read, own, arguments[:1], named) == expected
    own["levels"].mul_(2)
    assert functions.ready(read, own, arguments, {}) == 0


def test_derivatives_matter_where_they_are_recorded(functions: Any) -> None:
    own = {"levels": torch.ones(3)}
    with torch.no_grad():
        assert functions.ready(noted(functions, own), own, (X, X.clone().requires_grad_()), {}) == PLAIN


def test_nothing_is_known_while_a_graph_is_made(functions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = pending(functions)[0]
    read = noted(functions, own)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert functions.ready(read, own, (X, X), {}) == 0
    assert functions.foreseen(own, X) is None
    assert own["_pending"] is not None


def pending(functions: Any) -> tuple[dict[str, Any], Tensor, Tensor]:
    own: dict[str, Any] = {"levels": torch.ones(3), "_step_index": 2, "is_scale_input_called": False}
    x, made = torch.ones(2), torch.zeros(2)
    own["_pending"] = ref(x), x._version, 2, made, noted(functions, own)
    return own, x, made


def test_what_was_made_ahead_is_given_once(functions: Any) -> None:
    own, x, made = pending(functions)
    assert functions.foreseen(own, x) is made
    assert own["_pending"] is None
    assert own["is_scale_input_called"] is True
    assert "_foresees" not in own
    assert functions.foreseen(own, x) is None
    assert "_foresees" not in own


@pytest.mark.parametrize("change", ["another tensor", "none", "a write", "a step", "levels", "a derivative"])
def test_what_was_made_ahead_of_a_change_is_dropped(change: str, functions: Any) -> None:
    own, x, _ = pending(functions)
    given: Any = x
    if change == "another tensor":
        given = x.clone()
    elif change == "none":
        given = None
    elif change == "a write":
        x.add_(1)
    elif change == "a step":
        own["_step_index"] = 3
    elif change == "levels":
        own["levels"].add_(1)
    else:
        x.requires_grad_()
    assert functions.foreseen(own, given) is None
    assert own["_pending"] is None
    assert own["_foresees"] is False
    assert own["is_scale_input_called"] is False


def test_a_place_is_known_by_its_address(functions: Any) -> None:
    row = torch.arange(10)[::3]
    for place, element in enumerate(row):
        assert functions.place_in(row, element) == place
    others: list[Any] = [row[1].clone(), row[1:2], torch.arange(10)[1], row[0].float(), 3, row[0].to("meta")]
    assert all(functions.place_in(row, x) is None for x in others)
    between = torch.arange(10)
    assert functions.place_in(between[::3], between[4]) is None
    assert functions.place_in(between[2:5], between[1]) is None
    assert functions.place_in(between[2:5], between[5]) is None
    assert torch.vmap(lambda x: x + (functions.place_in(row, x) is not None))(row).equal(row)


class Output(OrderedDict[str, Any]):
    def __setitem__(self, name: str, value: Any) -> None:
        raise AssertionError("the dictionary's own")


def test_an_output_has_items_and_attributes(functions: Any) -> None:
    made = functions.output(Output, "first", X, "second", None)
    assert type(made) is Output
    assert list(made.items()) == [("first", X), ("second", None)]
    assert made.first is X
    assert vars(made) == dict(made)
