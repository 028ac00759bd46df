"""Objectives on N(0, S²), where flows, losses, Theorem 1's limits and GC's fixed point are known (spec: GC eq. 90)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.integrate import quad, solve_ivp
from torch import Tensor

from bicm_diffusion import Levels, bct_loss, karras_levels
from bicm_diffusion.objectives import cd_loss, gc_loss, ict_loss
from bicm_kernels import normal
from tests.support.plain_objectives import S, exact_flow, gaussian_expectation

COUNT = 400_000
T_MIN = 0.002
KEY: dict[str, Any] = {"seed": 5, "step": 3}
#: E|n| of a standard normal, and its standard deviation.
MEAN, SPREAD = math.sqrt(2 / math.pi), math.sqrt(1 - 2 / math.pi)
#: So large a c makes the pseudo-Huber distance ‖r‖²/(2c), to 1e-12.
SQUARED = 1e6


def q(t: float) -> float:
    """The exact flow to 0 of N(0, S²)."""
    return S / math.sqrt(S * S + t * t)


def linear(k: Callable[[Tensor], Tensor], *, end: float = T_MIN) -> Callable[..., Tensor]:
    """The one-time network with which f of "cm" is f(x, t) = k(t)·x."""

    def answer(scaled: Tensor, t: Tensor) -> Tensor:
        root = (S * S + t * t).sqrt()
        skip, out = S * S / (S * S + (t - end) ** 2), S * (t - end) / root
        return ((k(t) - skip) / out * root)[:, None] * scaled

    return answer


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    return x * (S * S / (S * S + t * t))[:, None]


def data(count: int, width: int = 1, seed: int = 11) -> Tensor:
    return S * normal((count, width), seed=seed, dtype=torch.float64)


def full(*levels: float, count: int = COUNT) -> list[Tensor]:
    return [torch.full((count,), t, dtype=torch.float64) for t in levels]


def check_mean(value: Tensor, expected: float, spread: float, count: int = COUNT) -> None:
    """Four standard errors of a mean of `count` numbers of this standard deviation."""
    assert abs(value.item() - expected) < 4 * spread / math.sqrt(count)


@pytest.mark.parametrize("teacher", [1.0, 0.0])
def test_cd_loss(teacher: float) -> None:
    """f = q(t)·x, and x_n = α·x_{n+1}: E|(q_{n+1} - q_n·α)·x_{n+1}|, by the true denoiser and by one that says 0."""
    low, high = 0.4, 0.9
    alpha = low / high + (1 - low / high) * teacher * S * S / (S * S + high * high)
    x, levels = data(COUNT), full(low, high)
    flow = exact_flow("cm")
    loss = cd_loss(flow, x, levels, denoiser=lambda x, t: teacher * denoiser(x, t), parameterization="cm", c=0.0, **KEY)
    scale = abs(q(high) - q(low) * alpha) * math.sqrt(S * S + high * high) / (high - low)
    check_mean(loss.total, MEAN * scale, SPREAD * scale)
    independent = ict_loss(flow, x, levels, parameterization="cm", c=0.0, **KEY).total
    assert teacher == 0 or loss.total < independent / 3


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_gc_loss(mu: float) -> None:
    """A mixture of two half-normals: x̃ = p·x + (p·t + t)·z where x̂ took the place of x."""
    low, high = 0.4, 0.9
    loss = gc_loss(exact_flow("cm"), data(COUNT), full(low, high), mu=mu, parameterization="cm", c=0.0, **KEY)

    def deviation(p: float, pt: float) -> float:
        """The standard deviation of q'·x̃' - q·x̃ for x̂ = p·x + pt·z."""
        of_data, of_noise = p * (q(high) - q(low)), q(high) * (pt + high) - q(low) * (pt + low)
        return math.hypot(S * of_data, of_noise) / (high - low)

    ours, theirs = deviation(q(low), q(low) * low), deviation(1.0, 0.0)
    expected = MEAN * (mu * ours + (1 - mu) * theirs)
    check_mean(loss.total, expected, math.sqrt(mu * ours**2 + (1 - mu) * theirs**2 - expected**2))
    assert mu > 0 or theirs * (high - low) * MEAN == pytest.approx(gaussian_expectation(low, high), rel=1e-12)


def test_bct_loss_of_the_exact_flow() -> None:
    """f(x, t, u) = √((S² + u²)/(S² + t²))·x: leaps compose, and iCT's term is what is left."""

    def flow(scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        s = S * S + t * t
        skip, out = (S * S + t * u) / s, S * (t - u) / s.sqrt()
        return ((((S * S + u * u) / s).sqrt() - skip) / out * s.sqrt())[:, None] * scaled

    low, high, partner = 0.4, 0.9, 2.5
    loss = bct_loss(flow, data(COUNT), Levels(*full(low, high, partner)), c=0.0, **KEY)
    end = math.hypot(S, T_MIN) / S
    expected = gaussian_expectation(low, high) / (high - low) * end
    check_mean(loss.consistency, expected, expected * SPREAD / MEAN)
    assert loss.trajectory < 1e-12


@pytest.mark.parametrize("partner", [0.1, 2.5])
def test_bct_loss_of_leaps_that_do_not_compose(partner: float) -> None:
    """F = 0: f(x, t, u) = h(t, u)·x, h = (S² + t·u)/(S² + t²), so that both terms are half-normal."""

    def h(t: float, u: float) -> float:
        return (S * S + t * u) / (S * S + t * t)

    low, high = 0.4, 0.9
    loss = bct_loss(lambda x, t, u: 0 * x, data(COUNT), Levels(*full(low, high, partner)), c=0.0, **KEY)
    upper, lower = h(high, T_MIN), h(low, T_MIN)
    consistency = math.hypot(S * (upper - lower), upper * high - lower * low) / (high - low)
    leap = abs(h(low, partner) * h(partner, T_MIN) - lower) * math.hypot(S, low) / abs(low - partner)
    check_mean(loss.consistency, MEAN * consistency, SPREAD * consistency)
    check_mean(loss.trajectory, MEAN * leap, SPREAD * leap)


@pytest.mark.parametrize(
    ("end", "exact", "limits"),
    [(2.0, True, (0.77930, 0.78048, 0.78055, 0.78056)), (3.0, False, (2.0209, 2.0866, 2.1030, 2.1085))],
)
def test_theorem_1(end: float, exact: bool, limits: tuple[float, ...]) -> None:
    """N²(L_CT - L_CD) → T∫k²S²/(S² + t²)dt with λ = 1 and the squared distance, k = q or 1, at equal steps from 0."""

    def k(t: Tensor) -> Tensor:
        return S / (S * S + t * t).sqrt() if exact else torch.ones_like(t)

    integral = end * quad(lambda t: (q(t) ** 2 if exact else 1.0) * S * S / (S * S + t * t), 0, end)[0]
    assert integral == pytest.approx(limits[-1], abs=1e-4)
    rounds, copies = 16, 25_600
    for n, expected in zip((50, 200, 800), limits, strict=False):
        edges = torch.linspace(0.0, end, n + 1, dtype=torch.float64).repeat_interleave(copies // n)
        levels = edges[: -(copies // n)], edges[copies // n :]
        options: dict[str, Any] = {"parameterization": "cm", "c": SQUARED, "t_min": 0.0}
        network = linear(k, end=0.0)
        found = []
        for step in range(rounds):
            x, key = data(copies, seed=step), {"seed": 5, "step": step}
            independent = ict_loss(network, x, levels, **options, **key).total
            distilled = cd_loss(network, x, levels, denoiser=denoiser, **options, **key).total
            # The weight 1/(t_{n+1} - t_n) is one number here, and ‖r‖² is 2c times the distance.
            found.append(n * n * (independent - distilled).item() * 2 * SQUARED * end / n)
        mean, error = _mean_and_error(found)
        assert abs(mean - expected) < 4 * error < 0.05 * expected


def _finite(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda scaled, t: network(scaled, t).nan_to_num(0.0, 0.0, 0.0)


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    found = torch.tensor(values, dtype=torch.float64)
    return found.mean().item(), found.std().item() / math.sqrt(len(values))


def fixed_point(mu: float, online: bool) -> Any:
    """k(t) by its differential equation: k' = -k[μ(pt + t) + (1-μ)t]/[μ((pS)² + (pt + t)²) + (1-μ)(S² + t²)]."""

    def slope(t: float, k: Any) -> Any:
        p = k if online else q(t)
        of_noise = p * t + t
        return -k * (mu * of_noise + (1 - mu) * t) / (mu * ((p * S) ** 2 + of_noise**2) + (1 - mu) * (S * S + t * t))

    return solve_ivp(slope, (T_MIN, 80.0), [1.0], rtol=1e-10, atol=1e-12, dense_output=True).sol


def recursion(mu: float, online: bool, levels: Tensor) -> Tensor:
    """k of N levels, each the least squares of k_{n+1}·x̃_{n+1} to k_n·x̃_n in the two couplings' moments."""
    found, levels = [1.0], levels.tolist()
    for low, high in pairwise(levels):
        p = found[-1] if online else q(low)
        lower, upper = p * low + low, p * low + high
        both = mu * ((p * S) ** 2 + lower * upper) + (1 - mu) * (S * S + low * high)
        found.append(found[-1] * both / (mu * ((p * S) ** 2 + upper**2) + (1 - mu) * (S * S + high**2)))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_the_recursion_tends_to_the_differential_equation(mu: float, online: bool) -> None:
    """To first order in 1/N: twice the levels, half the error, to 3 %; and 1e-4 by what both say together."""
    levels = karras_levels(4001)
    expected = torch.from_numpy(fixed_point(mu, online)(levels[::4].numpy())[0])
    coarse, fine = recursion(mu, online, levels[::2])[::2], recursion(mu, online, levels)[::4]
    assert (fine - expected).abs().max() / (coarse - expected).abs().max() == pytest.approx(0.5, abs=0.015)
    assert (2 * fine - coarse - expected).abs().max() < 1e-4 * expected[0]


@pytest.mark.parametrize(("mu", "ratio"), [(0.0, 1.0), (0.3, 1.089), (0.5, 1.141), (0.7, 1.187), (1.0, 1.249)])
def test_the_fixed_point_s_table(mu: float, ratio: float) -> None:
    """GC makes samples of too large a deviation even with a perfect predictor."""
    assert fixed_point(mu, False)(80.0)[0] * 80 / S == pytest.approx(ratio, abs=1e-3)
    if mu == 1:
        values = [0.420997, 0.0306498, 0.00780521]
        assert fixed_point(1.0, False)([1.0, 20.0, 80.0])[0] == pytest.approx(values, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_gc_s_fixed_point(mu: float, online: bool) -> None:
    """1000 levels from below, each solved for the k that `gc_loss` is least at, a parabola; the rest is sampling.

    The recursion itself is up to 1.2e-3 from the differential equation at 1000 levels: see the test above.
    """
    levels, (count, width) = karras_levels(1000), (1000, 16)
    solved = torch.ones(1000, dtype=torch.float64)
    seen: list[Tensor] = []
    for n in range(999):
        low, high = levels[n], levels[n + 1]
        slope = solved[n].clone().requires_grad_()

        def k(t: Tensor, low: Tensor = low, n: int = n, slope: Tensor = slope) -> Tensor:
            return torch.where(t <= low, solved[n], slope)

        network = _finite(linear(k))

        def watched(scaled: Tensor, t: Tensor, network: Any = network) -> Tensor:
            seen.append(scaled)
            return network(scaled, t)

        # Data of the exact variance and without correlation with the noise: less is left to chance.
        x, z = data(count, width, seed=n), normal((count, width), seed=5, step=n, dtype=torch.float64)
        x -= (x * z).mean() / z.square().mean() * z
        loss = gc_loss(
            watched,
            x * S / x.square().mean().sqrt(),
            full(low.item(), high.item(), count=count),
            mu=mu,
            predictor=None if online else _finite(linear(lambda t: S / (S * S + t * t).sqrt())),
            parameterization="cm",
            c=SQUARED,
            seed=5,
            step=n,
        ).total
        (gradient,) = torch.autograd.grad(loss, slope)
        above = seen.pop() * math.hypot(S, high)
        seen.clear()
        # d/dk of the mean of ‖k·x̃' - goal‖²/(2c·gap) is (k·E‖x̃'‖² - E⟨x̃', goal⟩)/(c·gap).
        curvature = above.square().sum(1).mean() / (SQUARED * (high - low))
        solved[n + 1] = solved[n] - gradient / curvature
    assert ((solved - recursion(mu, online, levels)) / solved).abs().max() < 1e-3
