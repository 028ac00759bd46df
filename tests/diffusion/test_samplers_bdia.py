"""BDIA in floating point: its formulas, its propositions, and what a round trip loses."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import (
    InexactInversionWarning,
    Schedule,
    StatePair,
    bdia_edit,
    bdia_invert,
    bdia_sample,
    ddim_invert,
    ddim_sample,
    edm_sample,
    vp_schedule,
)
from tests.support.closed_forms import Mixture, noise

MODEL = Mixture(0.5, 0.8)
silent = pytest.mark.filterwarnings("ignore::bicm_diffusion.InexactInversionWarning")


def eps(z: Tensor, schedule: Schedule, i: int) -> Tensor:
    return MODEL(z, torch.full(z.shape[:1], schedule.times[i], dtype=torch.float64))


def plain_sample(z: Tensor, schedule: Schedule, gamma: float) -> tuple[Tensor, Tensor]:
    """BDIA eq. 24 as it is written, in z's dtype."""
    a, b = schedule.a, schedule.b
    last, current = z, a[schedule.steps] * z + b[schedule.steps] * eps(z, schedule, schedule.steps)
    for i in range(schedule.steps - 1, 0, -1):
        e = eps(current, schedule, i)
        back = current / a[i + 1] - (b[i + 1] / a[i + 1]) * e
        last, current = current, gamma * last - gamma * back + (a[i] * current + b[i] * e)
    return current, last


def plain_invert(z: Tensor, schedule: Schedule, gamma: float) -> tuple[Tensor, Tensor]:
    """BDIA eq. 28 as it is written, in z's dtype."""
    a, b = schedule.a, schedule.b
    last, current = z, (z - b[1] * eps(z, schedule, 1)) / a[1]
    for i in range(1, schedule.steps):
        e = eps(current, schedule, i)
        down = a[i] * current + b[i] * e
        last, current = current, last / gamma - down / gamma + (current / a[i + 1] - (b[i + 1] / a[i + 1]) * e)
    return current, last


def trajectory(sampler: Any, z: Tensor, schedule: Schedule, **options: Any) -> dict[int, Tensor]:
    """Every state of a run by its index."""
    start = 0 if sampler is bdia_invert else schedule.steps
    states = {start: z}
    sampler(MODEL, z, schedule, callback=lambda step: states.update({step.index: step.z}), **options)
    return states


@silent
@pytest.mark.parametrize("gamma", [1.0, 0.96, 0.5])
@pytest.mark.parametrize(("ours", "plain"), [(bdia_sample, plain_sample), (bdia_invert, plain_invert)])
def test_float64_is_the_formula(ours: Any, plain: Any, gamma: float) -> None:
    z, schedule = noise(6, 5), vp_schedule(25, final_time=0.01)
    for got, expected in zip(
        ours(MODEL, z, schedule, gamma=gamma, exact=False), plain(z, schedule, gamma), strict=True
    ):
        largest = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-8 * largest if gamma == 0.5 else 1e-12 * largest)


def test_float32_rounds_less_than_the_formula_does() -> None:
    z, schedule = noise(64, 5), vp_schedule(50, final_time=0.01)
    wanted = plain_sample(z, schedule, 0.96)[0]
    ours = bdia_sample(MODEL, z.float(), schedule, gamma=0.96, exact=False).z
    eager = plain_sample(z.float(), schedule, 0.96)[0]
    error, eager_error = ((x.double() - wanted).abs().max().item() for x in (ours, eager))
    assert error <= 2 * eager_error


@silent
@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.5])
def test_proposition_1(gamma: float) -> None:
    """Eq. 26-27: every state as the start plus averages of DDIM's updates in both directions."""
    schedule = vp_schedule(12)
    z = trajectory(bdia_sample, noise(4, 3), schedule, gamma=gamma, exact=False)
    a, b, top = schedule.a, schedule.b, schedule.steps

    def forward(j: int) -> Tensor:
        return a[j] * z[j] + b[j] * eps(z[j], schedule, j) - z[j]

    def backward(j: int) -> Tensor:
        e = eps(z[j - 1], schedule, j - 1)
        return z[j - 1] / a[j] - b[j] / a[j] * e - z[j - 1]

    for i in range(top - 1):
        total = z[top] + forward(i + 1)
        for j in range(i + 2, top + 1):
            sign = (-gamma) ** (j - i)
            total = total + (1 - sign) / (1 + gamma) * forward(j) - (gamma + sign) / (1 + gamma) * backward(j)
        torch.testing.assert_close(z[i], total, rtol=1e-11, atol=1e-11)


def test_proposition_2() -> None:
    """Time symmetry at gamma = 1: eq. 25 with i - 1 and i + 1 exchanged is the step of the inversion."""
    schedule = vp_schedule(12)
    z = trajectory(bdia_invert, noise(4, 3), schedule, exact=False)
    a, b = schedule.a, schedule.b
    for i in range(1, schedule.steps):
        e = eps(z[i], schedule, i)
        down = a[i] * z[i] + b[i] * e - z[i]
        up = z[i] / a[i + 1] - b[i + 1] / a[i + 1] * e - z[i]
        torch.testing.assert_close(z[i + 1], z[i - 1] - down + up, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(z[i - 1], z[i + 1] - up + down, rtol=1e-12, atol=1e-12)


def test_first_states_of_an_inversion_are_ddim_inversion() -> None:
    x, schedule = noise(4, 3), vp_schedule(10)
    states = trajectory(bdia_invert, x, schedule, exact=False)
    expected = (x - schedule.b[1] * eps(x, schedule, 1)) / schedule.a[1]
    torch.testing.assert_close(states[1], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("exact", [False, True])
def test_an_inversion_may_begin_with_the_noise_at_index_0(exact: bool) -> None:
    x, schedule = noise(4, 3), vp_schedule(10, final_time=0.01)
    options: dict[str, Any] = {"exact": exact, "start_index": 0}
    states = trajectory(bdia_invert, x, schedule, **options)
    expected = (x - schedule.b[1] * eps(x, schedule, 0)) / schedule.a[1]
    torch.testing.assert_close(states[1], expected, rtol=1e-13, atol=1e-9 if exact else 1e-13)

    def clean(z: Tensor, times: Tensor) -> Tensor:
        i = schedule.times.index(times[0].item())
        return (z - schedule.sigma[i] * MODEL(z, times)) / schedule.alpha[i]

    as_x0 = bdia_invert(clean, x, schedule, prediction="x0", **options)
    torch.testing.assert_close(as_x0.z, states[10], rtol=1e-6 if exact else 1e-10, atol=1e-6 if exact else 1e-10)
    edited = bdia_edit(lambda z, times, **_: MODEL(z, times), x, schedule, source={}, target={}, **options)
    assert (edited.z - x).abs().max() < 1e-9


def test_gamma_zero_is_ddim_and_heun() -> None:
    z, schedule = noise(4, 3, 5), vp_schedule(20)
    for increments, other in (("euler", ddim_sample), ("heun", edm_sample)):
        ours = bdia_sample(MODEL, z, schedule, gamma=0.0, increments=increments, exact=False).z
        torch.testing.assert_close(ours, other(MODEL, z, schedule), rtol=0, atol=1e-13)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("increments", ["euler", "heun"])
def test_gamma_may_differ_between_samples(exact: bool, increments: str) -> None:
    z, schedule = noise(3, 4), vp_schedule(12)
    gammas = torch.tensor([1.0, 0.96, 0.5], dtype=torch.float64)
    options: dict[str, Any] = {"exact": exact, "increments": increments}
    together = bdia_sample(MODEL, z, schedule, gamma=gammas, **options).z
    alone = [bdia_sample(MODEL, z[i : i + 1], schedule, gamma=g, **options).z for i, g in enumerate(gammas.tolist())]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)


@pytest.mark.parametrize("exact", [True, False])
def test_gamma_takes_many_forms(exact: bool) -> None:
    z, schedule = noise(2, 4), vp_schedule(12)
    pairs = (torch.tensor([24, 24]), torch.tensor([25, 25]))
    forms: list[Any] = [0.96, Fraction(24, 25), (24, 25), torch.tensor(0.96, dtype=torch.float64), pairs]
    ends = [bdia_sample(MODEL, z, schedule, gamma=form, exact=exact).z for form in forms]
    for end in ends[1:]:
        assert torch.equal(end, ends[0])


@pytest.mark.parametrize(("gamma", "tolerance"), [(1.0, 1e-11), (0.96, 1e-10), (0.9, 1e-8)])
@pytest.mark.parametrize(("there", "back"), [(bdia_sample, bdia_invert), (bdia_invert, bdia_sample)])
def test_float64_round_trips_lose_little(there: Any, back: Any, gamma: float, tolerance: float) -> None:
    z, schedule = noise(8, 3, 4), vp_schedule(50)
    pair = there(MODEL, z, schedule, gamma=gamma, exact=False)
    assert isinstance(pair, StatePair)
    assert (back(MODEL, pair, schedule, gamma=gamma, exact=False).z - z).abs().max().item() < tolerance


def test_float32_round_trip_beats_ddim_inversion() -> None:
    x, schedule = noise(8, 3, 4, dtype=torch.float32), vp_schedule(50)
    pair = bdia_invert(MODEL, x, schedule, exact=False)
    bdia = bdia_sample(MODEL, pair, schedule, exact=False).z
    ddim = ddim_sample(MODEL, ddim_invert(MODEL, x, schedule), schedule)
    assert (bdia - x).abs().max() < 0.01 * (ddim - x).abs().max()


def test_an_edit_is_an_inversion_and_a_sampling_under_two_conditions() -> None:
    x, schedule = noise(4, 3), vp_schedule(20)

    def model(z: Tensor, times: Tensor, shift: float, unit: float) -> Tensor:
        return MODEL(z, times) + shift * unit

    options: dict[str, Any] = {"gamma": 0.96, "extra_args": {"unit": 0.1}}
    same = bdia_edit(model, x, schedule, source={"shift": 1.0}, target={"shift": 1.0}, **options)
    assert (same.z - x).abs().max() < 1e-9
    edited = bdia_edit(model, x, schedule, source={"shift": 1.0}, target={"shift": -1.0}, **options)
    latent = bdia_invert(model, x, schedule, gamma=0.96, extra_args={"unit": 0.1, "shift": 1.0})
    again = bdia_sample(model, latent, schedule, gamma=0.96, extra_args={"unit": 0.1, "shift": -1.0})
    assert torch.equal(edited.z, again.z)
    assert (edited.z - x).abs().max() > 0.01


def test_a_pair_saves_one_evaluation() -> None:
    calls = 0

    def model(z: Tensor, times: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return MODEL(z, times)

    schedule = vp_schedule(6)
    pair = bdia_invert(model, noise(2, 3), schedule)
    assert calls == 6
    bdia_sample(model, pair, schedule)
    assert calls == 6 + 5


def test_a_single_step_is_ddim_both_ways() -> None:
    z, schedule = noise(2, 3), vp_schedule(1)
    pair = bdia_sample(MODEL, z, schedule, exact=False)
    assert torch.equal(pair.z, ddim_sample(MODEL, z, schedule))
    assert torch.equal(bdia_invert(MODEL, pair, schedule, exact=False).z, z)
    assert torch.equal(bdia_invert(MODEL, z, schedule, exact=False).z, ddim_invert(MODEL, z, schedule))


def test_floats_warn_of_what_they_are_expected_to_lose(recwarn: pytest.WarningsRecorder) -> None:
    z, schedule = noise(2, 3, dtype=torch.float32), vp_schedule(30)
    bdia_invert(MODEL, z, schedule, gamma=0.96, exact=False)
    bdia_invert(MODEL, z, schedule, gamma=0.5)
    assert not recwarn.list
    with pytest.warns(
        InexactInversionWarning, match=r"BDIA in torch.float32 over 30 steps .* loses at most about 1e-01"
    ):
        bdia_invert(MODEL, z, schedule, gamma=0.5, exact=False)
    with pytest.warns(InexactInversionWarning) as caught:
        bdia_invert(MODEL, z.bfloat16(), schedule, exact=False)
    assert caught[0].filename == __file__


def expected_loss(call: Any) -> float:
    """What a call warns of, in units of the states' size."""
    with pytest.warns(InexactInversionWarning) as caught:
        call()
    found = re.search(r"loses at most about (\S+)", str(caught[0].message))
    assert found
    return float(found[1])


@silent
@pytest.mark.parametrize(("gamma", "steps"), [(0.9, 100), (0.9, 80), (0.5, 20), (0.5, 40)])
def test_what_floats_are_expected_to_lose_is_what_they_lose(gamma: float, steps: int) -> None:
    z, schedule, options = noise(64, 8, dtype=torch.float32), vp_schedule(steps), {"gamma": gamma, "exact": False}
    pair = bdia_sample(MODEL, z, schedule, **options)
    expected = expected_loss(lambda: bdia_invert(MODEL, pair, schedule, **options))
    lost = (bdia_invert(MODEL, pair, schedule, **options).z - z).abs().max().item()
    assert lost / 10 < expected < 10 * lost


@pytest.mark.parametrize(("gamma", "steps"), [(0.9, 50), (0.96, 80)])
def test_an_image_s_way_there_and_back_is_not_said_to_lose_what_a_retrace_from_noise_would(
    gamma: float, steps: int, recwarn: pytest.WarningsRecorder
) -> None:
    x, schedule, options = noise(64, 8, dtype=torch.float32), vp_schedule(steps), {"gamma": gamma, "exact": False}
    latent = bdia_invert(MODEL, x, schedule, **options)
    assert not recwarn.list
    assert (bdia_sample(MODEL, latent, schedule, **options).z - x).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, s: bdia_sample(MODEL, z, s, gamma=1.5), r"gamma: expected a value in \[0, 1\], got 1.5"),
        (lambda z, s: bdia_sample(MODEL, z, s, gamma=-0.1, exact=False), r"gamma: expected a value in \[0, 1\]"),
        (lambda z, s: bdia_sample(MODEL, z, s, gamma=0.0), "gamma: an exact step needs a factor of at least 1/1024"),
        (lambda z, s: bdia_invert(MODEL, z, s, gamma=0.0, exact=False), r"gamma: expected a value in \(0, 1\]"),
        (lambda z, s: bdia_sample(MODEL, z, s, increments="rk4"), "increments: expected one of 'euler', 'heun'"),
        (
            lambda z, s: bdia_invert(MODEL, z, s, start_index=0),
            r"start_index: expected 1, or 0 where sigma_0 > 0, got 0",
        ),
        (lambda z, s: bdia_invert(MODEL, z, s, start_index=2), "start_index: expected 1, or 0"),
        (lambda z, s: bdia_invert(MODEL, StatePair(z, z[:, :2]), s), "z: expected a pair of one shape"),
        (lambda z, s: bdia_invert(MODEL, StatePair(z, z.float()), s), "z: expected a pair of one shape and dtype"),
    ],
)
def test_wrong_calls_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(noise(2, 3), vp_schedule(4))
