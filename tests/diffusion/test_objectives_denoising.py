"""EDM's denoising loss against its formula in plain float64, and where it is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bicm_diffusion.keys import DROPOUT
from bicm_diffusion.objectives import denoising_loss, draw_denoising_levels
from bicm_kernels import fold_in, normal
from tests.support.plain_bct import SHAPE, broadcast, gradients, network
from tests.support.plain_objectives import OneTime, preconditioned


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_loss_and_gradients_are_the_formulas(dropout: float) -> None:
    model = OneTime(network(dropout=dropout))
    x = normal(SHAPE, seed=2, dtype=torch.float64)
    t = draw_denoising_levels(SHAPE[0], seed=3, step=4)
    loss = denoising_loss(model, x, t, seed=5, step=3)
    noisy = x + broadcast(t) * normal(SHAPE, seed=5, step=3, dtype=torch.float64)
    key = int(fold_in(fold_in(fold_in(5, DROPOUT), 3), 0))
    weight = broadcast((t * t + 0.25) / (0.5 * t) ** 2)
    expected = (weight * (preconditioned(model, noisy, t, "edm", dropout=key) - x).square()).mean()
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=0)
    theirs = gradients(expected, model)
    torch.testing.assert_close(gradients(loss.total, model), theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())


def test_the_best_denoiser_of_gaussian_data_leaves_unit_variance() -> None:
    """Of N(0, σ_d²) it is c_skip·x alone, F = 0, whatever the level: the mean of n squares is 1 ± √(2/n)."""
    count = 200_000
    x = 0.5 * normal((count, 1), seed=7, dtype=torch.float64)
    for t in (0.0, 0.3, 80.0):
        levels = torch.full((count,), t, dtype=torch.float64)
        loss = denoising_loss(lambda x, t: 0 * x, x, levels, seed=5, step=1).total
        assert abs(loss.item() - 1) < 4 * math.sqrt(2 / count)


def test_levels_are_lognormal_and_keyed() -> None:
    count = 100_000
    logs = draw_denoising_levels(count, seed=3, step=4).log()
    assert abs(logs.mean() + 1.2) < 4 * 1.2 / count**0.5 and abs(logs.std() - 1.2) < 4 * 1.2 / (2 * count) ** 0.5
    assert torch.equal(draw_denoising_levels(5, seed=3, step=4, sample_id=10).log(), logs[10:15])


def test_half_outputs_are_squared_in_single_precision() -> None:
    def large(x: Tensor, t: Tensor) -> Tensor:
        return (0 * x + 3e4).half()

    assert denoising_loss(large, torch.zeros(2, 3), torch.ones(2), seed=0, step=0).total == pytest.approx(9e8, rel=1e-3)
