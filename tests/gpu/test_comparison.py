"""What the GPU's tests compare by and wait for, on the CPU: a wrong rule would first fail on a GPU."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.calls import CALLS, EVERY, op_of, opened
from tests.support.gpu_comparison import HALVES, SUMS, close

TINY = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_neighbours_are_close_and_nothing_further(dtype: torch.dtype) -> None:
    """All finite halves and the ones above them, subnormal numbers among them."""
    bits = torch.arange(torch.tensor(torch.inf, dtype=dtype).view(torch.int16).item() - 1, dtype=torch.int16)
    x, above = bits.view(dtype), (bits + 1).view(dtype)
    assert above[0].double() == TINY[dtype]
    close(above, x, 0.0)
    close(x, above, 0.0)
    for place in (0, 1, x.double().eq(HALVES[dtype][1]).nonzero().item(), x.eq(1.0).nonzero().item()):
        with pytest.raises(AssertionError, match="1 of 1 too far"):
            close(x[place + 2].reshape(1), x[place].reshape(1), 0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * (1 + 3e-6),
        lambda x: x.where(x < x.max(), torch.nan),
        lambda x: x.reshape(1, -1),
        lambda x: x.long(),
    ],
    ids=["values", "NaNs", "shapes", "integers"],
)
def test_what_is_not_close(wrong: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(0.5, 2.0, 7)
    close(x * (1 + 5e-7), x)
    with pytest.raises(AssertionError):
        close(wrong(x), x)


def test_sums_are_known() -> None:
    """What has a number for a sample or a batch adds up; full tensors come before."""
    found: dict[str, set[int]] = {}
    for name, k in EVERY:
        call = {key: x for key, x in CALLS[name][k].items() if key != "out"}
        results = opened(op_of(name)(**call))
        sums = [place for place, x in enumerate(results) if x.is_floating_point() and x.dim() < 2]
        if sums:
            found.setdefault(name, set()).add(sums[0])
    assert found == {name: {place} for name, place in SUMS.items()}


def test_inputs_are_made_before_waiting_is_an_error() -> None:
    """As a parameter the fixture would be on for the whole test, whose copies to the GPU wait."""
    trees = [ast.parse(path.read_text()) for path in Path(__file__).parent.glob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    takes = [f.name for f in functions for argument in f.args.args if argument.arg == "no_synchronisation"]
    assert {"no_synchronisation", "test_nothing_waits"} <= {f.name for f in functions}
    assert takes == []
