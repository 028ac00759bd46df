"""GC: its loss against the formula in plain float64, its mask, who is asked about which rows, and two Diracs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bicm_diffusion.keys import DROPOUT
from bicm_diffusion.objectives import cd_loss, draw_ect_times, ect_loss, gc_loss, ict_loss
from bicm_diffusion.objectives.diagnostics import velocity_variance
from bicm_diffusion.objectives.gc import generated
from bicm_kernels import fold_in, normal
from tests.support.plain_bct import broadcast, distance, gradients, network, problem
from tests.support.plain_objectives import OneTime, preconditioned

KEY: dict[str, Any] = {"seed": 5, "step": 3}
MIXED = generated(6, 0.5, **KEY)


def other_network() -> nn.Module:
    torch.manual_seed(9)
    model = network()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def plain_loss(model: nn.Module, predictor: nn.Module, x: Tensor, levels: Any, kind: str, mask: Tensor) -> Tensor:
    """GC eq. 21 in float64, the mask given; c is BCM's."""
    low, high = levels[:2]
    z = normal(x.shape, **KEY, dtype=x.dtype)
    key = int(fold_in(fold_in(fold_in(KEY["seed"], DROPOUT), KEY["step"]), 0))
    x_hat = preconditioned(predictor, x + broadcast(low) * z, low, kind, dropout=key).detach()
    clean = torch.where(mask[:, None, None], x_hat, x)
    below, above = (preconditioned(model, clean + broadcast(t) * z, t, kind, dropout=key) for t in (low, high))
    return (distance(above, below.detach(), 0.00054 * 12**0.5) / (high - low)).mean()


@pytest.mark.parametrize("kind", ["bcm", "cm"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0])
def test_loss_and_gradients_are_the_formulas(kind: str, frozen: bool, mu: float) -> None:
    inner, (x, levels) = network(), problem()
    model = inner if kind == "bcm" else OneTime(inner)
    other = (other_network() if kind == "bcm" else OneTime(other_network())) if frozen else None
    assert 0 < MIXED.sum() < 6
    mask = {0.0: torch.zeros(6, dtype=torch.bool), 0.5: MIXED, 1.0: torch.ones(6, dtype=torch.bool)}[mu]
    loss = gc_loss(model, x, levels, mu=mu, predictor=other, parameterization=kind, **KEY)
    expected = plain_loss(model, model if other is None else other, x, levels, kind, mask)
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=0)
    assert loss.terms.keys() == {"consistency"} and torch.equal(loss.terms["consistency"], loss.total)
    theirs = gradients(expected, model)
    torch.testing.assert_close(gradients(loss.total, model), theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())
    if other is not None:
        assert not gradients(loss.total, other).any()


def test_without_generated_samples_it_is_ict_to_the_bit() -> None:
    model, (x, levels) = network(dropout=0.4), problem()
    assert torch.equal(gc_loss(model, x, levels, mu=0.0, **KEY).total, ict_loss(model, x, levels, **KEY).total)


@pytest.mark.parametrize("mu", [0.3, 0.9])
def test_the_share_of_generated_samples_is_mu(mu: float) -> None:
    """Counted where the pair shows them: not at .5, where an inverted mask has the same share. Five standard errors."""
    count, seen = 20_000, []

    def record(scaled: Tensor, t: Tensor) -> Tensor:
        seen.append(scaled)
        return torch.zeros_like(scaled)

    def fives(scaled: Tensor, t: Tensor) -> Tensor:
        """F that makes x̂ = 5: c_skip is 1 and c_out 1e-3 at these levels, to 1e-6."""
        return torch.full_like(scaled, 5e3)

    low, high = (torch.full((count,), t, dtype=torch.float64) for t in (0.003, 0.004))
    gc_loss(record, torch.zeros(count, 2), (low, high), mu=mu, predictor=fives, parameterization="cm", **KEY)
    replaced = (seen[0] > 1).all(1)
    assert torch.equal(replaced, (seen[1] > 1).any(1)) and torch.equal(replaced, generated(count, mu, **KEY))
    share = replaced.double().mean().item()
    assert abs(share - mu) < 5 * (mu * (1 - mu) / count) ** 0.5 < abs(1 - 2 * mu) / 2


def test_masks_are_keyed_by_the_sample_alone() -> None:
    whole = generated(1000, 0.3, **KEY)
    assert torch.equal(generated(10, 0.3, sample_id=200, **KEY), whole[200:210])
    ids = torch.tensor([7, 3, 900])
    assert torch.equal(generated(3, 0.3, sample_id=ids, **KEY), whole[ids])
    assert not torch.equal(generated(1000, 0.3, seed=5, step=4), whole)
    assert (generated(1000, 0.6, **KEY) & whole).sum() == whole.sum()  # a larger mu replaces more, not others


class Rows:
    """A predictor that writes down how many rows it was asked about, and of which labels."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def __call__(self, scaled: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert len(scaled) == len(t) == len(labels)
        self.asked.append(labels)
        return scaled * labels[:, None]


def labelled(scaled: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return scaled


def test_the_predictor_is_asked_about_the_rows_that_it_replaces() -> None:
    count, rows = 64, Rows()
    x, labels = torch.randn(count, 2, dtype=torch.float64), torch.arange(count)
    levels = tuple(torch.linspace(a, b, count, dtype=torch.float64) for a, b in ((0.1, 1.0), (0.2, 2.0)))
    options: dict[str, Any] = {"extra_args": {"labels": labels}, "parameterization": "cm", "predictor": rows, **KEY}
    whole = gc_loss(labelled, x, levels, mu=0.3, **options)
    (asked,) = rows.asked
    mask = generated(count, 0.3, **KEY)
    assert torch.equal(asked, labels[mask]) and 0 < len(asked) < count / 2
    # Asked about all rows, as in a traced graph, it makes the same loss.
    fast = torch.compile(lambda: gc_loss(labelled, x, levels, mu=0.3, **options).total, backend="aot_eager")
    assert torch.equal(fast(), whole.total)
    gc_loss(labelled, x, levels, mu=0.0, **options)
    assert len(rows.asked) == 2 and len(rows.asked[1]) == count
    # One row at least: other processes may be waiting in an exchange of parameters.
    small = options | {"extra_args": {"labels": labels[:1]}}
    assert not generated(1, 1e-6, **KEY).any()
    level = tuple(t[:1] for t in levels)
    none = gc_loss(labelled, x[:1], level, mu=1e-6, **small)
    assert len(rows.asked[2]) == 1 and torch.equal(none.total, gc_loss(labelled, x[:1], level, mu=0.0, **small).total)


@pytest.mark.parametrize("objective", ["gc", "ect"])
def test_a_batch_may_be_split_over_machines(objective: str) -> None:
    model, (x, levels) = OneTime(network()), problem()

    def total(rows: slice, **key: Any) -> Tensor:
        if objective == "gc":
            parts = [t[rows] for t in levels]
            return gc_loss(model, x[rows], parts, mu=0.5, parameterization="cm", **KEY, **key).total
        times = [t[rows] for t in draw_ect_times(6, stage=3, **KEY)]
        return ect_loss(model, x[rows], times, mu=0.5, **KEY, **key).total

    whole, halves = total(slice(6)), [total(slice(k, k + 3), sample_id=k) for k in (0, 3)]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2, rtol=1e-12, atol=0)


def plain_ect(model: nn.Module, predictor: nn.Module, x: Tensor, times: Any, mask: Tensor) -> Tensor:
    (t, r), z = times, normal(x.shape, **KEY, dtype=x.dtype)
    asked = r.clamp_min(1e-3)
    key = int(fold_in(fold_in(fold_in(KEY["seed"], DROPOUT), KEY["step"]), 0))
    x_hat = preconditioned(predictor, x + broadcast(r) * z, asked, "edm").detach()
    clean = torch.where((mask & (r > 0))[:, None, None], x_hat, x)
    goal = preconditioned(model, clean + broadcast(r) * z, asked, "edm", dropout=key).detach()
    goal = torch.where((r > 0)[:, None, None], goal, clean)
    above = preconditioned(model, clean + broadcast(t) * z, t, "edm", dropout=key)
    return (distance(above, goal, 0.0) / (t - r)).mean()


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_ect_with_generated_samples_is_the_formula(stage: int, frozen: bool, compiled: bool) -> None:
    model, (x, _) = OneTime(network()), problem()
    other = OneTime(other_network()) if frozen else None
    times = draw_ect_times(6, stage=stage, **KEY)
    replaced = MIXED & (times[1] > 0)
    assert replaced.any() and not replaced.all()

    def ours() -> Tensor:
        return ect_loss(model, x, times, mu=0.5, predictor=other, **KEY).total

    actual = (torch.compile(ours, backend="aot_eager") if compiled else ours)()
    expected = plain_ect(model, model if other is None else other, x, times, MIXED)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    theirs = gradients(expected, model)
    torch.testing.assert_close(gradients(actual, model), theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())


def test_ect_at_stage_zero_replaces_nothing_where_the_partner_is_zero() -> None:
    model, (x, _) = OneTime(network()), problem()
    t = torch.full((6,), 0.05, dtype=torch.float64)
    times = t, torch.zeros_like(t)

    def never(scaled: Tensor, t: Tensor) -> Tensor:
        assert len(scaled) == 1 and (t > 0).all()  # one row, which is not used
        return torch.full_like(scaled, float("nan"))

    assert torch.equal(
        ect_loss(model, x, times, mu=1.0, predictor=never, **KEY).total, ect_loss(model, x, times, **KEY).total
    )


def test_evaluations_share_one_dropout_mask() -> None:
    """All three of GC at mu = 1, and the two that are compared at any mu."""
    model, (x, levels) = network(dropout=0.5), problem()
    before = torch.get_rng_state()
    gc_loss(model, x, levels, mu=1.0, **KEY)
    assert torch.equal(torch.get_rng_state(), before)
    first, second, third = model.masks
    assert 0.2 < first.double().mean() < 0.8 and torch.equal(first, second) and torch.equal(first, third)
    model.masks.clear()
    gc_loss(model, x, levels, mu=0.5, **KEY)
    rows, second, third = model.masks
    assert len(rows) == MIXED.sum() and torch.equal(second, third) and torch.equal(second, first)
    model.masks.clear()
    ect_loss(model_of_one_time := OneTime(model), x, draw_ect_times(6, stage=3, **KEY), mu=0.5, **KEY)
    assert model_of_one_time.inner is model and torch.equal(model.masks[1], model.masks[2])


def test_gradients_reach_samples_that_are_not_replaced() -> None:
    model, (x, levels) = network(), problem()
    x = x.requires_grad_()
    gc_loss(model, x, levels, mu=0.5, **KEY).total.backward()
    assert x.grad is not None
    moved = x.grad.flatten(1).abs().sum(1) > 0
    assert torch.equal(moved, ~MIXED)


A = 1.0


def sign_flow(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([A * x[:, :1].sign(), torch.zeros_like(x[:, 1:])], dim=1)


@pytest.mark.parametrize("t", [0.05, 0.7, 3.0, 40.0])
def test_two_diracs_have_no_velocity_variance(t: float) -> None:
    """GC fig. 1: the augmented coupling by the exact flow is a function of x̃_t, so that R̃_GC = 0 to the bit."""
    x = torch.zeros(4000, 3, dtype=torch.float64)
    x[:, 0] = A * normal((4000, 1), seed=1, dtype=torch.float64)[:, 0].sign()
    assert (velocity_variance(sign_flow, x, t, predictor=sign_flow, **KEY) == 0).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x, t: gc_loss(network(), x, t, mu=1.5, **KEY),
            ValueError,
            r"mu: expected a value in \[0, 1\], got 1.5",
        ),
        (lambda x, t: gc_loss(network(), x, t, mu="half", **KEY), TypeError, "mu: expected a number, got 'half'"),
        (
            lambda x, t: gc_loss(network(), x, t, parameterization="edm", **KEY),
            ValueError,
            "parameterization: expected",
        ),
        (
            lambda x, t: gc_loss(network(), x, t, predictor=nn.DataParallel(network()), **KEY),
            TypeError,
            "predictor: expected .* got DataParallel",
        ),
        (
            lambda x, t: gc_loss(network(), x, t, predictor="average", **KEY),
            TypeError,
            r"predictor: expected a function or module, .* got 'average' \(str\)",
        ),
        (
            lambda x, t: gc_loss(network(), x, t, mu=1.0, predictor=lambda x, t, u: x[:1], **KEY),
            ValueError,
            "predictor: expected a tensor of shape",
        ),
        (
            lambda x, t: ect_loss(network(), x, t[1::-1], mu=1.0, predictor=lambda x, t: (x,), **KEY),
            TypeError,
            "predictor: expected a tensor of shape",
        ),
        (
            lambda x, t: gc_loss(network(), x, t, predictor=lambda x: x, **KEY),
            TypeError,
            r"predictor: called as predictor\(x, t, u\), but it takes \(x\)",
        ),
        (lambda x, t: gc_loss(network(), x, t, seed=0), TypeError, "step"),
        (
            lambda x, t: ect_loss(network(), x, t[1::-1], mu=-0.1, **KEY),
            ValueError,
            r"mu: expected a value in \[0, 1\]",
        ),
    ],
)
def test_wrong_calls(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*problem())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("objective", ["ict", "cd", "gc"])
def test_a_lowest_level_of_zero_is_no_trap(objective: str, compiled: bool) -> None:
    """With t_min = 0 f(x, 0) = x; a network that takes the level's logarithm is not asked about it."""
    x, t = problem()[0], torch.tensor([0.0, 0.0, 0.0, 0.4, 0.5, 0.6], dtype=torch.float64)
    levels = t, t + 0.3

    def of_logarithm(scaled: Tensor, t: Tensor) -> Tensor:
        return scaled * t.log()[:, None, None]

    def total() -> Tensor:
        options: dict[str, Any] = {"parameterization": "cm", "t_min": 0.0, **KEY}
        if objective == "cd":
            return cd_loss(of_logarithm, x, levels, denoiser=lambda noisy, t: x, **options).total
        if objective == "gc":
            return gc_loss(of_logarithm, x, levels, mu=0.5, **options).total
        return ict_loss(of_logarithm, x, levels, **options).total

    actual = (torch.compile(total, backend="aot_eager") if compiled else total)()
    z, s = normal(x.shape, **KEY, dtype=x.dtype), 0.25
    clean = x

    def f(noisy: Tensor, t: Tensor) -> Tensor:
        t = broadcast(t)
        inner = torch.where(t > 0, t.log(), 0.0) * noisy / (s + t * t).sqrt()
        return s / (s + t * t) * noisy + 0.5 * t / (s + t * t).sqrt() * inner

    if objective == "gc":
        clean = torch.where(MIXED[:, None, None], f(x + broadcast(t) * z, t), x)
    above, below = (f(clean + broadcast(level) * z, level) for level in levels[::-1])
    expected = (distance(above, below, 0.00054 * 12**0.5) / 0.3).mean()
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


class Plain(nn.Module):
    """The network without its list of masks, which grows."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.first, self.second, self.dropout = inner.first, inner.second, inner.dropout

    def forward(self, scaled: Tensor, t: Tensor) -> Tensor:
        h = self.first(torch.cat([scaled.flatten(1), torch.stack([t, t], dim=1)], dim=1)).tanh()
        return self.second(self.dropout(h)).reshape(scaled.shape)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["gc", "ect", "cd"])
def test_steps_are_one_graph(objective: str) -> None:
    """Other steps, too; to rounding, for eager code asks about the replaced rows only. GC here has no dropout."""
    model, (x, levels) = Plain(network(dropout=0.4 if objective == "cd" else 0.0)), problem()
    times = draw_ect_times(6, stage=3, **KEY)

    def step_of(step: int) -> Tensor:
        key = {"seed": 5, "step": step}
        if objective == "ect":
            return ect_loss(model, x, times, mu=0.5, **key).total
        if objective == "cd":
            return cd_loss(model, x, levels, denoiser=lambda x, t: 0.5 * x, parameterization="cm", **key).total
        return gc_loss(model, x, levels, mu=0.5, parameterization="cm", **key).total

    fast = torch.compile(step_of, fullgraph=True, backend="aot_eager")
    for step in (1, 2, 3):
        actual, expected = (f(step) for f in (fast, step_of))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        theirs = gradients(expected, model)
        torch.testing.assert_close(gradients(actual, model), theirs, rtol=1e-11, atol=1e-12 * theirs.abs().max().item())
