"""Solvers whose distance is measured at the model's denoised sample, the posterior mean: DPS, LGD, FreeDoM, MPGD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.inverse.ancestral import Run, SolverOptions
from bicm_diffusion.inverse.problem import check_count, check_radius, gradient, leaf
from bicm_diffusion.keys import TRAVEL
from bicm_diffusion.samplers.guide import Evaluation, Shift
from bicm_diffusion.samplers.loop import Model
from bicm_diffusion.samplers.signature import sampler
from bicm_diffusion.schedules import Schedule
from bicm_kernels import add_noise, fold_in

if TYPE_CHECKING:
    from typing_extensions import Unpack


@sampler(Run)
def dps_sample(model: Model, z: Tensor, schedule: Schedule, **options: Unpack[SolverOptions]) -> Tensor:
    """Return samples with operator(x0) near y by DPS: an ancestral step, minus ζ·∇_z Δ(operator(D(z)), y).

    x ← D + ρ·(x - D) + σ'·√(1 - ρ)·n - ζ·∇_x ΣΔ, ρ = (σ'/σ)², where alpha is 1; elsewhere in DDIM's variables.
    z: (B, …) at the schedule's highest level, any floating dtype; the result has its shape and dtype. Takes N
    evaluations of the model and of its derivative; options: see `SolverOptions`.
    Raises TypeError for arguments of another kind, and ValueError for shapes that do not fit or a function without a
    derivative.

    >>> import torch
    >>> from bicm_diffusion import karras_schedule
    >>> half = dict(operator=lambda x0: x0[:, :1], y=torch.ones(1, 1))
    >>> dps_sample(lambda z, t: z / (1 + t), torch.ones(1, 2), karras_schedule(4, t_max=3.0), **half).shape
    torch.Size([1, 2])
    """
    run = Run("dps_sample", model, z, schedule, **options)
    return run.solve(z, _Tracked(run))


@sampler(Run)
def lgd_sample(
    model: Model,
    z: Tensor,
    schedule: Schedule,
    *,
    radius: float | None = None,
    draws: int = 1,
    **options: Unpack[SolverOptions],
) -> Tensor:
    """Return samples with operator(x0) near y by LGD: DPS whose distance is measured at D(z) + r·n.

    radius: r ≥ 0, a number, or None for LGD's own σ/√(1 + σ²). draws: how many n; of several the distance is
    -log mean exp(-Δ). z, model, options and errors: as for `dps_sample`; the operator is called once per draw.

    >>> import torch
    >>> from bicm_diffusion import karras_schedule
    >>> half = dict(operator=lambda x0: x0[:, :1], y=torch.ones(1, 1), draws=2)
    >>> lgd_sample(lambda z, t: z / (1 + t), torch.ones(1, 2), karras_schedule(4, t_max=3.0), **half).shape
    torch.Size([1, 2])
    """
    run = Run("lgd_sample", model, z, schedule, **options)
    check_count("draws", draws)
    if radius is not None:
        check_radius("radius", radius)
    levels = map(run.level, range(schedule.steps + 1))
    radii = [s / math.hypot(1.0, s) if radius is None else float(radius) for s in levels]
    return run.solve(z, _Tracked(run, radii, draws))


@sampler(Run)
def freedom_sample(
    model: Model,
    z: Tensor,
    schedule: Schedule,
    *,
    repeats: int = 2,
    repeat_range: tuple[float, float] = (0.0, math.inf),
    **options: Unpack[SolverOptions],
) -> Tensor:
    """Return samples with operator(x0) near y by FreeDoM: DPS that adds noise and repeats steps.

    repeats: how often each step is taken whose noise level σ is in repeat_range; between two of them
    x ← x' + √(σ² - σ'²)·n. One is DPS, to the bit. z, model, options and errors: as for `dps_sample`.

    >>> import torch
    >>> from bicm_diffusion import karras_schedule
    >>> half = dict(operator=lambda x0: x0[:, :1], y=torch.ones(1, 1), repeat_range=(0.1, 1.0))
    >>> freedom_sample(lambda z, t: z / (1 + t), torch.ones(1, 2), karras_schedule(4, t_max=3.0), **half).shape
    torch.Size([1, 2])
    """
    run = Run("freedom_sample", model, z, schedule, **options)
    check_count("repeats", repeats)
    if not isinstance(repeat_range, tuple | list) or len(repeat_range) != 2:
        raise ValueError(f"repeat_range: expected a pair of noise levels (low, high), got {described(repeat_range)}")
    low, high = repeat_range
    travel, guide = fold_in(run.seed, TRAVEL), _Tracked(run)
    with run.guided(guide) as steps:
        for i in run.steps(range(schedule.steps, 0, -1)):
            sigma, below = run.level(i), run.level(i - 1)
            for repeat in range(repeats if low <= sigma <= high else 1):
                if repeat:
                    alpha, width = schedule.alpha[i], math.sqrt(sigma * sigma - below * below)
                    z = add_noise(
                        z,
                        alpha * width,
                        scale=alpha / schedule.alpha[i - 1],
                        seed=fold_in(travel, repeat),
                        step=i,
                        sample_id=run.sample_id,
                    )
                guide.repeat = repeat
                # Every repeat of a step has new noise.
                z, _, output = steps.step(i, z, key=fold_in(steps.key, repeat) if repeat else None)
            run.report(i - 1, z, output)
    return z


@sampler(Run)
def mpgd_sample(model: Model, z: Tensor, schedule: Schedule, **options: Unpack[SolverOptions]) -> Tensor:
    """Return samples with operator(x0) near y by MPGD: the ancestral step uses D - ζ·∇_D Δ(operator(D), y).

    The gradient is with respect to the denoised sample D, without the model's derivative. z, model, options and errors:
    as for `dps_sample`.

    >>> import torch
    >>> from bicm_diffusion import karras_schedule
    >>> half = dict(operator=lambda x0: x0[:, :1], y=torch.ones(1, 1))
    >>> mpgd_sample(lambda z, t: z / (1 + t), torch.ones(1, 2), karras_schedule(4, t_max=3.0), **half).shape
    torch.Size([1, 2])
    """
    run = Run("mpgd_sample", model, z, schedule, **options)

    def guide(at: Evaluation) -> Shift:
        x0 = leaf(at.x0)
        return Shift(gradient(run.problem.measure(x0, 0.0, at.index, range(1)), x0), -run.size(at.index))

    return run.solve(z, guide)


class _Tracked:
    """Guides by the distance at the denoised sample, or around it, with its gradient in the state."""

    def __init__(self, run: Run, radii: Sequence[float] | None = None, draws: int = 1) -> None:
        self.run, self.radii, self.draws = run, radii or [0.0] * (run.schedule.steps + 1), draws
        self.repeat = 0

    def __call__(self, at: Evaluation) -> Shift:
        """Return the shift that makes the step's correction."""
        state, x0 = at.tracked()
        # A repeat also uses new noise in the distance, if any.
        draws = range(self.repeat * self.draws, (self.repeat + 1) * self.draws)
        found = self.run.problem.measure(x0, self.radii[at.index], at.index, draws)
        del x0  # not needed for the derivative
        return self.run.moved(at.index, gradient(found, state))
