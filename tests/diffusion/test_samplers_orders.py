"""How fast the samplers converge, on flows whose end is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bicm_diffusion import (
    Schedule,
    bdia_sample,
    ddim_invert,
    ddim_sample,
    edict_sample,
    edm_sample,
    karras_schedule,
    obelm_sample,
    vp_alpha_sigma,
    vp_schedule,
)
from tests.support.closed_forms import Mixture, ve_levels

Solver = Callable[[Mixture, Tensor, Schedule], Tensor]


def bdia(gamma: float, increments: str = "euler", exact: bool = False) -> Solver:
    def solve(model: Mixture, z: Tensor, schedule: Schedule) -> Tensor:
        return bdia_sample(model, z, schedule, gamma=gamma, increments=increments, exact=exact).z

    return solve


ORDERS: dict[str, tuple[Solver, float]] = {
    "DDIM": (ddim_sample, 1.0),
    "BDIA, gamma 0.5": (bdia(0.5), 1.0),
    "BDIA, gamma 1": (bdia(1.0), 2.0),
    "Heun": (edm_sample, 2.0),
    "BDIA Heun/Heun, gamma 0.5": (bdia(0.5, "heun"), 2.0),
    "BDIA Heun/Heun, gamma 0.9": (bdia(0.9, "heun"), 2.0),
    "BDIA Heun/Heun, gamma 1": (bdia(1.0, "heun"), 2.0),
    "O-BELM": (lambda model, z, schedule: obelm_sample(model, z, schedule, exact=False).z, 2.0),
    "EDICT": (lambda model, z, schedule: edict_sample(model, z, schedule, exact=False).z, 1.0),
}
DATA = {"Gaussian": (0.7, 0.0), "mixture": (0.4, 1.0)}
GRIDS = {
    "VP": (vp_alpha_sigma, lambda steps: vp_schedule(steps, final_time=0.02)),
    "EDM": (ve_levels, lambda steps: karras_schedule(steps, t_min=0.02, t_max=10.0, final_sigma=None)),
}


def errors(solve: Solver, model: Mixture, grid: Callable[[int], Schedule], sizes: tuple[int, ...]) -> list[float]:
    found = []
    for steps in sizes:
        schedule = grid(steps)
        start = 0.8 * schedule.sigma[-1]
        end = solve(model, torch.full((1, 1), start, dtype=torch.float64), schedule)
        found.append(abs(end.item() - model.flow(start, schedule, steps, 0)))
    return found


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", ORDERS)
def test_order(name: str, data: str, grid: str) -> None:
    solve, order = ORDERS[name]
    levels, make = GRIDS[grid]
    coarse, fine = errors(solve, Mixture(*DATA[data], levels), make, (160, 320))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", ["O-BELM", "BDIA"])
def test_exact_states_converge_alike(name: str) -> None:
    """A grid of 2^-32 and fractions with denominators up to 1024 lie far below the method's own error."""
    solve = bdia(1.0, exact=True) if name == "BDIA" else lambda model, z, schedule: obelm_sample(model, z, schedule).z
    coarse, fine = errors(solve, Mixture(), GRIDS["VP"][1], (80, 160))
    assert math.log2(coarse / fine) == pytest.approx(2.0, abs=0.1)


def test_error_shrinks_with_gamma_as_one_minus_over_one_plus() -> None:
    model, grid = Mixture(), GRIDS["VP"][1]
    (ddim,), (half,) = (errors(solve, model, grid, (1000,)) for solve in (ddim_sample, bdia(0.5)))
    assert half / ddim == pytest.approx(1 / 3, rel=0.02)


def test_ddim_inversion_converges_to_the_flow_and_is_not_exact() -> None:
    model, schedule = Mixture(), GRIDS["VP"][1](400)
    x = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
    latent = ddim_invert(model, x, schedule)
    flow = torch.tensor([[model.flow(value, schedule, 0, 400)] for value in x.flatten().tolist()], dtype=x.dtype)
    torch.testing.assert_close(latent, flow, rtol=0.02, atol=0)
    error = (ddim_sample(model, latent, schedule) - x).abs().max().item()
    assert 1e-4 < error < 0.1
