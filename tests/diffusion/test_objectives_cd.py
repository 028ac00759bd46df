"""CD: its loss against the formula in plain float64, and what a denoiser is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bicm_diffusion.keys import DROPOUT
from bicm_diffusion.objectives import cd_loss, ict_loss
from bicm_kernels import fold_in, normal
from tests.support.plain_bct import broadcast, distance, gradients, network, problem
from tests.support.plain_objectives import OneTime, preconditioned

KEY: dict[str, Any] = {"seed": 5, "step": 3}


class Teacher(nn.Module):
    """A denoiser with dropout, which it must share."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.seen = nn.Dropout(0.5), []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append((x, t))
        return self.dropout(x).tanh() / (1 + broadcast(t))


def plain_loss(model: nn.Module, x: Tensor, levels: Any, kind: str, c: float) -> Tensor:
    """GC eq. 4 and 5."""
    low, high = levels[:2]
    z = normal(x.shape, **KEY, dtype=x.dtype)
    key = int(fold_in(fold_in(fold_in(KEY["seed"], DROPOUT), KEY["step"]), 0))
    noisy = x + broadcast(high) * z
    torch.manual_seed(key)
    denoised = Teacher()(noisy, high)
    moved = noisy + broadcast(low - high) * (noisy - denoised) / broadcast(high)
    below = preconditioned(model, moved, low, kind, dropout=key).detach()
    above = preconditioned(model, noisy, high, kind, dropout=key)
    return (distance(above, below, c) / (high - low)).mean()


@pytest.mark.parametrize("kind", ["bcm", "cm"])
@pytest.mark.parametrize("c", [None, 0.3])
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_loss_and_gradients_are_the_formulas(kind: str, c: float | None, gradient: str) -> None:
    inner, (x, levels) = network(dropout=0.4), problem()
    model = inner if kind == "bcm" else OneTime(inner)
    loss = cd_loss(model, x, levels, denoiser=Teacher(), parameterization=kind, c=c, gradient=gradient, **KEY)
    expected = plain_loss(model, x, levels, kind, 0.00054 * 12**0.5 if c is None else c)
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=0)
    theirs = gradients(expected, model)
    torch.testing.assert_close(gradients(loss.total, model), theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())


def test_a_perfect_denoiser_of_one_sample_makes_it_ict() -> None:
    """D = x leads from x + t'z to x + tz."""
    model, (x, levels) = network(), problem()
    distilled = cd_loss(model, x, levels, denoiser=lambda noisy, t: x, **KEY).total
    torch.testing.assert_close(distilled, ict_loss(model, x, levels, **KEY).total, rtol=1e-9, atol=0)


def test_evaluations_share_one_dropout_mask_and_the_denoiser_sees_the_upper_level() -> None:
    model, (x, levels), teacher = network(dropout=0.5), problem(), Teacher()
    before = torch.get_rng_state()
    first = cd_loss(model, x, levels, denoiser=teacher, **KEY).total
    assert torch.equal(torch.get_rng_state(), before)
    below, above = model.masks
    assert torch.equal(below, above) and 0.2 < below.double().mean() < 0.8
    ((noisy, t),) = teacher.seen
    assert torch.equal(t, levels.high) and not first.isnan()
    torch.testing.assert_close(noisy, x + broadcast(t) * normal(x.shape, **KEY, dtype=x.dtype), rtol=1e-12, atol=1e-12)


def test_a_batch_may_be_split_over_machines() -> None:
    model, (x, levels), teacher = network(), problem(), Teacher().eval()
    whole = cd_loss(model, x, levels, denoiser=teacher, **KEY).total
    halves = [
        cd_loss(model, x[k : k + 3], [t[k : k + 3] for t in levels], denoiser=teacher, sample_id=k, **KEY).total
        for k in (0, 3)
    ]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2, rtol=1e-12, atol=0)


def test_wrong_calls() -> None:
    model, (x, levels) = network(), problem()
    with pytest.raises(TypeError, match=r"denoiser: expected a function or module, called as .* got 'D'"):
        cd_loss(model, x, levels, denoiser="D", **KEY)
    with pytest.raises(ValueError, match=r"denoiser: expected a tensor of shape .* got shape \(1, 3, 4\)"):
        cd_loss(model, x, levels, denoiser=lambda x, t: x[:1], **KEY)
    with pytest.raises(ValueError, match="parameterization: expected one of bcm, cm, got 'edm'"):
        cd_loss(model, x, levels, denoiser=lambda x, t: x, parameterization="edm", **KEY)
