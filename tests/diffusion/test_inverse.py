"""Inverse solvers against their formulas written plainly, against closed forms, and alone as in a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import ConsistencySchedule, Preconditioned, karras_schedule, vp_schedule
from bicm_diffusion.inverse import (
    cm_inversion_sample,
    cm_posterior_sample,
    dps_sample,
    freedom_sample,
    lgd_sample,
)
from bicm_diffusion.inverse.distances import cross_entropy
from tests.support.closed_forms import noise
from tests.support.inverse_problems import (
    LEVELS,
    SCHEDULE,
    SOLVERS,
    STD,
    clean,
    extras,
    jump,
    operator,
    plain,
    plain_inversion,
    problem,
    wide,
)


@pytest.mark.parametrize("process", ["ve", "vp"])
@pytest.mark.parametrize("name", SOLVERS)
def test_is_the_algorithm(name: str, process: str) -> None:
    schedule = SCHEDULE if process == "ve" else vp_schedule(6, final_time=0.0)
    ratio = dict(zip(schedule.times, (s / a for s, a in zip(schedule.sigma, schedule.alpha, strict=True)), strict=True))
    scale = dict(zip(schedule.times, schedule.alpha, strict=True))

    def model(z: Tensor, times: Tensor) -> Tensor:
        time = min(ratio, key=lambda t: abs(t - times[0].item()))
        return clean(z / scale[time], torch.full_like(times, ratio[time]))

    z = schedule.sigma[-1] * noise(4, 3, 5)
    given = problem()
    found = SOLVERS[name][0](model, z, schedule, prediction="x0", **extras(name), **given)
    # In float64 the two differ by roundings of sums of some tens of terms of the state's size.
    torch.testing.assert_close(found, plain(name, z, given["y"], schedule), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_raw_network_gives_what_its_denoised_sample_gives(name: str) -> None:
    def raw(scaled: Tensor, times: Tensor) -> Tensor:
        sigma = wide(times, scaled)
        x = scaled * (STD**2 + sigma**2).sqrt()
        c_skip, c_out = STD**2 / (STD**2 + sigma**2), STD * sigma / (STD**2 + sigma**2).sqrt()
        return (clean(x, times) - c_skip * x) / c_out

    z, solve = 10.0 * noise(4, 3, 5), SOLVERS[name][0]
    expected = solve(clean, z, SCHEDULE, prediction="x0", **extras(name), **problem())
    found = solve(raw, z, SCHEDULE, prediction=Preconditioned(), **extras(name), **problem())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_guidance_and_noise_prediction_reach_the_gradient() -> None:
    def pair(z: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        eps = (z - clean(z, times)) / wide(times, z)
        return 0.5 * eps, eps

    z = 10.0 * noise(4, 3, 5)
    expected = dps_sample(clean, z, SCHEDULE, prediction="x0", **problem())
    found = dps_sample(pair, z, SCHEDULE, guidance_scale=1.0, **problem())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_cm_inversion_is_the_algorithm() -> None:
    z, given = 10.0 * noise(4, 3, 5), problem()
    del given["scale"]
    found = cm_inversion_sample(
        jump, z, LEVELS, iterations=3, rate=lambda t: 0.2 * (t + 0.5), tau=0.1, parameterization="x0", **given
    )
    x = plain_inversion(z, given["y"])
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["bcm", "cm"])
def test_cm_inversion_of_a_raw_network(form: Any) -> None:
    """f(x, t) = c_skip·x + c_out·F with F = 0 is a network whose clean sample is known."""
    seen: list[int] = []

    def zero(x: Tensor, *times: Tensor) -> Tensor:
        seen.append(len(times))
        return 0.0 * x

    z, y = 2.0 * noise(4, 3), noise(4, 3, seed=1)
    found = cm_inversion_sample(
        zero, z, ConsistencySchedule((2.0,)), iterations=1, rate=0.5, parameterization=form, operator=lambda x: x, y=y,
        distance="half_squared",
    )  # fmt: skip
    end, t = 0.002, 2.0
    skip = (0.25 + t * end) / (0.25 + t**2) if form == "bcm" else 0.25 / (0.25 + (t - end) ** 2)
    torch.testing.assert_close(found, skip * (z - 0.5 * skip * (skip * z - y)), rtol=1e-13, atol=1e-13)
    assert set(seen) == {2 if form == "bcm" else 1}


def downsampled(x0: Tensor) -> Tensor:
    return (x0[..., ::2, ::2] + x0[..., 1::2, 1::2]) * 0.5


DISTANCES: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "norm": (downsampled, lambda n: noise(n, 3, 4, 4, dtype=torch.float32, seed=1)),
    "half_squared": (downsampled, lambda n: noise(n, 3, 4, 4, dtype=torch.float32, seed=1)),
    "mse": (downsampled, lambda n: noise(n, 3, 4, 4, dtype=torch.float32, seed=1)),
    "cross_entropy": (lambda x0: x0, lambda n: (noise(n, 8, 8, seed=1) > 0).long()),
    "a function": (downsampled, lambda n: noise(n, 3, 4, 4, dtype=torch.float32, seed=1)),
}


def farthest(prediction: Tensor, y: Tensor) -> Tensor:
    return (prediction - y).abs().flatten(1).amax(1)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", [*SOLVERS, "cm inversion"])
def test_a_sample_is_the_same_bits_alone_and_among_16(name: str, distance: str, threads: Any) -> None:
    measure, measurements = DISTANCES[distance]
    z, y = 10.0 * noise(16, 3, 8, 8, dtype=torch.float32), measurements(16)

    def solve(chosen: slice, first: int) -> Tensor:
        given: dict[str, Any] = {"operator": measure, "y": y[chosen], "sample_id": first}
        given["distance"] = farthest if distance == "a function" else distance
        if name == "cm inversion":
            more: dict[str, Any] = {"iterations": 2, "tau": 0.1, "parameterization": "x0"}
            return cm_inversion_sample(jump, z[chosen], LEVELS, **more, **given)
        schedule = karras_schedule(3, t_min=0.05, t_max=10.0)
        return SOLVERS[name][0](clean, z[chosen], schedule, prediction="x0", **extras(name), **given)

    with threads(2):
        together = solve(slice(0, 16), 0)
        for k in (0, 7):
            assert torch.equal(solve(slice(k, k + 1), k)[0], together[k])
    assert together.isfinite().all()


def test_cross_entropy_is_the_mean_over_positions_of_any_batch() -> None:
    logits, classes = noise(4, 3, 5, 2), (noise(4, 5, 2, seed=1) > 0).long()
    expected = torch.nn.functional.cross_entropy(logits, classes, reduction="none").mean((1, 2))
    torch.testing.assert_close(cross_entropy(logits, classes), expected)
    for rows in (slice(0), slice(1)):
        some = logits[rows].clone().requires_grad_()
        found = cross_entropy(some, classes[rows])
        found.sum().backward()
        assert found.shape == (len(some),) and some.grad is not None and some.grad.shape == some.shape
    empty = dps_sample(
        lambda z, t: z, logits[:0], SCHEDULE, operator=lambda x: x, y=classes[:0], distance="cross_entropy"
    )
    assert empty.shape == (0, 3, 5, 2)


def test_one_repeat_is_dps() -> None:
    z = 10.0 * noise(4, 3, 5)
    once = freedom_sample(clean, z, SCHEDULE, prediction="x0", repeats=1, **problem())
    assert torch.equal(once, dps_sample(clean, z, SCHEDULE, prediction="x0", **problem()))


def test_a_step_size_may_depend_on_levels_and_samples() -> None:
    z, seen = 10.0 * noise(4, 3, 5), []
    sizes = torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64)

    def scale(sigma: float, below: float) -> Tensor:
        seen.append((sigma, below))
        return sizes

    given = {**problem(), "scale": scale}
    found = dps_sample(clean, z, SCHEDULE, prediction="x0", **given)
    assert seen == [(SCHEDULE.sigma[i], SCHEDULE.sigma[i - 1]) for i in range(6, 0, -1)]
    for k, size in enumerate(sizes.tolist()):
        whole = dps_sample(clean, z, SCHEDULE, prediction="x0", **{**given, "scale": size})
        assert torch.equal(whole[k], found[k])


def test_a_residual_of_zero_moves_nothing() -> None:
    z = 10.0 * noise(4, 3)
    given: dict[str, Any] = {"operator": lambda x0: 0.0 * x0, "y": torch.zeros(4, 3, dtype=torch.float64)}
    for name, (solve, _) in SOLVERS.items():
        pushed = solve(clean, z, SCHEDULE, prediction="x0", scale=5.0, **extras(name), **given)
        still = solve(clean, z, SCHEDULE, prediction="x0", scale=0.0, **extras(name), **given)
        assert pushed.isfinite().all() and torch.equal(pushed, still)


def test_nothing_is_left_to_differentiate() -> None:
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    z = (10.0 * noise(4, 3, 5)).requires_grad_()
    for name, (solve, _) in SOLVERS.items():
        found = solve(lambda z, t: weight * clean(z, t), z, SCHEDULE, prediction="x0", **extras(name), **problem())
        assert not found.requires_grad and z.grad is None and weight.grad is None


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no operator": ({"operator": None}, "operator: expected a function or module, got None"),
    "no y": ({"y": None}, "y: expected a tensor"),
    "another batch": ({"y": torch.zeros(3, 2, 5)}, "y: expected one measurement per sample"),
    "another shape": ({"y": torch.zeros(4, 2, 4)}, r"y: expected the shape of operator\(x0\), \(4, 2, 5\)"),
    "unknown distance": ({"distance": "l1"}, "distance: expected 'norm', .* got 'l1'"),
    "distance over the batch": ({"distance": lambda p, y: p.sum()}, "distance: expected one number per sample"),
    "no derivative": ({"operator": lambda x0: x0[:, :2].detach()}, "expected functions that torch differentiates"),
    "step size": ({"scale": "large"}, "scale: expected a number or a tensor or a function of noise levels"),
    "misspelt": ({"operater": operator}, "did you mean 'operator'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_calls_name_the_argument(kind: str) -> None:
    wrong, message = WRONG[kind]
    with pytest.raises((TypeError, ValueError), match=message):
        dps_sample(clean, 10.0 * noise(4, 3, 5), SCHEDULE, prediction="x0", **{**problem(), **wrong})


@pytest.mark.parametrize(
    ("solve", "wrong", "message"),
    [
        (lgd_sample, {"draws": 0}, "draws: expected at least 1"),
        (lgd_sample, {"radius": -1.0}, "radius: expected a value of at least 0"),
        (freedom_sample, {"repeats": 1.5}, "repeats: expected an integer"),
        (freedom_sample, {"repeat_range": 3.0}, "repeat_range: expected a pair"),
        (cm_posterior_sample, {"consistency_model": jump, "parameterization": "edm"}, "parameterization: expected one"),
        (cm_posterior_sample, {"consistency_model": None}, "consistency_model: expected a function"),
    ],
)
def test_wrong_options_of_one_solver(solve: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        solve(clean, 10.0 * noise(4, 3, 5), SCHEDULE, prediction="x0", **problem(), **wrong)
