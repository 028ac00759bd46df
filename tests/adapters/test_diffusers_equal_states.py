"""Loops of BDIA's schedulers through states that are equal: at fixed points, without samples, of a single step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from bicm_diffusion import RetraceWarning
from bicm_diffusion.adapters.diffusers import BDIADDIMScheduler, BDIAFlowMatchScheduler

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).mul(256).round() / 256  # on the grid

each_class = pytest.mark.parametrize("cls", [BDIADDIMScheduler, BDIAFlowMatchScheduler])
each_kind = pytest.mark.parametrize("exact", [True, False])


def loop(scheduler: Any, x: Tensor, steps: int = 4, weight: float = 0.0, **options: Any) -> Tensor:
    """A loop whose model returns its input, weighted; as a pipeline, it copies what it starts from."""
    scheduler.set_timesteps(steps, **options)
    x = x * 1.0
    for t in scheduler.timesteps:
        x = scheduler.step(weight * x, t, x).prev_sample
    return x


@each_kind
@each_class
def test_a_fixed_point_is_retraced(cls: Any, exact: bool) -> None:
    start = X if cls is BDIAFlowMatchScheduler else torch.zeros_like(X)  # DDIM scales everything else
    scheduler = cls(exact=exact)
    assert torch.equal(loop(scheduler, start), start)
    assert torch.equal(loop(scheduler, scheduler.turn_round()), start)
    # And where the pair's other state is passed as a tensor.
    there = loop(scheduler, start, inverse=True)
    scheduler.set_timesteps(4, last_sample=scheduler._reached)
    x = there * 1.0
    for t in scheduler.timesteps:
        x = scheduler.step(0.0 * x, t, x).prev_sample
    assert torch.equal(x, start)


@each_kind
def test_a_pair_at_a_fixed_point_forbids_no_other_loop(exact: bool) -> None:
    """As long as it lives, and as long as its inner state does."""
    scheduler = BDIAFlowMatchScheduler(exact=exact)
    loop(scheduler, X)
    z, previous = pair = scheduler.pair
    loop(BDIAFlowMatchScheduler(exact=exact), X)
    inner = scheduler.turn_round()
    del scheduler, pair
    loop(BDIAFlowMatchScheduler(exact=exact), X)
    assert torch.equal(z, previous)
    assert inner is not None and torch.equal(inner, X)


@each_kind
@each_class
def test_an_empty_batch_is_retraced(cls: Any, exact: bool) -> None:
    scheduler, empty = cls(exact=exact), X[:0]
    assert loop(scheduler, empty, weight=0.5).shape == empty.shape
    inner = scheduler.turn_round()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RetraceWarning)
        loop(cls(exact=exact), empty, weight=0.5)
        assert inner is not None and loop(scheduler, inner, weight=0.5).shape == empty.shape


@each_kind
@each_class
def test_the_start_of_a_single_step_may_begin_other_loops(cls: Any, exact: bool) -> None:
    """The inner state of its pair is where the trajectory began."""
    scheduler = cls(exact=exact)
    scheduler.set_timesteps(1)
    scheduler.step(0.5 * X, scheduler.timesteps[0], X)
    pair = scheduler.pair
    previous = pair.previous
    assert torch.equal(previous, X)
    for steps in (1, 4):
        loop(cls(exact=exact), X, steps, weight=0.5)
        other = cls(exact=exact)
        other.set_timesteps(steps)
        other.step(0.5 * X, other.timesteps[0], previous)


@each_kind
@each_class
def test_an_inner_state_is_refused_even_so(cls: Any, exact: bool) -> None:
    scheduler = cls(exact=exact)
    loop(scheduler, X, weight=0.5)
    inner = scheduler.turn_round()
    assert inner is not None
    with pytest.raises(ValueError, match="sample: got the inner state of a pair"):
        loop(cls(exact=exact), inner, weight=0.5)
    outer = scheduler._next.z
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="sample: expected the inner state of the pair, got the one that is its last"):
        scheduler.step(outer, scheduler.timesteps[0], outer)
