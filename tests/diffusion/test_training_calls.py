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
from bicm_diffusion.objectives import draw_ect_times, ect_loss, ict_loss

X, TABLE = torch.ones(2, 3), LevelTable(karras_levels(11))
LEVELS = draw_levels(TABLE, 2, seed=0, step=0)
TIMES = draw_ect_times(2, stage=0, seed=0, step=0)


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


def ict(network: Any = None, levels: Any = LEVELS, x: Any = X, **options: Any) -> Any:
    network = Network(lambda z: z) if network is None else network
    return ict_loss(network, x, levels, **{"seed": 0, "step": 0, **options})


def ect(network: Any = None, times: Any = TIMES, x: Any = X, **options: Any) -> Any:
    network = Network(lambda z: z) if network is None else network
    return ect_loss(network, x, times, **{"seed": 0, "step": 0, "parameterization": "bcm", **options})


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
        (lambda z: {"sample": z}, r"got a dict; return its \['sample'\]"),
        (lambda z: None, "got None"),
        (lambda z: z[:, :2], r"expected a tensor of shape \(2, 3\), as its input has, got shape \(2, 2\)"),
        (lambda z: z[:1], r"got shape \(1, 3\)"),
        (lambda z: z.long(), "expected float16, .* got torch.int64"),
    ],
)
def test_what_a_network_must_return(answer: Callable[[Tensor], Any], message: str) -> None:
    for objective in (loss, ict, ect):
        with pytest.raises((TypeError, ValueError), match=f"^network: .*{message}") as caught:
            objective(Network(answer))
        assert "tensor([" not in str(caught.value)


def one_time(x: Tensor, t: Tensor) -> Tensor:
    return x


def two_times(x: Tensor, t: Tensor, u: Tensor) -> Tensor:
    return x


def labelled(x: Tensor, t: Tensor, u: Tensor, y: Tensor) -> Tensor:
    return x


class OneTime(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: loss(one_time),
            r"as network\(x, t, u\), but .*\(x: .*; f\(x, t, u\) goes .* lambda x, t, u: network",
        ),
        (lambda: loss(OneTime()), r"as network\(x, t, u\), but .*; f\(x, t, u\) goes from t to u"),
        (lambda: ict(one_time), r"as network\(x, t, u\), but .* ict_loss with parameterization='cm'"),
        (
            lambda: ict(two_times, parameterization="cm"),
            r"as network\(x, t\), but .* argument: 'u'\); pass its other arguments by extra_args=",
        ),
        (lambda: ect(two_times, parameterization="edm"), r"as network\(x, t\), but .* argument: 'u'"),
        (lambda: loss(labelled), r"as network\(x, t, u\), but .*missing a required argument: 'y'"),
        (
            lambda: loss(two_times, extra_args={"y": 3}),
            r"as network\(x, t, u, y=…\), but .*unexpected keyword argument 'y'",
        ),
    ],
)
def test_a_network_of_other_arguments_is_told_how_it_is_called(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=rf"network: called {message}"):
        call()


def test_a_type_error_inside_a_network_is_its_own() -> None:
    def broken(x: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return x + "one"

    with pytest.raises(TypeError, match="unsupported operand"):
        loss(broken)


@pytest.mark.parametrize("objective", [lambda **o: loss(**o), lambda **o: ict(two_times, **o)])
def test_levels_in_another_order_are_refused(objective: Callable[..., Any]) -> None:
    low, high, partner = LEVELS
    with pytest.raises(ValueError, match="levels: expected low < high for every sample"):
        objective(levels=(high, low, partner))
    with pytest.raises(ValueError, match="levels: expected partner other than low"):
        loss(levels=(low, high, low))


@pytest.mark.parametrize("objective", [lambda **o: loss(**o), lambda **o: ict(two_times, **o)])
def test_levels_begin_at_t_min(objective: Callable[..., Any]) -> None:
    higher = draw_levels(LevelTable(karras_levels(11, t_min=0.01)), 2, seed=0, step=0)
    with pytest.warns(UserWarning, match=r"levels: expected them to begin at t_min = 0\.002, got 0\.01; give the loss"):
        objective(levels=higher)
    with pytest.warns(UserWarning, match=r"levels: expected them to begin at t_min = 0\.01, got 0\.002; give"):
        objective(t_min=0.01)
    by_hand = tuple(torch.tensor(pair, dtype=torch.float64) for pair in ([0.001, 0.5], [0.3, 0.8], [0.4, 0.9]))
    with pytest.warns(UserWarning, match=r"levels: expected them to begin at t_min = 0\.002, got 0\.001; give"):
        objective(levels=by_hand)
    assert objective(levels=higher, t_min=0.01).total.isfinite()
    assert objective(levels=by_hand, t_min=0.001).total.isfinite()
    assert objective(levels=tuple(level.float() for level in LEVELS)).total.isfinite()


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
        (lambda: ict(levels=11), TypeError, r"levels: expected t_n and t_\{n\+1\}, as draw_levels gives them, got 11"),
        (lambda: ict(levels=TABLE), TypeError, "levels: expected t_n .* got a LevelTable"),
        (lambda: ict(levels=(X, X)), ValueError, r"levels: expected low of shape \(2,\), as x has, got \(2, 3\)"),
        (lambda: ict("unet"), TypeError, "network: expected a function or module, called as network"),
        (lambda: ict(x=X.numpy()), TypeError, r"x: expected a tensor \(B, …\), got a numpy.ndarray"),
        (
            lambda: ect(times=TIMES[0]),
            TypeError,
            r"times: expected \(t, r\), as draw_ect_times returns them, got a torch",
        ),
        (lambda: ect(x=X.long()), TypeError, "x: expected float16, .* got torch.int64"),
        (lambda: ect(3), TypeError, "network: expected a function or module, called as network"),
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
