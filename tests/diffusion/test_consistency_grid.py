"""Tables of consistency training against their closed forms: levels, curriculum, odds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, lognorm
from torch import Tensor

import bicm_diffusion
from bicm_diffusion import karras_schedule
from bicm_diffusion.consistency import (
    LevelTable,
    draw_levels,
    karras_levels,
    level_count,
    level_probabilities,
    partner_probabilities,
)
from bicm_diffusion.consistency.grid import P_MEAN, P_STD, drawn


def test_levels_are_karras() -> None:
    levels = karras_levels(1281)
    assert levels.dtype == torch.float64 and levels.shape == (1281,)
    assert levels[0] == 0.002 and levels[-1] == 80.0
    n = 400
    by_hand = (0.002 ** (1 / 7) + (n - 1) / 1280 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    assert levels[n - 1].item() == pytest.approx(by_hand, rel=1e-13)
    assert (levels.diff() > 0).all()


def test_curriculum_doubles_at_equal_intervals_up_to_s1() -> None:
    counts = [level_count(k, 8000) for k in range(8000)]
    assert counts[::1000] == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert counts == sorted(counts) and counts[-1] == 1281
    changes = [k for k in range(1, 8000) if counts[k] != counts[k - 1]]
    assert changes == list(range(1000, 8000, 1000))


@pytest.mark.parametrize(
    ("s0", "s1", "steps", "stages"),
    [
        # K' = floor(3000 / (log2(5) + 1)) = floor(3000 / 3.3219) = 903.
        (20, 100, 3000, {0: 21, 902: 21, 903: 41, 1805: 41, 1806: 81, 2708: 81, 2709: 101, 2999: 101}),
        # K' = 400,000 / (log2(128) + 1) = 50,000.
        (10, 1280, 400_000, {0: 11, 49_999: 11, 50_000: 21, 349_999: 641, 350_000: 1281, 399_999: 1281}),
        (10, 25, 100, {0: 11, 49: 11, 50: 21, 99: 21}),  # floor(25/10) is a power of two, 25/10 is not
        (10, 70, 1000, {0: 11, 262: 21, 524: 41, 786: 71, 999: 71}),  # K' = floor(1000 / (log2(7) + 1)) = 262
        (7, 7, 10, {0: 8, 9: 8}),
        (1, 1024, 5, {0: 2, 1: 3, 2: 5, 3: 9, 4: 17}),  # an interval is one step at least
    ],
)
def test_curriculum_by_hand(s0: int, s1: int, steps: int, stages: dict[int, int]) -> None:
    assert {k: level_count(k, steps, s0=s0, s1=s1) for k in stages} == stages


@given(st.integers(1, 10_000), st.integers(1, 100), st.integers(0, 2000), st.floats(0, 1))
def test_curriculum_is_the_formula(steps: int, s0: int, more: int, share: float) -> None:
    s1, k = s0 + more, int(share * (steps - 1))
    interval = max(1, math.floor(steps / (math.log(s1 // s0) / math.log(2) + 1) + 1e-9))
    assert level_count(k, steps, s0=s0, s1=s1) == min(s0 * 2 ** (k // interval), s1) + 1


@pytest.mark.parametrize("count", [11, 161, 1281])
@pytest.mark.parametrize(("p_mean", "p_std"), [(P_MEAN, P_STD), (-0.8, 1.6)])
def test_odds_are_bins_of_the_lognormal(count: int, p_mean: float, p_std: float) -> None:
    levels = karras_levels(count)
    bins = torch.from_numpy(lognorm(s=p_std, scale=math.exp(p_mean)).cdf(levels.numpy())).diff()
    odds = level_probabilities(levels, p_mean=p_mean, p_std=p_std)
    assert odds.dtype == torch.float64
    torch.testing.assert_close(odds, bins / bins.sum(), rtol=1e-9, atol=0)


def test_a_level_of_zero_takes_all_the_mass_below() -> None:
    odds = level_probabilities(torch.tensor([0.0, 1.0, 80.0], dtype=torch.float64))
    below = lognorm(s=P_STD, scale=math.exp(P_MEAN)).cdf(1.0) / lognorm(s=P_STD, scale=math.exp(P_MEAN)).cdf(80.0)
    assert odds[0].item() == pytest.approx(below, rel=1e-12)


def test_partner_odds_leave_n_out_and_keep_the_ratios() -> None:
    odds = level_probabilities(karras_levels(11))
    n = torch.arange(10)
    rows = partner_probabilities(odds, n)
    assert (rows[n, n] == 0).all()
    torch.testing.assert_close(rows.sum(1), torch.ones(10, dtype=torch.float64))
    for k in range(10):
        others = n != k
        torch.testing.assert_close(rows[k, others], odds[others] / odds[others].sum(), rtol=1e-13, atol=0)


def test_draws_follow_the_odds() -> None:
    table, count = LevelTable(karras_levels(11)), 100_000
    levels = draw_levels(table, count, seed=3, step=5)
    n = torch.searchsorted(table.levels, levels.low)
    partner = torch.searchsorted(table.levels, levels.partner)
    assert torch.equal(levels.high, table.levels[n + 1])
    assert (n != partner).all()
    assert chisquare(torch.bincount(n, minlength=10).numpy(), (count * table.probabilities).numpy()).pvalue > 1e-4
    given_n = n == n.mode().values
    expected = partner_probabilities(table.probabilities, n.mode().values[None])[0] * given_n.sum()
    kept = expected > 0
    seen = torch.bincount(partner[given_n], minlength=10)
    assert chisquare(seen[kept].numpy(), expected[kept].numpy()).pvalue > 1e-4


@given(st.integers(2, 300), st.integers(0, 2**32 - 1))
def test_draws_at_the_ends_stay_in_the_table(count: int, seed: int) -> None:
    odds = level_probabilities(karras_levels(count + 1))
    n = torch.tensor([0, count - 1, seed % count])
    ends = torch.tensor([2.0**-33, 1.0], dtype=torch.float64)
    for end in ends:
        assert (partner_probabilities(odds, n) if count > 1 else odds).shape == (3, count)
        chosen = drawn(partner_probabilities(odds, n), end.repeat(3))
        assert ((chosen >= 0) & (chosen < count) & (chosen != n)).all()


@pytest.mark.parametrize("batch", [1, 7])
def test_a_sample_draws_the_same_levels_in_any_batch(batch: int) -> None:
    table = LevelTable(karras_levels(321))
    whole = draw_levels(table, 64, seed=1, step=9)
    part = draw_levels(table, batch, seed=1, step=9, sample_id=20)
    for all_levels, some in zip(whole, part, strict=True):
        assert torch.equal(all_levels[20 : 20 + batch], some)


def test_levels_and_partners_have_keys_of_their_own() -> None:
    table = LevelTable(karras_levels(1281))
    first, again, other_step, other_seed = (
        draw_levels(table, 500, seed=seed, step=step) for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))
    )

    def agreement(a: Tensor, b: Tensor) -> float:
        return (a == b).double().mean().item()

    assert agreement(first.low, again.low) == agreement(first.partner, again.partner) == 1
    for other in (other_step, other_seed):
        assert agreement(first.low, other.low) < 0.1 and agreement(first.partner, other.partner) < 0.1
    ranks = torch.stack([first.low, first.partner]).argsort().argsort().double()
    assert abs(torch.corrcoef(ranks)[0, 1]) < 0.2


def test_one_grid_serves_training_and_samplers() -> None:
    assert torch.equal(karras_levels(18), torch.tensor(karras_schedule(18).sigma[1:], dtype=torch.float64))
    assert karras_levels(3, t_min=0.0, t_max=1.0, rho=1.0).tolist() == [0.0, 0.5, 1.0]
    assert not {"discretization", "multistep_sample", "karras_sigmas"} & {*dir(bicm_diffusion)}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: karras_levels(0), "count"),
        (lambda: LevelTable(karras_levels(1)), "levels"),
        (lambda: karras_levels(5, t_min=1.0, t_max=0.5), "t_min"),
        (lambda: karras_levels(5, rho=0.0), "rho"),
        (lambda: level_count(-1, 10), "step"),
        (lambda: level_count(0, 10, s0=20, s1=10), "s0"),
        (lambda: LevelTable(karras_levels(11), p_mean=40.0, p_std=1.0), "p_mean, p_std: expected mass between"),
        (
            lambda: level_probabilities(karras_levels(11), p_mean=40.0, p_std=1.0),
            "p_mean, p_std: expected mass between",
        ),
        (lambda: LevelTable(karras_levels(11), p_mean=math.nan), "p_mean, p_std: expected mass between"),
        (lambda: LevelTable(karras_levels(11), p_std=-1.0), "p_mean, p_std: expected mass between"),
        (
            lambda: LevelTable(karras_levels(11), p_mean=-1.0, p_std=1e-3),
            "p_mean, p_std: expected mass in two intervals",
        ),
        (
            lambda: partner_probabilities(torch.ones(3) / 3, torch.tensor([0, 3])),
            r"n: expected .* \[0, 3\), got 0 to 3",
        ),
        (lambda: partner_probabilities(torch.ones(3) / 3, torch.tensor([-1])), "n: expected .* got -1 to -1"),
    ],
)
def test_bad_tables_are_refused(call: object, name: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=name if "expected" in name else f"{name}.*expected"):
        call()


def test_of_two_levels_one_interval_has_all_the_mass() -> None:
    assert LevelTable(karras_levels(2), p_mean=-1.0, p_std=1e-3).probabilities.tolist() == [1.0]
