"""The sampling grids: levels, their coefficients, and the two forms of one schedule."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bicm_diffusion import (
    Schedule,
    ddim_sample,
    flow_schedule,
    karras_levels,
    karras_schedule,
    to_ve,
    to_vp,
    vp_alpha_sigma,
    vp_schedule,
    vp_time,
)
from bicm_diffusion.rational import nearest


def test_vp_is_variance_preserving_and_ends_on_data() -> None:
    schedule = vp_schedule(100)
    assert schedule.alpha[0] == 1.0 and schedule.sigma[0] == 0.0 and schedule.sigma[100] > 0.9999
    assert schedule.clean and not vp_schedule(3, final_time=0.1).clean
    for i in range(1, 101):
        assert schedule.alpha[i] ** 2 + schedule.sigma[i] ** 2 == pytest.approx(1.0, abs=1e-15)
        assert schedule.a[i] * schedule.alpha[i] == pytest.approx(schedule.alpha[i - 1], rel=1e-15)
        assert schedule.b[i] + schedule.a[i] * schedule.sigma[i] == pytest.approx(schedule.sigma[i - 1], rel=1e-14)
    assert math.isnan(schedule.a[0]) and math.isnan(schedule.b[0])


def test_tables_hold_the_schedule() -> None:
    schedule = vp_schedule(7)
    assert schedule.table.dtype == torch.float64
    assert schedule.table.tolist() == [list(schedule.times), list(schedule.alpha), list(schedule.sigma)]
    assert schedule == vp_schedule(7) != vp_schedule(7, final_time=0.1)
    assert hash(schedule) == hash(vp_schedule(7))


def test_ratios_are_the_nearest_fractions_of_squared_widths() -> None:
    schedule = vp_schedule(40)
    numerators, denominators = schedule.ratios.tolist()
    assert len(numerators) == 41 and max(denominators) <= 1024
    for i in range(1, 40):
        wanted = Fraction((schedule.width(i) / schedule.width(i + 1)) ** 2).limit_denominator(1024)
        assert (numerators[i], denominators[i]) == wanted.as_integer_ratio()


@settings(max_examples=300)
@given(st.floats(0, 50), st.integers(1, 1024))
@example(0.6 / 3, 1024)  # their inverses round to whole numbers
@example(1.4 - 0.6, 1024)
@example(0.3 / 3, 3)
def test_nearest_is_the_best_fraction(x: float, limit: int) -> None:
    n, m = nearest(x, limit)
    best = Fraction(x).limit_denominator(limit)
    assert 1 <= m <= limit and abs(Fraction(n, m) - Fraction(x)) <= abs(best - Fraction(x)) + Fraction(1e-16)


def test_levels_of_any_widths_make_a_schedule() -> None:
    Schedule((0.0, 1.0, 2.0), (1.0,) * 3, (0.0, 80.0, 80.00000001))
    assert nearest(2.0**62) == (2**60, 1)  # int64 holds no larger factor
    schedule = pickle.loads(pickle.dumps(vp_schedule(7)))
    assert schedule == vp_schedule(7) and hash(schedule) == hash(vp_schedule(7))


def test_vp_time_undoes_vp_alpha_sigma() -> None:
    times = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = vp_alpha_sigma(times)
    torch.testing.assert_close(vp_time(sigma / alpha), times, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_vp_time_of_any_ratio_is_the_formula(dtype: torch.dtype) -> None:
    """The square overflows from some ratio on; there l = ln(1 + ratio²) is 2·ln(ratio)."""
    info = torch.finfo(dtype)
    edge = math.sqrt(info.max)
    ratios = [0.0, 1.0, *(share * edge for share in (0.3, 0.49, 0.51, 0.99, 1.01, 100.0)), info.max]
    given = torch.tensor(ratios, dtype=torch.float64).to(dtype).requires_grad_()
    times = vp_time(given)
    (slopes,) = torch.autograd.grad(times.sum(), given)
    assert times.dtype == dtype and slopes.isfinite().all()
    for ratio, time in zip(given.tolist(), times.tolist(), strict=True):
        doubled = math.log1p(ratio * ratio) if ratio < 1e100 else 2 * math.log(ratio)
        expected = 2 * doubled / (0.1 + math.sqrt(0.01 + 2 * 19.9 * doubled))
        assert time == pytest.approx(expected, rel=4 * info.eps)
    assert vp_time(1e200).item() == pytest.approx(9.6161, rel=1e-4)


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_karras_levels_are_uniform_in_the_power(rho: float) -> None:
    sigmas = karras_levels(40, rho=rho)
    assert sigmas.dtype == torch.float64 and sigmas[0] == 0.002 and sigmas[-1] == 80.0
    powers = sigmas ** (1 / rho)
    torch.testing.assert_close(powers.diff(), powers.diff().mean().expand(39), rtol=1e-10, atol=0)


def test_karras_middle_by_hand() -> None:
    middle = ((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7
    assert karras_levels(3)[1].item() == pytest.approx(middle, rel=1e-14)
    assert karras_levels(1).tolist() == [80.0]
    assert karras_levels(3, t_min=0.0, t_max=1.0, rho=1.0).tolist() == [0.0, 0.5, 1.0]
    assert karras_schedule(2, t_min=0.0, final_sigma=None).sigma[0] == 0.0


def test_karras_schedule_counts_steps_with_and_without_an_end() -> None:
    to_zero, within = karras_schedule(18), karras_schedule(18, final_sigma=None)
    assert to_zero.steps == within.steps == 18
    assert to_zero.sigma[:2] == (0.0, 0.002) and within.sigma[0] == 0.002
    assert to_zero.sigma[-1] == within.sigma[-1] == 80.0
    assert to_zero.times == to_zero.sigma and set(to_zero.alpha) == {1.0}


def test_two_forms_describe_one_trajectory() -> None:
    schedule = vp_schedule(20)
    ve = to_ve(schedule)
    again = to_vp(ve)
    assert again.times == schedule.times
    for one, other in ((again.alpha, schedule.alpha), (again.sigma, schedule.sigma)):
        assert one == pytest.approx(other, rel=1e-13)

    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha = dict(zip(schedule.times, schedule.alpha, strict=True))

    def model(z: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z + times[:, None])

    def model_of_ve(z: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return model(z * alpha[times[0].item()], times)

    end = ddim_sample(model_of_ve, z / schedule.alpha[-1], ve)
    torch.testing.assert_close(end * schedule.alpha[0], ddim_sample(model, z, schedule), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"times": (0.0,), "alpha": (1.0,), "sigma": (0.0,)}, "length"),
        ({"times": (0.0, 1.0), "alpha": (1.0, 0.5), "sigma": (0.0,)}, "length"),
        ({"times": (0.0, 1.0), "alpha": (1.0, 0.0), "sigma": (0.0, 1.0)}, "alpha"),
        ({"times": (0.0, 1.0), "alpha": (1.0, 0.5), "sigma": (-0.1, 1.0)}, "sigma"),
        ({"times": (0.0, 1.0), "alpha": (1.0, 1.0), "sigma": (0.5, 0.5)}, "grow"),
        ({"times": (0.0, 1.0), "alpha": (1.0, 0.5), "sigma": (0.0, math.inf)}, "finite"),
        ({"times": (0, 0.5, 1), "alpha": (1, 0.7, 0), "sigma": (0, 0.7, 1)}, "0.0 at index 2; let the times end"),
        ({"times": (0, 0.5, 1), "alpha": (1, math.nan, 0.1), "sigma": (0, 0.7, 1)}, "nan at index 1$"),
        ({"times": (0, 0.5, 1), "alpha": (0.1, 0.7, 1), "sigma": (1, 0.7, 0)}, "10.0 at index 0 .*; index 0 is data"),
        ({"times": (0, 0.5, 1), "alpha": (1, 1, 1), "sigma": (0, 2, 1)}, "2.0 at index 1 and 1.0 at 2$"),
    ],
)
def test_bad_schedules_are_refused(arguments: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vp_time(-1.0), r"ratio: expected values finite and at least 0, got -1\.0"),
        (lambda: vp_time([1.0, math.inf]), "ratio: .* got inf"),
        (lambda: vp_alpha_sigma(2.0), r"times: expected values in \[0, 1\], got 2\.0"),
        (lambda: vp_alpha_sigma([0.5, math.nan]), "times: .* got nan"),
        (lambda: to_vp(flow_schedule(2)), "schedule: expected alpha > 0, got alpha = 0 at index 2"),
        (lambda: to_ve(flow_schedule(2)), "schedule: expected alpha > 0, got alpha = 0 at index 2"),
    ],
)
def test_values_out_of_range_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_are_levels_in_a_graph_too() -> None:
    def levels(x: torch.Tensor) -> torch.Tensor:
        return x + vp_alpha_sigma(0.25)[0] + vp_time(3.0)

    compiled = torch.compile(levels, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), levels(torch.zeros(2)))


def test_levels_of_numbers_and_sequences_are_those_of_float64_tensors() -> None:
    times = [0.0, 0.25, 1.0]
    expected = vp_alpha_sigma(torch.tensor(times, dtype=torch.float64))
    assert all(torch.equal(x, y) for x, y in zip(vp_alpha_sigma(times), expected, strict=True))
    assert all(torch.equal(x, y[1]) for x, y in zip(vp_alpha_sigma(0.25), expected, strict=True))
    assert vp_time(expected[1][1].item() / expected[0][1].item()).item() == pytest.approx(0.25)


@pytest.mark.parametrize("wrong", ["a", None, [0.0, "b"]])
def test_times_that_are_no_numbers_are_refused_by_name(wrong: object) -> None:
    with pytest.raises(TypeError, match="times: expected a tensor, a number or a sequence"):
        vp_alpha_sigma(wrong)
    with pytest.raises(TypeError, match="ratio: expected a tensor"):
        vp_time(wrong)


@pytest.mark.parametrize(
    ("steps", "final_time", "name"), [(0, 0.0, "steps"), (5, 1.0, "final_time"), (5, -0.1, "final_time")]
)
def test_bad_vp_grids_are_refused(steps: int, final_time: float, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        vp_schedule(steps, final_time=final_time)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 3, "t_min": 0.0}, "t_min"),
        ({"steps": 3, "t_min": 2.0, "t_max": 1.0}, "t_max"),
        ({"steps": 3, "rho": 0.0}, "rho"),
        ({"steps": 3, "final_sigma": 0.002}, "final_sigma"),
    ],
)
def test_bad_karras_grids_are_refused(arguments: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        karras_schedule(**arguments)
