"""The ancestral sampler: Euler's step to below the next level, then new noise; DDPM's and DDIM's step with eta."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from bicm_diffusion.keys import ANCESTRAL
from bicm_diffusion.samplers.checks import check_number
from bicm_diffusion.samplers.loop import Loop, Model, Options, Output, Row, transfer
from bicm_diffusion.samplers.prediction import Level, Number, Prediction, folded, read
from bicm_diffusion.samplers.signature import sampler
from bicm_diffusion.schedules import Schedule
from bicm_kernels import fold_in

if TYPE_CHECKING:
    from typing_extensions import Unpack

Integer = int | Tensor


@sampler(Loop)
def ancestral_sample(
    model: Model,
    z: Tensor,
    schedule: Schedule,
    *,
    eta: float = 1.0,
    seed: Integer = 0,
    sample_id: Integer = 0,
    **options: Unpack[Options],
) -> Tensor:
    """Return z_0 from z = z_N by ancestral steps: DDPM's on VP schedules, Euler-ancestral where alpha is 1.

    With ρ = (σ'/σ)² and D the denoised sample, in units of x0: x' = D + σ_down/σ·(x - D) + σ_up·n, where
    σ_up = η·σ'·√(1 - ρ) and σ_down² = σ'² - σ_up² (DDIM eq. 16).
    z: (B, …), any floating dtype; the result has its shape and dtype. eta: η in [0, 1]; 1 is ancestral, 0 is
    `ddim_sample`. seed, sample_id: key of the noise, whose step is i, apart from that of `bicm_kernels.normal` with the
    same seed. Takes N evaluations of the model and one launch per step; options: those of every sampler, see `Options`.
    Raises ValueError where eta is out of range, where a prediction is unknown, and where noise is added on a flow that
    begins at alpha = 0: its coefficients are those of the ODE alone.

    >>> import torch
    >>> from bicm_diffusion import karras_schedule
    >>> ancestral_sample(lambda z, times: z, torch.ones(1, 2), karras_schedule(4, t_max=3.0), seed=1).shape
    torch.Size([1, 2])
    """
    loop = Loop("ancestral_sample", model, z, schedule, **options)
    check_number("eta", eta)
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta: expected a value in [0, 1], got {eta}")
    if eta and schedule.straight is not None:
        raise ValueError("schedule: expected alpha > 0 where noise is added, got alpha_N = 0; eta=0.0 adds none")
    return Ancestral(loop, seed, sample_id, eta).walk(z)


class Ancestral:
    """The steps of a run: one launch each, from the model's output with the guide's change."""

    def __init__(self, loop: Loop, seed: Integer, sample_id: Integer, eta: float = 1.0) -> None:
        self.loop, self.sample_id = loop, sample_id
        self.key = fold_in(seed, ANCESTRAL)
        self.rows = loop.rows(ancestral_row, range(1, loop.schedule.steps + 1), (-1, 0), eta)

    def walk(self, z: Tensor) -> Tensor:
        """Return z_0 from z_N."""
        loop, scaled = self.loop, None
        for i in loop.steps(range(loop.schedule.steps, 0, -1)):
            z, scaled, output = self.step(i, z, scaled)
            loop.report(i - 1, z, output)
        return z

    def step(
        self, i: int, z: Tensor, scaled: Tensor | None = None, key: Integer | None = None
    ) -> tuple[Tensor, Tensor | None, Output]:
        """Return z_{i-1}, the model's input there where one launch makes both, and the model's output at z_i."""
        output = self.loop.evaluate(i, z, scaled)
        of_z, of_output, deviation = self.rows[i]
        noise: dict[str, Any] = {
            "noise_weight": deviation,
            "seed": self.key if key is None else key,
            "step": i,
            "sample_id": self.sample_id,
        }
        then = i - 1 if i > 1 else None
        return *self.loop.advance_with_noise([z, output], (of_z, of_output), noise, then), output


def ancestral_row(prediction: Prediction, below: Level, here: Level, eta: Number) -> Row:
    """Weights of z_i, the output there and the noise: Euler's step to σ_down, and noise back to σ'."""
    ratio = (below.sigma / below.alpha) / (here.sigma / here.alpha)
    # σ_down²/σ'² = 1 - η²·(1 - ρ), without cancellation: at η = 1 it is ρ.
    down = (1.0 - eta) * (1.0 + eta) + eta * eta * (ratio * ratio)
    lowered = Level(below.time, below.alpha, below.sigma * down**0.5)
    of_z, of_output = folded(read(prediction, here), *transfer(here, lowered))
    return of_z, of_output, eta * below.sigma * (1.0 - ratio * ratio) ** 0.5
