"""Training called wrongly says so under the names that its callers know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bicm_diffusion import (
    ConsistencySchedule,
    LevelTable,
    StatePair,
    bct_loss,
    draw_levels,
    karras_levels,
    save_pair,
    to_ve,
    to_vp,
    update_average,
    vp_schedule,
)

X, TABLE = torch.ones(2, 3), LevelTable(karras_levels(11))
LEVELS = draw_levels(TABLE, 2, seed=0, step=0)


@dataclass
class UNetOutput:
    sample: Tensor


class Network(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.answer = nn.Linear(3, 3), answer

    def forward(self, x: Tensor, t: Tensor, u: Tensor) -> Any:
        return self.answer(self.layer(x))


def loss(network: Any = None, x: Any = X, levels: Any = LEVELS, **options: Any) -> Any:
    network = Network(lambda z: z) if network is None else network
    return bct_loss(network, x, levels, **{"seed": 0, "step": 0, **options})


def test_right_calls_return() -> None:
    assert loss().total.isfinite() and loss(levels=tuple(LEVELS)).total.isfinite()
    assert loss(lambda z, t, u: z).total.isfinite()  # a function is a network too


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (UNetOutput, r"expected a tensor of shape \(2, 3\), got an? UNetOutput; return its \.sample"),
        (lambda z: (z,), r"got a tuple of 1 \(Tensor\); return its first element"),
        (lambda z: (z, z), r"got a tuple of 2 \(Tensor\); return its first element"),
        (lambda z: z.detach().numpy(), r"got a numpy.ndarray of shape \(2, 3\); torch.from_numpy makes"),
        (lambda z: {"sample": z}, "got a dict"),
        (lambda z: None, "got None"),
        (lambda z: z[:, :2], r"expected a tensor of shape \(2, 3\), as its input has, got shape \(2, 2\)"),
        (lambda z: z[:1], r"got shape \(1, 3\)"),
        (lambda z: z.long(), "expected float16, .* got torch.int64"),
    ],
)
def test_what_a_network_must_return(answer: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^network: .*{message}") as caught:
        loss(Network(answer))
    assert "tensor([" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: loss("unet"), TypeError, "network: expected a function or module, called as network"),
        (lambda: loss(x=X.numpy()), TypeError, r"x: expected a tensor \(B, …\), got a numpy.ndarray"),
        (lambda: loss(x=X.long()), TypeError, "x: expected float16, .* got torch.int64"),
        (lambda: loss(x=torch.tensor(1.0)), ValueError, "x: expected a batch dimension"),
        (lambda: loss(x=StatePair(X, X)), TypeError, "x: expected a tensor .* got a StatePair; its"),
        (lambda: loss(levels=11), TypeError, r"levels: expected Levels, as draw_levels returns them, got 11 \(int\)"),
        (lambda: loss(levels=TABLE), TypeError, "levels: expected Levels, .* got a LevelTable"),
        (lambda: loss(levels=TABLE.levels), TypeError, "levels: expected Levels, .* got a torch.float64 tensor"),
        (lambda: loss(levels=(0.1, 0.2, 0.3)), TypeError, r"levels: expected Levels, .* got a tuple of 3 \(float\)"),
        (
            lambda: loss(levels=draw_levels(TABLE, 3, seed=0, step=0)),
            ValueError,
            r"levels: expected low of shape \(2,\), as x has, got \(3,\)",
        ),
        (lambda: loss(extra_args=["label"]), TypeError, "extra_args: expected a mapping from names to values, got a"),
        (lambda: draw_levels(11, 2, seed=0, step=0), TypeError, r"table: expected a LevelTable, got 11 \(int\); Level"),
        (lambda: draw_levels(TABLE.levels, 2, seed=0, step=0), TypeError, "table: expected a LevelTable, got a torch"),
        (lambda: draw_levels(TABLE, X, seed=0, step=0), TypeError, "batch: expected an integer, got a torch.float32"),
        (lambda: draw_levels(TABLE, 2.0, seed=0, step=0), TypeError, "batch: expected an integer, got 2.0"),
        (lambda: LevelTable(11), TypeError, r"levels: expected a tensor \(N,\), as karras_levels\(N\) makes, got 11"),
        (lambda: LevelTable([0.1, 0.2]), TypeError, "levels: expected a tensor .* got a list of 2"),
        (lambda: LevelTable(karras_levels(5).flip(0)), ValueError, "levels: expected increasing levels"),
        (lambda: LevelTable(karras_levels(5)[None]), ValueError, r"levels: expected \(N,\) .* got shape \(1, 5\)"),
        (lambda: ConsistencySchedule(80.0), TypeError, r"levels: expected a sequence of noise levels, got 80.0"),
        (lambda: ConsistencySchedule("cifar10-zigzag"), TypeError, "levels: expected a sequence .* 'cifar10-zigzag'"),
        (lambda: ConsistencySchedule(vp_schedule(2)), TypeError, "levels: expected a sequence .* got a Schedule"),
        (lambda: ConsistencySchedule((80.0,), (0.2, 0.8)), TypeError, r"zigzags: expected pairs \(ε, t\), got 0.2"),
        (lambda: ConsistencySchedule((80.0,), 0.2), TypeError, r"zigzags: expected a sequence of pairs .* got 0.2"),
        (
            lambda: ConsistencySchedule((80.0,), ((0.2,),)),
            ValueError,
            r"zigzags: expected pairs .* got \(0.2,\)",
        ),
        (lambda: ConsistencySchedule((80.0,), sigma_data="1"), TypeError, "sigma_data: expected a number, got '1'"),
        (lambda: update_average({}, nn.Linear(1, 1), decay=0.9), TypeError, "average: expected a module, got a dict"),
        (lambda: update_average(nn.Linear(1, 1), X, decay=0.9), TypeError, "network: expected a module, got a torch"),
        (lambda: update_average(nn.Linear(1, 1), nn.Linear(1, 1), decay="a"), TypeError, "decay: expected a number"),
        (lambda: to_ve(50), TypeError, r"schedule: expected a Schedule, got 50 \(int\)"),
        (lambda: to_vp("vp"), TypeError, r"schedule: expected a Schedule, got 'vp' \(str\)"),
        (
            lambda: vp_schedule(torch.zeros(5)),
            TypeError,
            r"steps: expected an integer, got a torch.float32",
        ),
        (lambda: save_pair(X, "pair.safetensors"), TypeError, "pair: expected a pair, got a torch.float32 tensor"),
    ],
)
def test_what_is_wrong_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}") as caught:
        call()
    assert "tensor([" not in str(caught.value)


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array], ids=["list", "tensor", "array"])
def test_a_consistency_schedule_is_made_of_any_sequence(kind: Any) -> None:
    made = ConsistencySchedule(kind([80.0, 1.5]), kind([[0.25, 0.5]]))
    assert made == ConsistencySchedule((80.0, 1.5), ((0.25, 0.5),)) and hash(made)
