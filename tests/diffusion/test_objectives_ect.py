"""ECT: its times, and its loss against the formula in plain float64, with rows whose goal is the sample itself."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from bicm_diffusion.keys import DROPOUT
from bicm_diffusion.objectives import draw_ect_times, ect_loss, ect_partner
from bicm_kernels import fold_in, normal
from tests.support.plain_bct import SHAPE, broadcast, distance, gradients, network
from tests.support.plain_objectives import OneTime, S, exact_flow, gaussian_expectation, preconditioned


def times() -> tuple[Tensor, Tensor]:
    """The first three of six rows have r = 0, as many rows have at stage 0."""
    t = torch.tensor([0.01, 0.3, 1.0, 3.0, 9.0, 70.0], dtype=torch.float64)
    return t, ect_partner(t, stage=0)


def samples(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def test_partners_are_the_formulas() -> None:
    """At stage 0 with q = 2: r = t(1 - (1 + 8/(1 + e^t))/2), 0 where that is negative."""
    t, r = times()
    for a, b in zip(t.tolist(), r.tolist(), strict=True):
        assert b == pytest.approx(max(0.0, a * (1 - (1 + 8 / (1 + math.exp(a))) / 2)), rel=1e-12)
    assert (r == 0).tolist() == [True, True, True, False, False, False]
    nearer = [ect_partner(t, stage=stage) for stage in range(8)]
    assert all((a <= b).all() and (b < t).all() for a, b in pairwise(nearer))
    assert ect_partner(t, stage=0, q=256.0)[2].item() == pytest.approx(1 - (1 + 8 / (1 + math.e)) / 256, rel=1e-12)


def test_times_are_lognormal_and_keyed() -> None:
    count = 100_000
    t, r = draw_ect_times(count, stage=2, seed=3, step=4)
    logs = t.log()
    assert abs(logs.mean() + 1.1) < 4 * 2 / count**0.5 and abs(logs.std() - 2) < 4 * 2 / (2 * count) ** 0.5
    assert torch.equal(r, ect_partner(t, stage=2))
    part, _ = draw_ect_times(5, stage=2, seed=3, step=4, sample_id=10)
    assert torch.equal(part, t[10:15])
    latents = normal((count, 1), seed=3, step=4, dtype=torch.float64)[:, 0]
    assert abs(torch.corrcoef(torch.stack([latents, logs]))[0, 1]) < 0.02


def plain_loss(model: nn.Module, x: Tensor, kind: str, *, c: float, seed: int = 5, step: int = 3) -> Tensor:
    t, r = times()
    z = normal(x.shape, seed=seed, step=step, dtype=x.dtype)
    key = int(fold_in(fold_in(fold_in(seed, DROPOUT), step), 0))
    goal = x.clone()
    goal[r > 0] = preconditioned(model, x + broadcast(r) * z, r.clamp_min(1e-3), kind, dropout=key).detach()[r > 0]
    above = preconditioned(model, x + broadcast(t) * z, t, kind, dropout=key)
    return (distance(above, goal, c) / (t - r)).mean()


@pytest.mark.parametrize("kind", ["edm", "bcm", "cm"])
@pytest.mark.parametrize("c", [0.0, 0.3])
def test_loss_and_gradients_are_the_formulas(kind: str, c: float) -> None:
    inner, x = network(dropout=0.4), samples()
    model = inner if kind == "bcm" else OneTime(inner)
    loss = ect_loss(model, x, times(), seed=5, step=3, c=c, parameterization=kind)
    expected = plain_loss(model, x, kind, c=c)
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=0)
    theirs = gradients(expected, model)
    torch.testing.assert_close(gradients(loss.total, model), theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())


def test_a_network_never_sees_the_logarithm_of_zero() -> None:
    seen: list[Tensor] = []

    def record(scaled: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return scaled * t.half().log()[:, None, None]  # in half precision, too

    loss = ect_loss(record, samples(torch.float32), times(), seed=5, step=3)
    assert all((t > 0).all() for t in seen) and loss.total.isfinite()
    r = times()[1].float()
    assert torch.equal(seen[0][r > 0], r[r > 0])


@pytest.mark.parametrize("mu", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_half_precision_under_a_scaler_has_no_nan(dtype: torch.dtype, mu: float) -> None:
    model = OneTime(network(dtype=torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
        loss = ect_loss(model, samples(torch.float32), times(), mu=mu, seed=5, step=3)
    scaler.scale(loss.total).backward()
    assert loss.total.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_residual_of_zero_has_no_gradient() -> None:
    """x = 0, no noise to speak of and F = 0: f is the goal."""
    weight = torch.zeros((), requires_grad=True)
    t = torch.full((2,), 1e-30, dtype=torch.float64)
    loss = ect_loss(lambda x, t: x * 0 * weight, torch.zeros(2, 3), (t, torch.zeros_like(t)), seed=0, step=0)
    loss.total.backward()
    assert loss.total.isfinite() and weight.grad is not None and weight.grad == 0


def test_gaussian_data_has_the_closed_form() -> None:
    count, (low, high) = 400_000, (0.4, 0.9)
    x = S * normal((count, 1), seed=11, dtype=torch.float64)
    levels = [torch.full((count,), t, dtype=torch.float64) for t in (high, low)]
    loss = ect_loss(exact_flow("edm"), x, levels, seed=5, step=3)
    expected = gaussian_expectation(low, high) / (high - low)
    assert abs(loss.total.item() - expected) < 4 * expected * math.sqrt((math.pi / 2 - 1) / count)


def test_wrong_calls() -> None:
    with pytest.raises(ValueError, match="stage, q: expected stage >= 0 and q > 1, got -1 and 2"):
        draw_ect_times(2, stage=-1, seed=0, step=0)
    with pytest.raises(ValueError, match="got 0 and 1"):
        ect_partner(torch.ones(2), stage=0, q=1.0)
    with pytest.raises(TypeError, match="step"):
        ect_loss(network(), samples(), times(), seed=0)
