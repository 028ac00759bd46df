"""Operators made of deepinv's physics, and its DPS beside ours on the same problem and noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import ConsistencySchedule, Schedule, karras_schedule
from bicm_diffusion.adapters.deepinv import operator
from bicm_diffusion.inverse import (
    Downsample,
    Mask,
    cm_inversion_sample,
    cm_posterior_sample,
    dps_sample,
    freedom_sample,
    lgd_sample,
    mpgd_sample,
)
from bicm_diffusion.keys import ANCESTRAL
from bicm_kernels import fold_in, normal
from tests.support.closed_forms import column, noise

deepinv = pytest.importorskip("deepinv", reason="needs the extra [deepinv]", exc_type=ImportError)

STD, SHAPE = 0.2, (2, 1, 8, 8)


def denoiser(x: Tensor, times: Tensor) -> Tensor:
    """The posterior mean of N(0, STD²)."""
    return x * STD**2 / (STD**2 + column(times, x).to(x.dtype) ** 2)


def jump(x: Tensor, times: Tensor) -> Tensor:
    """The consistency function of the same data."""
    return x * STD / (STD**2 + column(times, x).to(x.dtype) ** 2) ** 0.5


def mask() -> Tensor:
    return (noise(1, 1, 8, 8, seed=5) > 0).float()


#: With its default padding deepinv has no adjoint of an even filter.
BOX = torch.full((1, 1, 2, 2), 0.25)
BLUR = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))[None, None]
PHYSICS: dict[str, Any] = {
    "inpainting": lambda: deepinv.physics.Inpainting((1, 8, 8), mask=mask()[0]),
    "down-sampling": lambda: deepinv.physics.Downsampling((1, 8, 8), factor=2, filter=BOX, padding="valid"),
    "blur": lambda: deepinv.physics.Blur(BLUR, padding="circular"),
    "stacked": lambda: deepinv.physics.stack(
        deepinv.physics.Inpainting((1, 8, 8), mask=mask()[0]),
        deepinv.physics.Downsampling((1, 8, 8), factor=2, filter=BOX, padding="valid"),
    ),
    "not linear": lambda: deepinv.physics.Physics(A=lambda x, **_: torch.tanh(2.0 * x)),
}


@pytest.mark.parametrize("name", PHYSICS)
def test_an_operator_measures_and_is_differentiated(name: str) -> None:
    physics = PHYSICS[name]()
    A, x = operator(physics), noise(*SHAPE, dtype=torch.float32).requires_grad_()
    found = A(x)
    assert torch.equal(found, A.measurement(physics.A(x))) and found.dim() == (2 if name == "stacked" else 4)
    (gradient,) = torch.autograd.grad(found.square().sum() / 2, x)
    if name == "not linear":
        assert gradient.any()
        return
    torch.testing.assert_close(gradient, A.adjoint(physics.A(x.detach())), rtol=1e-5, atol=1e-5)
    wide = operator(physics, minus_one_one=True)
    torch.testing.assert_close(wide(2.0 * x - 1.0), found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wide.adjoint(physics.A(x)), A.adjoint(physics.A(x)) / 2)


@pytest.mark.parametrize("name", ["inpainting", "down-sampling"])
def test_operators_that_both_have_are_the_same(name: str) -> None:
    ours = Mask(mask().bool()) if name == "inpainting" else Downsample(2)
    x = noise(*SHAPE, dtype=torch.float32)
    torch.testing.assert_close(operator(PHYSICS[name]())(x), ours(x), rtol=1e-6, atol=1e-6)


#: About the inverse of the largest eigenvalue of A·Aᵀ, or of what takes its place.
SIZES = {"down-sampling": 4.0, "not linear": 0.25}
SOLVERS: dict[str, Any] = {
    "dps": dps_sample,
    "lgd": lambda *a, **o: lgd_sample(*a, radius=0.01, **o),
    "freedom": freedom_sample,
    "mpgd": mpgd_sample,
    "cm posterior": lambda *a, **o: cm_posterior_sample(*a, consistency_model=jump, parameterization="x0", **o),
}


@pytest.mark.parametrize("name", PHYSICS)
@pytest.mark.parametrize("solver", [*SOLVERS, "cm inversion"])
def test_every_solver_leads_towards_a_measurement_of_physics(solver: str, name: str) -> None:
    A = operator(PHYSICS[name]())
    truth = STD * noise(*SHAPE, dtype=torch.float32, seed=1)
    given: dict[str, Any] = {"operator": A, "y": A(truth), "distance": "half_squared"}
    z = 10.0 * noise(*SHAPE, dtype=torch.float32)

    def solved(size: float) -> Tensor:
        if solver == "cm inversion":
            levels: Any = {"iterations": 10, "rate": lambda t: size * (t * t + STD**2) / STD**2}
            return cm_inversion_sample(
                jump, z, ConsistencySchedule((10.0, 1.0, 0.2)), parameterization="x0", **levels, **given
            )
        return SOLVERS[solver](denoiser, z, karras_schedule(30, t_max=10.0), prediction="x0", scale=size, **given)

    residuals = [(A(solved(size)) - given["y"]).flatten(1).norm(dim=1) for size in (0.0, SIZES.get(name, 0.8))]
    assert (residuals[1] < 0.5 * residuals[0]).all()


class Keyed(deepinv.sampling.AncestralSolver):
    """deepinv's ancestral solver with this library's noise, step by step."""

    drawn = 0

    def randn_like(self, x: Tensor, **_: Any) -> Tensor:
        step = len(self.timesteps) - 1 - self.drawn
        self.drawn += 1
        return normal(x.shape, seed=fold_in(3, ANCESTRAL), step=step, dtype=x.dtype)


class Model(deepinv.models.Denoiser):
    """The same denoiser as deepinv calls it, in float32."""

    def forward(self, x: Tensor, sigma: Any, **_: Any) -> Tensor:
        return denoiser(x, torch.as_tensor(sigma, dtype=torch.float32).reshape(-1).expand(len(x)))


@pytest.mark.parametrize("name", ["inpainting", "down-sampling", "blur"])
def test_deepinv_s_dps_is_ours_with_its_step_size(name: str) -> None:
    """It adds λ·∇ to the score, which moves the next state by λ·(σ² - σ'²)."""
    physics, weight = PHYSICS[name](), 5.0
    truth = STD * noise(*SHAPE, dtype=torch.float32, seed=1)
    y = physics.A(truth).double()
    solver = Keyed(timesteps=torch.linspace(1, 0, 30, dtype=torch.float64))
    theirs = deepinv.sampling.DPS(
        Model(), schedule="ve", solver=solver, weight=weight, minus_one_one=False, denoise_output=False
    )
    x = 80.0 * noise(*SHAPE)
    found = theirs(y, physics, x_init=x, denoise_output=False)
    levels = theirs.sde.sigma_t(solver.timesteps.flip(0)).tolist()
    schedule = Schedule(tuple(levels), (1.0,) * 30, tuple(levels))

    def model(z: Tensor, times: Tensor) -> Tensor:
        return denoiser(z.float(), times.float()).double()

    A = operator(physics)
    ours = dps_sample(
        model, x, schedule, prediction="x0", operator=lambda x0: A(x0.float()).double(), y=y, seed=3,
        scale=lambda sigma, below: weight * (sigma * sigma - below * below),
    )  # fmt: skip
    # The denoiser and the physics compute in float32 on both sides; states are of size 1 and less at the end.
    torch.testing.assert_close(ours, found.double(), rtol=0, atol=1e-5)
    assert (ours - truth).abs().max() > 1e-3


def test_what_is_no_physics_is_named() -> None:
    with pytest.raises(TypeError, match=r"physics: expected a deepinv.physics.Physics, got 3"):
        operator(3)
    with pytest.raises(TypeError, match="physics: expected linear physics, with A_adjoint, got a Physics"):
        operator(PHYSICS["not linear"]()).adjoint(noise(*SHAPE))
