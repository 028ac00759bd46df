"""The BCT loss against its formula written plainly in float64: values, gradients, what is shared and what is frozen."""

from __future__ import annotations

from collections.abc import Callable
from operator import add
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bicm_diffusion import Levels, bct_loss, update_average
from tests.support.plain_bct import (
    T_MIN,
    broadcast,
    gradients,
    network,
    plain_loss,
    problem,
)

TERMS = ("consistency", "trajectory")
Distance = Callable[[Tensor, Tensor], Tensor]


@pytest.mark.parametrize("target", ["shared", "direct"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("c", [None, 0.3])
def test_terms_and_gradients_are_the_formulas(target: str, dropout: float, c: float | None) -> None:
    model, (x, levels) = network(dropout=dropout), problem()
    loss = bct_loss(model, x, levels, seed=5, step=3, c=c, target=target)
    constant = 0.00054 * 12**0.5 if c is None else c
    expected = plain_loss(model, x, levels, seed=5, step=3, c=constant, direct=target == "direct")
    for term in TERMS:
        actual = getattr(loss, term)
        torch.testing.assert_close(actual, expected[term], rtol=1e-10, atol=0)
        theirs = gradients(expected[term], model)
        torch.testing.assert_close(gradients(actual, model), theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())
    torch.testing.assert_close(loss.total, expected["consistency"] + expected["trajectory"], rtol=1e-10, atol=0)


def test_the_variant_of_the_released_imagenet_weights() -> None:
    """A leap from t_{n+1}, which may be t_n' itself, and distances over √d: 12 elements."""
    model, (x, levels) = network(dropout=0.4), problem()
    levels = Levels(levels.low, levels.high, torch.cat([levels.high[:1], levels.partner[1:]]))
    loss = bct_loss(model, x, levels, seed=5, step=3, c=0.06, leap="high", per_root=True)
    expected = plain_loss(model, x, levels, seed=5, step=3, c=0.06, from_above=True)
    for term in TERMS:
        actual, wanted = getattr(loss, term), expected[term] / 12**0.5
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=0)
        theirs = gradients(wanted, model)
        torch.testing.assert_close(gradients(actual, model), theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())
    with pytest.raises(ValueError, match="leap: expected one of low, high, got 'middle'"):
        bct_loss(model, x, levels, seed=5, step=3, leap="middle")


def test_the_outer_network_is_frozen_and_passes_gradients_to_its_input() -> None:
    model, (x, levels) = network(), problem()
    ours = gradients(bct_loss(model, x, levels, seed=5, step=0, c=0.1).trajectory, model)
    thawed = gradients(plain_loss(model, x, levels, seed=5, step=0, c=0.1, thaw=True)["trajectory"], model)
    assert ours.abs().max() > 1e-3  # the only way to a parameter is through the outer network's input
    assert (ours - thawed).abs().max() > 1e-3 * ours.abs().max()


def test_in_float32_the_error_is_at_most_twice_eager_codes() -> None:
    """Over thirty problems, because one difference of two numbers may be small by luck."""
    exact_model, model = network(), network(dtype=torch.float32)
    errors = dict.fromkeys(TERMS, (0.0, 0.0))
    for key in range(30):
        x, levels = problem(torch.float32, key)
        exact = plain_loss(exact_model, x.double(), levels, seed=key, step=3, c=0.1)
        eager = plain_loss(model, x, levels, seed=key, step=3, c=0.1)
        ours = bct_loss(model, x, levels, seed=key, step=3, c=0.1)
        for term, before in errors.items():
            value = exact[term].item()
            found = (abs(loss.item() - value) / value for loss in (getattr(ours, term), eager[term]))
            errors[term] = tuple(map(add, before, found))  # type: ignore[assignment]
    assert all(0 < actual <= 2 * theirs for actual, theirs in errors.values())


def with_partners_at_the_end(key: int, kept: int) -> tuple[Tensor, Levels]:
    """A problem in which t_min is the partner of all but the first rows: both sides are one number there."""
    x, (low, high, partner) = problem(torch.float32, key)
    at_end = torch.arange(len(x)) >= kept
    low, high = torch.where(at_end, low.clamp_min(0.01), low), torch.where(at_end, high.clamp_min(0.02), high)
    elsewhere = torch.where(partner == T_MIN, 1.0, partner)
    return x, Levels(low, high, torch.where(at_end, T_MIN, elsewhere))


@pytest.mark.parametrize("per_root", [False, True])
@pytest.mark.parametrize("c", [0.0, 1e-6, None])
def test_where_the_partner_is_the_end_no_rounding_is_differentiated(c: float | None, per_root: bool) -> None:
    exact_model, model, kept = network(), network(dtype=torch.float32), 3
    constant = 0.00054 * 12**0.5 if c is None else c
    errors = [0.0, 0.0]
    for key in range(20):
        x, levels = with_partners_at_the_end(key, kept)
        given: dict[str, Any] = {"seed": key, "step": 3}
        # Eager code has the other rows' term and gradient of exactly 0; at c = 0 its derivative is not defined there.
        rows, share = Levels(*(level[:kept] for level in levels)), kept / len(x) / (12**0.5 if per_root else 1.0)
        exact, eager = (
            share * gradients(plain_loss(of, part, rows, **given, c=constant)["trajectory"], of).double()
            for of, part in ((exact_model, x[:kept].double()), (model, x[:kept]))
        )
        ours = gradients(bct_loss(model, x, levels, **given, c=c, per_root=per_root).trajectory, model).double()
        for k, found in enumerate((ours, eager)):
            errors[k] += ((found - exact).norm() / exact.norm()).item()
    assert 0 < errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_leap_to_the_end_has_neither_value_nor_gradient(dtype: torch.dtype) -> None:
    model, (x, _) = network(dtype=dtype), problem(dtype)
    _, levels = with_partners_at_the_end(7, 0)
    given: dict[str, Any] = {"seed": 5, "step": 3}
    for c in (0.0, None):
        loss = bct_loss(model, x, levels, **given, c=c).trajectory
        assert loss == 0 and not gradients(loss, model).any()
    for other in ({"leap": "high"}, {"target": "direct"}):
        loss = bct_loss(model, x, levels, **given, **other).trajectory
        assert loss > 0 and gradients(loss, model).any()


class Losses(TorchDispatchMode):
    """The ops of a loss, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op._schema.name.removeprefix("bicm_kernels::")
        self.names += [name] if name.startswith(("consistency_loss", "pseudo_huber")) else []
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_to_the_gradient_have_the_same_bits(dtype: torch.dtype) -> None:
    found = {}
    for way in ("forward", "backward"):
        (x, levels), model = problem(dtype), network(dtype=dtype)
        with Losses() as losses:
            total = bct_loss(model, x, levels, seed=5, step=3, gradient=way).total
            found[way] = total.detach(), gradients(total, model)
        assert {name.endswith("_with_gradients") for name in losses.names} == {way == "forward"}
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))


def test_all_evaluations_of_a_step_share_one_dropout_mask() -> None:
    model, (x, levels) = network(dropout=0.5), problem()
    bct_loss(model, x, levels, seed=5, step=3)
    first, *others = model.masks
    assert len(others) == 3 and 0.2 < first.double().mean() < 0.8
    assert all(torch.equal(first, other) for other in others)
    bct_loss(model, x, levels, seed=5, step=4)
    assert not torch.equal(first, model.masks[4])


def test_the_callers_random_state_is_left_alone() -> None:
    x, levels = problem()
    before = torch.get_rng_state()
    bct_loss(network(dropout=0.5), x, levels, seed=5, step=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_keyed_by_seed_and_step() -> None:
    model, (x, levels) = network(), problem()
    values = [
        bct_loss(model, x, levels, seed=seed, step=step).total.item() for seed, step in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert values[0] == values[1] and len(set(values)) == 3


def test_a_batch_may_be_split_over_machines() -> None:
    model, (x, levels) = network(), problem()
    whole = bct_loss(model, x, levels, seed=5, step=3)
    parts = [
        bct_loss(model, x[k : k + 3], Levels(*(t[k : k + 3] for t in levels)), seed=5, step=3, sample_id=k)
        for k in (0, 3)
    ]
    mean = (parts[0].total + parts[1].total) / 2
    torch.testing.assert_close(whole.total, mean, rtol=1e-12, atol=0)


def test_extra_arguments_reach_every_evaluation() -> None:
    model, (x, levels) = network(), problem()
    plain, shifted = (
        bct_loss(model, x, levels, seed=5, step=0, extra_args=extra_args) for extra_args in (None, {"shift": 0.5})
    )
    for term in TERMS:
        assert abs(getattr(plain, term).item() - getattr(shifted, term).item()) > 1e-3


def test_sigma_data_and_t_min_are_passed_on() -> None:
    model, (x, levels) = network(), problem()
    values = [
        bct_loss(model, x, tuple(levels), seed=5, step=0, **options)
        for options in ({}, {"sigma_data": 0.8}, {"t_min": 0.001}, {"sigma_data": 0.5, "t_min": 0.002})
    ]
    for term in TERMS:
        plain, wide, high, same = (getattr(value, term).item() for value in values)
        assert plain == same and plain not in (wide, high)


def test_another_target_is_refused() -> None:
    x, levels = problem()
    with pytest.raises(ValueError, match="target: expected one of shared, direct, got 'both'"):
        bct_loss(network(), x, levels, seed=0, step=0, target="both")


def test_the_exact_flow_has_no_trajectory_term() -> None:
    class Exact(nn.Module):
        """F of the exact two-time flow of N(0, 1/4): with sigma_data = 1/2 it is linear."""

        def forward(self, scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
            t, u = broadcast(t), broadcast(u)
            s = 0.25 + t * t
            ratio = ((0.25 + u * u) / s).sqrt() - (0.25 + t * u) / s
            # From t_min to t_min nothing of F is taken, and it is 0/0 here.
            return (ratio * s.sqrt() / (0.5 * (t - u)) * scaled * s.sqrt()).nan_to_num()

    x, levels = problem()
    loss = bct_loss(Exact(), 0.5 * x, levels, seed=5, step=0)
    assert loss.trajectory.item() < 1e-12 < loss.consistency.item()


def test_average_follows_the_formula_and_warms_up() -> None:
    model, average = network(), network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in average.parameters()]
    for step, decay in ((0, 0.1), (8, 0.5), (10**9, 0.9)):
        expected = [decay * old + (1 - decay) * new for old, new in zip(before, model.parameters(), strict=True)]
        update_average(average, model, step=step, decay=0.9)
        before = [p.clone() for p in average.parameters()]
        for actual, wanted in zip(average.parameters(), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
