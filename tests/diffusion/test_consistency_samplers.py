"""Consistency sampling and inversion on a Gaussian, whose two-time flow is known in closed form; slerp."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import (
    PRESETS,
    ConsistencySchedule,
    LeapInfo,
    consistency_invert,
    consistency_multistep_sample,
    consistency_sample,
    slerp,
)
from bicm_diffusion.keys import CONSISTENCY_INVERSION, CONSISTENCY_SAMPLING
from bicm_kernels import fold_in, normal

DATA_STD = 0.7
T_MIN = 0.002
KINDS = ("fresh", "fixed", "initial")
SCHEDULES = {name: schedule for name, schedule in PRESETS.items() if "inver" not in name and "inter" not in name}
INVERSIONS = {name: schedule for name, schedule in PRESETS.items() if name not in SCHEDULES}


def spread(t: float | Tensor) -> float | Tensor:
    return (DATA_STD**2 + t * t) ** 0.5


def flow(x: Tensor, t: float, u: float) -> Tensor:
    """The exact trajectory of x ~ N(0, DATA_STD²) from t to u."""
    return x * (spread(u) / spread(t))


def gaussian_model(scaled: Tensor, t: Tensor, u: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """F of the exact flow, from BCM eq. 20 solved for it; every element on its own."""
    t, u = (level.double().reshape(-1, *[1] * (scaled.dim() - 1)) for level in (t, u))
    s = sigma_data**2 + t * t
    c_skip, c_out = (sigma_data**2 + t * u) / s, sigma_data * (t - u) / s.sqrt()
    x = scaled.double() * s.sqrt()
    return ((spread(u) / spread(t) - c_skip) / c_out * x).to(scaled.dtype)


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels", [(80.0,), (80.0, 1.2), (80.0, 10.0, 1.0, 0.1)])
def test_going_down_is_the_exact_flow_however_many_leaps(levels: tuple[float, ...]) -> None:
    x = 80 * noise(4, 3, 5)
    assert_close(consistency_sample(gaussian_model, x, ConsistencySchedule(levels)), flow(x, 80.0, T_MIN))


@pytest.mark.parametrize("name", SCHEDULES)
def test_presets_take_the_papers_steps(name: str) -> None:
    schedule, x, seed = SCHEDULES[name], 80 * noise(4, 6), 11
    expected, leaps = x, 0
    for start, stop in pairwise([*schedule.levels, T_MIN]):
        expected, leaps = flow(expected, start, stop), leaps + 1
    for amount, level in schedule.zigzags:
        fresh = normal(x.shape, seed=fold_in(seed, CONSISTENCY_SAMPLING), step=leaps - 1, dtype=x.dtype)
        expected = flow(flow(expected + amount * fresh, amount, level), level, T_MIN)
        leaps += 2
    seen: list[LeapInfo] = []
    assert_close(consistency_sample(gaussian_model, x, schedule, seed=seed, callback=seen.append), expected)
    assert len(seen) == leaps == schedule.evaluations


def test_evaluations_of_the_presets_are_the_papers() -> None:
    counts = {"1step": 1, "ancestral": 2, "zigzag": 3, "combined": 4}
    for name, schedule in SCHEDULES.items():
        assert schedule.evaluations == counts[name.split("-")[-1]]


def test_multistep_replaces_the_noise_and_adds_none_at_the_end() -> None:
    x, seed = 80 * noise(4, 6), 3
    expected = flow(x, 80.0, T_MIN)
    for step, level in enumerate((5.0, 0.8)):
        fresh = normal(x.shape, seed=fold_in(seed, CONSISTENCY_SAMPLING), step=step, dtype=x.dtype)
        expected = flow(expected + math.sqrt(level**2 - T_MIN**2) * fresh, level, T_MIN)
    assert_close(
        consistency_multistep_sample(gaussian_model, x, ConsistencySchedule((80.0, 5.0, 0.8)), seed=seed), expected
    )


@pytest.mark.parametrize("name", INVERSIONS)
def test_inversion_climbs_the_flow_and_sampling_returns(name: str) -> None:
    schedule, x, seed = INVERSIONS[name], noise(4, 6), 5
    low, high = schedule.levels[-1], schedule.levels[0]
    noisy = x + low * normal(x.shape, seed=fold_in(seed, CONSISTENCY_INVERSION), dtype=x.dtype)
    latent = consistency_invert(gaussian_model, x, schedule, seed=seed)
    assert_close(latent, flow(noisy, low, high))
    back = consistency_sample(gaussian_model, latent, ConsistencySchedule((high,)))
    assert_close(back, flow(noisy, low, T_MIN))


def test_two_inversions_draw_different_noise() -> None:
    x, schedule = noise(1, 50).repeat(2, 1), INVERSIONS["cifar10-inversion-2"]
    together = consistency_invert(gaussian_model, x, schedule, seed=1)
    other = consistency_invert(gaussian_model, x[:1], schedule, seed=2)
    assert (together[0] - together[1]).abs().min() > 0 and (together[:1] - other).abs().min() > 0


def test_another_seed_changes_what_zigzags_add_and_nothing_else() -> None:
    x = 80 * noise(2, 5)
    for schedule, changes in ((PRESETS["cifar10-ancestral"], False), (PRESETS["cifar10-zigzag"], True)):
        first, second = (consistency_sample(gaussian_model, x, schedule, seed=seed) for seed in (1, 2))
        assert torch.equal(first, second) is not changes


TWICE = ConsistencySchedule((80.0, 2.0), ((0.2, 0.8), (0.1, 0.5), (0.05, 0.3)))


def zigzagged(x: Tensor, noises: list[Tensor]) -> Tensor:
    """TWICE by the exact flow, with the noise that each zigzag adds."""
    x = flow(x, 80.0, T_MIN)
    for (amount, level), n in zip(TWICE.zigzags, noises, strict=True):
        x = flow(flow(x + amount * n, amount, level), level, T_MIN)
    return x


def test_zigzags_may_share_their_noise() -> None:
    """BCM fig. 3c: the noise that each iteration adds is fixed."""
    x, seed = 80 * noise(4, 6), 11
    drawn = [normal(x.shape, seed=fold_in(seed, CONSISTENCY_SAMPLING), step=k, dtype=x.dtype) for k in (1, 3, 5)]
    ours = {kind: consistency_sample(gaussian_model, x, TWICE, seed=seed, noise=kind) for kind in KINDS}
    assert_close(ours["fresh"], zigzagged(x, drawn))
    assert_close(ours["fixed"], zigzagged(x, drawn[:1] * 3))
    assert_close(ours["initial"], zigzagged(x, [x / 80.0] * 3))
    assert torch.equal(ours["fresh"], consistency_sample(gaussian_model, x, TWICE, seed=seed))
    once = PRESETS["cifar10-zigzag"]
    fresh, fixed = (consistency_sample(gaussian_model, x, once, seed=seed, noise=kind) for kind in KINDS[:2])
    assert torch.equal(fresh, fixed)


def test_multistep_sampling_may_share_its_noise() -> None:
    x, seed, levels = 80 * noise(4, 6), 3, (5.0, 0.8)
    drawn = [normal(x.shape, seed=fold_in(seed, CONSISTENCY_SAMPLING), step=k, dtype=x.dtype) for k in (0, 1)]
    for kind, noises in (("fresh", drawn), ("fixed", drawn[:1] * 2), ("initial", [x / 80.0] * 2)):
        expected = flow(x, 80.0, T_MIN)
        for level, n in zip(levels, noises, strict=True):
            expected = flow(expected + math.sqrt(level**2 - T_MIN**2) * n, level, T_MIN)
        got = consistency_multistep_sample(
            gaussian_model, x, ConsistencySchedule((80.0, *levels)), seed=seed, noise=kind
        )
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["fixed", "initial"])
def test_shared_noise_belongs_to_its_sample(kind: str, dtype: torch.dtype) -> None:
    x = noise(7, 3, 5, dtype=dtype)
    for sampler, schedule in (
        (consistency_sample, TWICE),
        (consistency_multistep_sample, ConsistencySchedule((80.0, 5.0, 0.8))),
    ):
        together = sampler(gaussian_model, x, schedule, seed=4, noise=kind)
        alone = sampler(gaussian_model, x[4:5], schedule, seed=4, sample_id=4, noise=kind)
        assert together.dtype == dtype and torch.equal(together[4:5], alone)


def test_the_initial_noise_needs_no_launch_of_its_own() -> None:
    scaled: list[Tensor] = []
    states: list[Tensor] = []

    def model(x: Tensor, t: Tensor, u: Tensor) -> Tensor:
        scaled.append(x)
        return gaussian_model(x, t, u)

    x = 80 * noise(2, 3)
    consistency_sample(model, x, TWICE, noise="initial", callback=lambda info: states.append(info.x))
    starts = [80.0, 2.0, 0.2, 0.8, 0.1, 0.5, 0.05, 0.3]
    for seen, state, level in zip(scaled, [x, *states], starts, strict=False):
        assert_close(seen, state / (0.25 + level**2) ** 0.5)


def test_an_unknown_noise_is_named() -> None:
    for sampler in (consistency_sample, consistency_multistep_sample):
        with pytest.raises(ValueError, match="noise: expected one of 'fresh', 'fixed', 'initial', got 'same'"):
            sampler(gaussian_model, noise(2, 3), ConsistencySchedule((80.0,)), noise="same")


@pytest.mark.parametrize("sampler", [consistency_sample, consistency_multistep_sample, consistency_invert])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_sample_does_not_depend_on_its_batch(sampler: object, dtype: torch.dtype) -> None:
    assert callable(sampler)
    x, schedule = noise(7, 3, 5, dtype=dtype), ConsistencySchedule((20.0, 1.2, 0.3))
    if sampler is consistency_sample:
        schedule = ConsistencySchedule((20.0, 1.2), ((0.1, 0.3),))
    together = sampler(gaussian_model, x, schedule, seed=4)
    alone = sampler(gaussian_model, x[4:5], schedule, seed=4, sample_id=4)
    assert together.dtype == dtype and torch.equal(together[4:5], alone)


def test_model_sees_scaled_states_and_both_levels() -> None:
    asked: list[tuple[float, float, float]] = []

    def model(scaled: Tensor, t: Tensor, u: Tensor, *, shift: float) -> Tensor:
        assert t.shape == u.shape == (2,) and t.dtype == u.dtype == torch.float32
        asked.append((t[0].item(), u[0].item(), scaled[0, 0].item()))
        return torch.full_like(scaled, shift)

    states: list[LeapInfo] = []
    x = 20 * noise(2, 3, dtype=torch.float32)
    schedule = ConsistencySchedule((20.0, 2.0), ((0.5, 1.0),))
    consistency_sample(model, x, schedule, extra_args={"shift": 0.25}, callback=states.append, progress=True)
    path = [(20.0, 2.0), (2.0, T_MIN), (0.5, 1.0), (1.0, T_MIN)]
    assert [(t, u) for t, u, _ in asked] == [(t, pytest.approx(u)) for t, u in path]
    befores = [x, *(info.x for info in states)]
    for (t, _, scaled), before in zip(asked, befores, strict=False):
        assert scaled == pytest.approx(before[0, 0].item() / math.sqrt(0.25 + t * t), rel=1e-6)
    assert [info.leap.level for info in states] == [2.0, 0.5, 1.0, T_MIN]
    assert all((info.F == 0.25).all() for info in states)


def test_sigma_data_belongs_to_the_schedule() -> None:
    x = 20 * noise(3, 4)
    schedule = ConsistencySchedule((20.0, 1.0), ((0.1, 0.5),), sigma_data=0.9)
    plain = consistency_sample(gaussian_model, x, ConsistencySchedule((20.0, 1.0), ((0.1, 0.5),)))
    assert_close(consistency_sample(gaussian_model, x, schedule, extra_args={"sigma_data": 0.9}), plain)


def test_samplers_record_no_gradients_and_leave_their_input_alone() -> None:
    x = noise(2, 3).requires_grad_()
    before = x.detach().clone()
    for sampler in (consistency_sample, consistency_multistep_sample, consistency_invert):
        assert not sampler(gaussian_model, x, ConsistencySchedule((20.0, 1.0))).requires_grad
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize(
    ("levels", "zigzags", "name"),
    [
        ((), (), "levels"),
        ((1.0, 2.0), (), "levels"),
        ((2.0, 2.0), (), "levels"),
        ((1.0, 0.001), (), "levels"),
        ((math.inf, 1.0), (), "levels"),
        ((1.0,), ((0.5, 0.4),), "zigzags"),
        ((1.0,), ((0.001, 0.4),), "zigzags"),
    ],
)
def test_bad_schedules_are_refused(
    levels: tuple[float, ...], zigzags: tuple[tuple[float, float], ...], name: str
) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        ConsistencySchedule(levels, zigzags)


def test_samplers_refuse_schedules_that_they_cannot_follow() -> None:
    x, zigzag = noise(1, 2), ConsistencySchedule((20.0, 1.0), ((0.1, 0.5),))
    with pytest.raises(ValueError, match="schedule"):
        consistency_multistep_sample(gaussian_model, x, zigzag)
    for schedule in (zigzag, ConsistencySchedule((20.0,))):
        with pytest.raises(ValueError, match="schedule"):
            consistency_invert(gaussian_model, x, schedule)


def test_slerp_follows_the_arc() -> None:
    first, second = noise(5, 3, 4), torch.flip(noise(5, 3, 4), dims=[0])
    second[2] = noise(1, 3, 4)[0] * 0.5 + first[2]
    a, b = first.flatten(1), second.flatten(1)
    psi = torch.nn.functional.cosine_similarity(a, b).arccos()
    alpha = torch.linspace(0, 1, 5, dtype=torch.float64)
    weights = [((1 - alpha) * psi).sin() / psi.sin(), (alpha * psi).sin() / psi.sin()]
    expected = weights[0][:, None] * a + weights[1][:, None] * b
    assert_close(slerp(first, second, alpha).flatten(1), expected)
    assert_close(slerp(first, second, 0.0), first)
    assert_close(slerp(first, second, 1.0), second)


def test_slerp_keeps_the_length_of_noise() -> None:
    first, second = noise(2, 4000).chunk(2)
    middle = slerp(first, second * first.norm() / second.norm(), 0.5)
    assert middle.norm().item() == pytest.approx(first.norm().item(), rel=1e-12)


def test_slerp_of_parallel_samples_is_a_line_and_of_opposite_ones_an_error() -> None:
    x = noise(2, 6)
    assert_close(slerp(x, 3 * x, 0.25), 1.5 * x)
    assert_close(slerp(torch.zeros_like(x), x, 0.5), 0.5 * x)
    near = x + 1e-9 * noise(2, 6).flip(0)
    assert_close(slerp(x, near, 0.25), 0.75 * x + 0.25 * near)
    with pytest.raises(ValueError, match="not opposite"):
        slerp(x, -2 * x, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slerp_computes_halves_in_float32(dtype: torch.dtype) -> None:
    first, second = noise(2, 3, 40, dtype=dtype)
    exact = slerp(first.double(), second.double(), 0.3)
    got = slerp(first, second, 0.3)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


X = torch.eye(2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((noise(2, 3), noise(2, 4), 0.5), ValueError, "first, second: expected one shape"),
        ((X, X.double(), 0.5), ValueError, "first, second: expected one shape and dtype"),
        ((X, X.to("meta"), 0.5), ValueError, "first, second: expected one shape and dtype on one device"),
        ((X.long(), X.long(), 0.5), TypeError, r"first: expected float16, .* got torch\.int64"),
        ((X, [1.0], 0.5), TypeError, r"second: expected a tensor \(B, …\), got a list of 1"),
        ((X[0], X[1], 0.5), ValueError, r"first, second: expected batches \(B, …\), got shape \(2,\); x\[None\]"),
        ((X, X, torch.ones(3)), ValueError, r"weight: expected a 0-d or a \(2,\) tensor, got shape \(3,\)"),
        ((X, X, torch.ones(2, 1)), ValueError, r"weight: expected a 0-d or a \(2,\) tensor, got shape \(2, 1\)"),
        ((X, X, "half"), TypeError, "weight: expected a number or a tensor, got 'half'"),
        ((X, X, None), TypeError, "weight: expected a number or a tensor, got None"),
    ],
)
def test_slerp_names_what_is_wrong(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        slerp(*arguments)
