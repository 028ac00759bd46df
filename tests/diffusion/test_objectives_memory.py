"""The loss part of a step holds at most half of the memory that eager code of the same loss holds."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_objectives import CASES
from bicm_diffusion import ect_loss, gc_loss, ict_loss
from tests.support.held_memory import most, state_bytes

SHAPE = (8, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_loss_holds_at_most_half_of_eager_code(case: Any, dtype: torch.dtype, record_property: Any) -> None:
    inputs = case.inputs(SHAPE, dtype)
    ours, theirs = (most(lambda f=f: case.measured(f)(*inputs), *inputs) for f in (case.ours, case.eager))
    record_property("ours, eager, in samples", (ours / state_bytes(inputs[0]), theirs / state_bytes(inputs[0])))
    assert state_bytes(inputs[0]) < ours <= theirs / 2


def test_what_one_evaluation_needed_is_freed_before_the_next() -> None:
    x, low, high = torch.ones(SHAPE), torch.full((8,), 0.5), torch.full((8,), 1.0)
    seen: list[Any] = []

    def network(scaled: Tensor, *times: Tensor) -> Tensor:
        living = [ref for ref in seen if ref() is not None]
        assert not living
        seen.append(weakref.ref(scaled))
        return torch.zeros_like(scaled)

    more: dict[str, Any] = {"seed": 0, "step": 0}
    ict_loss(network, x, (low, high), t_min=0.5, **more)
    seen.clear()
    gc_loss(network, x, (low, high), t_min=0.5, **more)
    seen.clear()
    ect_loss(network, x, (high, low), mu=0.5, **more)
    assert len(seen) == 3
