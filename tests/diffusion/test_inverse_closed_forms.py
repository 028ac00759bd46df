"""Inverse problems whose answers are known: a Gaussian prior with a linear operator, and two Diracs with a square."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import ConsistencySchedule, Schedule, karras_schedule
from bicm_diffusion.inverse import (
    Blur,
    Downsample,
    Mask,
    cm_inversion_sample,
    cm_posterior_sample,
    dps_sample,
    gaussian_weights,
    mpgd_sample,
)
from bicm_kernels import normal
from tests.support.closed_forms import noise

STD, COUNT = 0.5, 2000
#: Standard errors beyond which one of some tens of estimates lies with odds below 1e-7.
ERRORS = 6.0


def shrink(t: Tensor) -> Tensor:
    return (STD**2 / (STD**2 + t**2))[:, None]


def gaussian(z: Tensor, times: Tensor) -> Tensor:
    """The posterior mean of the prior N(0, STD²)."""
    return shrink(times) * z


def test_the_conditional_chain_ends_on_the_measurement_with_the_conditional_covariance() -> None:
    """Theorem 3.1: with the mean under the condition, Dy = D + Aᵀ(AAᵀ)⁻¹(y - AD), Ax = y and cov = s²(I - P)."""
    A = torch.tensor([[1.0, 2.0, 0.0, -1.0], [0.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    inverse = A.T @ torch.linalg.inv(A @ A.T)
    y = torch.tensor([[0.3, -0.2]], dtype=torch.float64).expand(COUNT, 2)

    def conditional(z: Tensor, times: Tensor) -> Tensor:
        mean = gaussian(z, times)
        return mean + (y - mean @ A.T) @ inverse.T

    schedule = karras_schedule(300, t_min=0.002, t_max=20.0)
    z = 20.0 * normal((COUNT, 4), seed=1, dtype=torch.float64)
    x = dps_sample(conditional, z, schedule, prediction="x0", operator=lambda x0: x0 @ A.T, y=y, scale=0.0)
    assert (x @ A.T - y).abs().max() < 1e-12
    # A chain of 300 steps loses some variance; how much is a recursion of numbers.
    variance = 400.0
    for i in range(300, 0, -1):
        sigma, below = schedule.sigma[i], schedule.sigma[i - 1]
        ratio, c = (below / sigma) ** 2, STD**2 / (STD**2 + sigma**2)
        variance = (ratio + (1 - ratio) * c) ** 2 * variance + below**2 * (1 - ratio)
    assert 0.9 < variance / STD**2 < 1.0
    free = torch.eye(4, dtype=torch.float64) - inverse @ A
    # The standard error of a covariance is at most √(2/n) of the variance.
    assert (torch.cov(x.T) - variance * free).abs().max() < ERRORS * math.sqrt(2.0 / COUNT) * variance
    centre = inverse @ y[0]
    assert (x.mean(0) - centre).abs().max() < ERRORS * math.sqrt(variance / COUNT)


def recursion(name: str, schedule: Any, y: float, scale: float) -> tuple[float, float]:
    """Mean and variance of an element after a solver on the Gaussian prior, A = a mask, ½‖r‖²: all is linear."""
    mean, variance = 0.0, schedule.sigma[-1] ** 2
    for i in range(schedule.steps, 0, -1):
        sigma, below = schedule.sigma[i], schedule.sigma[i - 1]
        ratio, c = (below / sigma) ** 2, STD**2 / (STD**2 + sigma**2)
        f = math.sqrt(c) if name == "cm posterior" else c
        inner, outer = ((1 - ratio), 1.0) if name == "mpgd" else (1.0, f)
        # x' = ratio·x + (1 - ratio)·c·x - inner·outer·(f·x - y)·scale
        factor = ratio + (1 - ratio) * c - scale * inner * outer * f
        mean = factor * mean + scale * inner * outer * y
        variance = factor**2 * variance + below**2 * (1 - ratio)
    return mean, variance


def consistent(x: Tensor, t: Tensor) -> Tensor:
    """f(x, t) of the Gaussian: the probability flow's end."""
    return shrink(t).sqrt() * x


@pytest.mark.parametrize("scale", [1.0, 0.03])
@pytest.mark.parametrize("name", ["dps", "mpgd", "cm posterior"])
def test_means_of_the_solvers_on_a_gaussian(name: str, scale: float, record_property: Any) -> None:
    """The posterior of the seen element is y itself; the solvers differ by a known bias, which is recorded."""
    solve: Any = {"dps": dps_sample, "mpgd": mpgd_sample, "cm posterior": cm_posterior_sample}[name]
    more: Any = {"consistency_model": consistent, "parameterization": "x0"} if name == "cm posterior" else {}
    schedule = karras_schedule(50, t_min=0.002, t_max=20.0)
    z, target = 20.0 * normal((COUNT, 2), seed=1, dtype=torch.float64), 0.7
    y = torch.tensor([[target, 0.0]], dtype=torch.float64).expand(COUNT, 2)
    given: Any = {
        "operator": Mask(torch.tensor([True, False])),
        "y": y,
        "distance": "half_squared",
        "scale": scale,
        **more,
    }
    x = solve(gaussian, z, schedule, prediction="x0", **given)
    for element, seen in enumerate((True, False)):
        mean, variance = recursion(name, schedule, target, scale * seen)
        assert abs(x[:, element].mean() - mean) < ERRORS * math.sqrt(variance / COUNT) + 1e-12
        assert abs(x[:, element].var() - variance) < ERRORS * math.sqrt(2.0 / COUNT) * variance + 1e-12
        bias = mean - (target if seen else 0.0)
        record_property(f"bias of element {element}", bias)
        print(f"{name}, ζ = {scale}, element {element}: bias {bias:.2e}, std {variance**0.5:.4f}")
    if scale == 1.0:  # 1/λ_max(AAᵀ), the natural size
        assert abs(x[:, 0].mean() - target) < 0.01 * target


def test_two_diracs_and_a_square() -> None:
    """Corollary 3.3's converse: prior ±a, A(x) = x², y = a². The posterior mean violates A, f fulfils it."""
    a = 0.8

    def mean(x: Tensor, t: Tensor) -> Tensor:
        return a * torch.tanh(a * x / t[:, None] ** 2)

    def flow(x: Tensor, t: Tensor) -> Tensor:
        # The probability flow ends on the Dirac of x's sign; 0·x is its derivative.
        return a * torch.where(x >= 0, torch.ones_like(x), -torch.ones_like(x)) + 0 * x

    x, t = 1.0 * noise(COUNT, 1), torch.full((COUNT,), 1.0, dtype=torch.float64)
    y = torch.full((COUNT, 1), a**2, dtype=torch.float64)
    assert (flow(x, t) ** 2 - y).abs().max() < 1e-15
    # tanh² averages to less than 1: at σ = 1 the mean's violation is most of y.
    assert (y - mean(x, t) ** 2).mean() > a**2 / 2
    found = cm_inversion_sample(
        flow,
        10.0 * x,
        ConsistencySchedule((10.0, 1.0)),
        iterations=2,
        parameterization="x0",
        operator=torch.square,
        y=y,
    )
    assert (found**2 - y).abs().max() < 1e-15 and 0.4 < (found > 0).double().mean() < 0.6
    # The distance at the mean pushes a state at 0.1 away from where it is, the distance at f does not move it.
    schedule, start = Schedule((0.0, 1.0), (1.0, 1.0), (0.0, 1.0)), torch.full((1, 1), 0.1, dtype=torch.float64)
    given: dict[str, Any] = {"prediction": "x0", "operator": torch.square, "y": y[:1], "distance": "half_squared"}
    pushed = dps_sample(mean, start, schedule, **given)
    still = cm_posterior_sample(mean, start, schedule, consistency_model=flow, parameterization="x0", **given)
    assert torch.equal(still, mean(start, t[:1])) and (pushed - still).abs() > 1e-2


OPERATORS: dict[str, Any] = {
    "down-sampling": Downsample(2),
    "down-sampling by 3": Downsample(3),
    "mask": Mask(noise(6, 12, seed=5) > 0),
    "blur": Blur((0.1, 0.2, 0.3, 0.15, 0.05)),
    "gaussian": Blur(gaussian_weights(1.0, 3)),
}
SHAPES = {"down-sampling": (3, 6), "down-sampling by 3": (2, 4)}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_and_their_adjoints(name: str) -> None:
    A, x = OPERATORS[name], noise(4, 3, 6, 12)
    y = noise(*A(x).shape, seed=1)
    assert A(x).shape == (4, 3, *SHAPES.get(name, (6, 12)))
    # ⟨Ax, y⟩ = ⟨x, Aᵀy⟩, and what torch differentiates is Aᵀ too.
    torch.testing.assert_close((A(x) * y).sum(), (x * A.adjoint(y)).sum(), rtol=1e-12, atol=1e-12)
    state = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(A(state), state, y)
    torch.testing.assert_close(found, A.adjoint(y), rtol=1e-12, atol=1e-12)
    assert torch.equal(A(x[1:2])[0], A(x)[1])


def test_down_sampling_and_blur_are_torch_s() -> None:
    x = noise(2, 1, 6, 12)
    torch.testing.assert_close(Downsample(2)(x), torch.nn.functional.avg_pool2d(x, 2), rtol=1e-12, atol=1e-12)
    w = torch.tensor(OPERATORS["blur"].weights, dtype=torch.float64)
    plane = torch.nn.functional.conv2d(x, torch.outer(w, w)[None, None], padding=2)
    torch.testing.assert_close(OPERATORS["blur"](x), plane, rtol=1e-12, atol=1e-12)


def test_operators_refuse_what_they_cannot_take() -> None:
    with pytest.raises(ValueError, match=r"x0: expected .* multiples of 2, got shape"):
        Downsample(2)(torch.ones(1, 1, 3, 4))
    with pytest.raises(TypeError, match="mask: expected a bool tensor"):
        Mask(torch.ones(2))
    with pytest.raises(ValueError, match="weights: expected an odd number"):
        Blur((0.5, 0.5))
