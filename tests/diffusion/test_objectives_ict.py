"""The iCT loss against its formula in plain float64 and on Gaussian data, where the flow is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DataParallel

from bicm_diffusion.keys import DROPOUT
from bicm_diffusion.objectives import ict_loss
from bicm_kernels import fold_in, normal
from tests.support.plain_bct import SHAPE, broadcast, distance, gradients, network, problem
from tests.support.plain_objectives import OneTime, S, exact_flow, gaussian_expectation, nn, preconditioned


def plain_loss(model: nn.Module, x: Tensor, levels: Any, kind: str, *, seed: int, step: int, c: float) -> Tensor:
    low, high = levels[:2]
    z = normal(x.shape, seed=seed, step=step, dtype=x.dtype)
    key = int(fold_in(fold_in(fold_in(seed, DROPOUT), step), 0))
    below, above = (preconditioned(model, x + broadcast(t) * z, t, kind, dropout=key) for t in (low, high))
    return (distance(above, below.detach(), c) / (high - low)).mean()


@pytest.mark.parametrize("kind", ["bcm", "cm"])
@pytest.mark.parametrize("c", [None, 0.3])
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_loss_and_gradients_are_the_formulas(kind: str, c: float | None, gradient: str) -> None:
    inner, (x, levels) = network(dropout=0.4), problem()
    model = inner if kind == "bcm" else OneTime(inner)
    loss = ict_loss(model, x, levels, seed=5, step=3, parameterization=kind, c=c, gradient=gradient)
    expected = plain_loss(model, x, levels, kind, seed=5, step=3, c=0.00054 * 12**0.5 if c is None else c)
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=0)
    assert loss.terms.keys() == {"consistency"} and torch.equal(loss.terms["consistency"], loss.total)
    theirs = gradients(expected, model)
    torch.testing.assert_close(gradients(loss.total, model), theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())


def test_two_evaluations_share_one_dropout_mask() -> None:
    model, (x, levels) = network(dropout=0.5), problem()
    before = torch.get_rng_state()
    ict_loss(model, x, levels, seed=5, step=3)
    ict_loss(model, x, levels, seed=5, step=4)
    assert torch.equal(torch.get_rng_state(), before)
    first, second, *later = model.masks
    assert 0.2 < first.double().mean() < 0.8 and len(later) == 2
    assert torch.equal(first, second) and not torch.equal(first, later[0])


@pytest.mark.parametrize("kind", ["bcm", "cm"])
def test_gaussian_data_has_the_closed_form(kind: str) -> None:
    """Samples of one element: the mean of |r| is known, and so is its error, within four of which it lies."""
    count, (low, high) = 400_000, (0.4, 0.9)
    x = S * normal((count, 1), seed=11, dtype=torch.float64)
    levels = [torch.full((count,), t, dtype=torch.float64) for t in (low, high)]
    loss = ict_loss(exact_flow(kind), x, levels, seed=5, step=3, parameterization=kind, c=0.0)
    expected = gaussian_expectation(low, high) / (high - low)
    error = expected * math.sqrt((math.pi / 2 - 1) / count)
    assert abs(loss.total.item() - expected) < 4 * error


def test_a_batch_may_be_split_over_machines() -> None:
    model, (x, levels) = network(), problem()
    whole = ict_loss(model, x, levels, seed=5, step=3).total
    parts = [
        ict_loss(model, x[k : k + 3], [t[k : k + 3] for t in levels], seed=5, step=3, sample_id=k).total for k in (0, 3)
    ]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2, rtol=1e-12, atol=0)


def test_wrong_calls() -> None:
    x, levels = problem()
    with pytest.raises(ValueError, match="parameterization: expected one of bcm, cm, got 'edm'"):
        ict_loss(network(), x, levels, seed=0, step=0, parameterization="edm")
    with pytest.raises(TypeError, match=r"network: expected .* got DataParallel"):
        ict_loss(DataParallel(network()), x, levels, seed=0, step=0)
    with pytest.raises(TypeError, match="step"):
        ict_loss(network(), x, levels, seed=0)
    assert x.shape == SHAPE


@pytest.mark.slow
def test_steps_are_one_graph() -> None:
    inner, (x, levels) = network(dropout=0.4), problem()

    class Plain(nn.Module):
        """The same without its list of masks, which grows."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.dropout = inner.first, inner.second, inner.dropout

        def forward(self, scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
            h = self.first(torch.cat([scaled.flatten(1), torch.stack([t, u], dim=1)], dim=1)).tanh()
            return self.second(self.dropout(h)).reshape(scaled.shape)

    model = Plain()

    def step_of(step: int) -> Tensor:
        return ict_loss(model, x, levels, seed=5, step=step).total

    fast = torch.compile(step_of, fullgraph=True, backend="aot_eager")
    for step in (1, 2, 3):
        actual, expected = (f(step) for f in (fast, step_of))
        assert torch.equal(actual, expected)
        assert torch.equal(gradients(actual, model), gradients(expected, model))
