"""IGN and SIGN where everything is known: two Diracs, dmd between Gaussians, and the order of flow's steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bicm_diffusion import Schedule, flow_schedule, karras_schedule, vp_schedule
from bicm_diffusion.consistency.shared_draws import draws_alike
from bicm_diffusion.objectives import ign_loss, sign_loss
from bicm_diffusion.objectives.score_models import ScoreModel, levels_at, ode_step
from bicm_kernels import normal
from tests.support.closed_forms import Mixture, ve_levels
from tests.support.plain_idempotent import draws

KEY: dict[str, Any] = {"seed": 11, "step": 2}
CPU = torch.device("cpu")
VE, VP = karras_schedule(12, t_max=20.0), vp_schedule(12)


def diracs(count: int = 4000) -> Tensor:
    """Samples at ±1, as signs of a noise that no objective draws."""
    return normal((count, 1), seed=99, dtype=torch.float64).sign()


def denoiser(z: Tensor, times: Tensor) -> Tensor:
    """D = tanh(z/t²) of two Diracs at ±1."""
    return (z / times[:, None].square()).tanh()


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_sign_is_a_fixed_point_on_two_diracs(solver: str) -> None:
    """Steps downward in VE never cross 0: x_s lies between x_n and D, whose signs are one."""
    x = diracs()
    given: dict[str, Any] = {"teacher": denoiser, "prediction": "x0", "solver": solver, "schedule": VE}
    loss = sign_loss(torch.sign, x, **KEY, **given)
    assert [term.item() for term in loss.terms.values()] == [0.0, 0.0, 0.0] and loss.total == 0
    assert all(term == 0 for term in ign_loss(torch.sign, x, **KEY).terms.values())
    # The empirical step leads to x itself, on the other side for some: the estimator is right in the mean alone.
    empirical = sign_loss(torch.sign, x, **KEY, schedule=VE)
    assert empirical.terms["recon"] == 0 and empirical.terms["idem"] == 0 and empirical.terms["flow"] > 0.01
    # And a constant has no recon and no idem to lose but on the data: what tight is there for.
    constant = ign_loss(torch.ones_like, x, **KEY)
    assert constant.terms["idem"] == 0 and constant.terms["tight"] == 0 and constant.terms["recon"] > 1


def test_bounded_tight_has_no_gradient_where_nothing_is_left_to_reconstruct() -> None:
    """0·tanh(·/0) and its derivative are 0 rather than NaN."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return torch.where(x.abs() == 1, x, 0.3 * scale * x)

    loss = ign_loss(f, diracs(50), **KEY)
    (found,) = torch.autograd.grad(loss.terms["tight"], scale)
    assert loss.terms["recon"] == 0 and loss.terms["tight"] == 0 and found == 0


class Affine(nn.Module):
    """f(z) = m + k·z."""

    def __init__(self, m: float, k: float) -> None:
        super().__init__()
        self.m, self.k = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (m, k))

    def forward(self, x: Tensor) -> Tensor:
        return self.m + self.k * x


class Gaussian(nn.Module):
    """The exact noise prediction of N(mean, std²) on a schedule whose times are indices."""

    def __init__(self, schedule: Schedule, mean: float, std: float) -> None:
        super().__init__()
        self.schedule, self.mean, self.std = schedule, mean, std

    def forward(self, z: Tensor, times: Tensor) -> Tensor:
        _, alpha, sigma = self.schedule.table[:, times.long()]
        alpha, sigma = alpha[:, None], sigma[:, None]
        return sigma * (z - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)


@pytest.mark.parametrize("alpha_power", [1, 2])
@pytest.mark.parametrize("base", [VE, VP, vp_schedule(1)], ids=["ve", "vp", "one level"])
def test_dmd_between_gaussians(base: Schedule, alpha_power: int) -> None:
    """f(z) = m + kz is N(m, k²τ²), data N(μ, s²): g is affine in z and the noise, so that the draws' own moments give
    the gradients in m and k, and their expectations the population's within chance."""
    schedule = Schedule(tuple(range(base.steps + 1)), base.alpha, base.sigma)
    m, k, mu, s, tau, count = 0.4, 0.9, -0.2, 0.6, schedule.sigma[-1], 20_000
    network = Affine(m, k)
    given: dict[str, Any] = {"teacher": Gaussian(schedule, mu, s), "learned": Gaussian(schedule, m, k * tau)}
    x = torch.zeros(count, 1, dtype=torch.float64)
    none = {"recon": 0.0, "idem": 0.0, "flow": 0.0}
    loss = sign_loss(network, x, **KEY, schedule=schedule, dmd=1.0, alpha_power=alpha_power, **none, **given)
    found = torch.stack(torch.autograd.grad(loss.terms["dmd"], [network.m, network.k]))

    drawn = draws(x[:, :, None], schedule, **KEY, std=tau)
    _, alpha, sigma = schedule.table[:, drawn["n"]]
    z, noise = drawn["z"].flatten(), drawn["around"].flatten()
    ours, data = (alpha**2 * v**2 + sigma**2 for v in (k * tau, s))
    extra = alpha ** (alpha_power - 1)
    constant = extra * alpha * (m - mu) / data
    of_z, of_noise = (extra * c * (1 / data - 1 / ours) for c in (alpha * k, sigma))
    g = constant + of_z * z + of_noise * noise
    expected = torch.stack([g.mean(), (g * z).mean()])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss.terms["dmd"].detach(), 0.5 * g.square().mean(), rtol=1e-10, atol=0)
    # In expectation over z and the noise: five standard errors.
    for value, sample in ((constant, g), (of_z * tau**2, g * z)):
        assert (sample.mean() - value.mean()).abs() < 5 * (sample - value).std() / count**0.5
    # Where f(z) has the data's distribution, there is nothing to gain.
    exact = Affine(mu, s / tau)
    given["learned"] = Gaussian(schedule, mu, s)
    assert sign_loss(exact, x, **KEY, schedule=schedule, dmd=1.0, **none, **given).terms["dmd"] < 1e-28


def test_the_learned_model_learns_the_distribution_of_samples() -> None:
    """Its loss has its least value at the exact prediction of f(z)'s distribution."""
    schedule = Schedule(tuple(range(VP.steps + 1)), VP.alpha, VP.sigma)
    network, x = Affine(0.4, 0.5), torch.zeros(20_000, 1, dtype=torch.float64)

    def learned(mean: float, std: float) -> Tensor:
        given = {"teacher": Gaussian(schedule, 0.0, 1.0), "learned": Gaussian(schedule, mean, std)}
        return sign_loss(network, x, **KEY, schedule=schedule, dmd=1.0, recon=0.0, idem=0.0, flow=0.0, **given).terms[
            "learned"
        ]

    least = learned(0.4, 0.5 * schedule.sigma[-1])
    assert all(least < learned(*other) for other in ((0.3, 0.5), (0.5, 0.5), (0.4, 0.4), (0.4, 0.6)))


def exact_flow(x: Tensor, schedule: Schedule, start: int, stop: int, s: float) -> Tensor:
    """Where the ODE takes N(0, s²): it keeps the quantile."""

    def std(i: int) -> float:
        return (schedule.alpha[i] ** 2 * s**2 + schedule.sigma[i] ** 2) ** 0.5

    return x * std(stop) / std(start)


def grid(kind: str, steps: int) -> Schedule:
    if kind == "ve":
        return karras_schedule(steps, t_min=0.1, t_max=3.0, rho=3.0, final_sigma=None)
    if kind == "flow":
        whole = flow_schedule(steps)
        return Schedule(whole.times, whole.alpha, whole.sigma, flow=True)
    return vp_schedule(steps, final_time=0.1)


def slope(errors: list[float], steps: list[int]) -> float:
    logs = [torch.tensor(values, dtype=torch.float64).log() for values in (errors, steps)]
    return -((logs[0][-1] - logs[0][0]) / (logs[1][-1] - logs[1][0])).item()


def teacher_of(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    if kind != "flow":
        return Mixture(std=0.5, levels=ve_levels) if kind == "ve" else Mixture(std=0.5)

    def velocity(z: Tensor, times: Tensor) -> Tensor:
        """v = E[n - x | z] of N(0, .5²), alpha = 1 - t."""
        t = times.double()[:, None]
        return (t - 0.25 * (1 - t)) / ((1 - t) ** 2 * 0.25 + t**2) * z

    return velocity


@pytest.mark.parametrize("kind", ["ve", "vp", "flow"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_theorem_3s_order(kind: str, solver: str, order: int) -> None:
    """f with no flow to lose maps x_N to the end of the chain of steps: its error is of the solver's order."""
    errors, counts = [], [40, 80, 160]
    for steps in counts:
        schedule = grid(kind, steps)
        prediction = "flow" if kind == "flow" else "noise"
        model = ScoreModel(teacher_of(kind), prediction, draws_alike(0, CPU), "teacher")
        x = torch.full((1, 1), 1.3, dtype=torch.float64)
        goal = exact_flow(x, schedule, steps, 0, 0.5)
        for n in range(steps, 0, -1):
            x = ode_step(model, schedule, x, torch.tensor([n]), heun=solver == "heun")
        errors.append((x - goal).abs().item())
    assert slope(errors, counts) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_flow_compares_the_ends_of_such_a_step(solver: str, order: int) -> None:
    """What the network is asked about, x_n and x_s, is one step of the ODE apart, to the local order."""
    errors, widths = [], [0.4, 0.2, 0.1]
    for width in widths:
        asked: list[Tensor] = []

        def f(x: Tensor, asked: list[Tensor] = asked) -> Tensor:
            asked.append(x)
            return x

        schedule = Schedule((1.0, 1.0 + width), (1.0, 1.0), (1.0, 1.0 + width))
        x = 0.5 * normal((64, 1), seed=98, dtype=torch.float64)
        given = {"teacher": teacher_of("ve"), "solver": solver, "recon": 0.0, "idem": 0.0}
        sign_loss(f, x, **KEY, schedule=schedule, **given)
        x_n, x_s = asked
        errors.append((x_s - exact_flow(x_n, schedule, 1, 0, 0.5)).abs().max().item())
    assert slope(errors, [round(4 / width) for width in widths]) == pytest.approx(order, abs=0.3)


def test_the_empirical_pair_has_one_noise() -> None:
    asked: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        asked.append(x)
        return x

    x = normal((64, 1), seed=98, dtype=torch.float64)
    sign_loss(f, x, **KEY, schedule=VP, recon=0.0, idem=0.0)
    drawn = draws(x[:, :, None], VP, **KEY, std=1.0)
    noise = drawn["noise"][:, :, 0]
    for x_t, index in zip(asked, (drawn["n"], drawn["n"] - 1), strict=True):
        level = levels_at(VP, index, CPU)
        torch.testing.assert_close(x_t, level.alpha[:, None] * x + level.sigma[:, None] * noise, rtol=1e-12, atol=1e-12)
