"""Solvers whose distance is measured at the model's denoised sample, the posterior mean: DPS, LGD, FreeDoM, MPGD."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.inverse.ancestral import Correction, Run, SolverOptions
from bicm_diffusion.inverse.problem import check_count, check_radius, gradient, leaf
from bicm_diffusion.keys import TRAVEL
from bicm_diffusion.samplers.loop import Model, Output
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
    evaluations of the model and as many derivatives; options: see `SolverOptions`.
    Raises TypeError for arguments of another kind, and ValueError for shapes that do not fit or a function without a
    derivative.

    >>> import torch
    >>> from bicm_diffusion import karras_schedule
    >>> half = dict(operator=lambda x0: x0[:, :1], y=torch.ones(1, 1))
    >>> dps_sample(lambda z, t: z / (1 + t), torch.ones(1, 2), karras_schedule(4, t_max=3.0), **half).shape
    torch.Size([1, 2])
    """
    run = Run("dps_sample", model, z, schedule, **options)
    return _guided(run, z, [0.0] * (schedule.steps + 1), 1)


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
    -log mean exp(-Δ). z, model, options and errors: as for `dps_sample`; the operator is asked once a draw.

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
    return _guided(run, z, radii, draws)


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
    """Return samples with operator(x0) near y by FreeDoM: DPS that goes back up and takes steps again.

    repeats: how often each step is taken whose noise level σ lies in repeat_range; between two of them
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
    travel = fold_in(run.seed, TRAVEL)
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
            z, output = _step(run, i, z, 0.0, 1, repeat)
        run.report(i - 1, z, output)
    return z


@sampler(Run)
def mpgd_sample(model: Model, z: Tensor, schedule: Schedule, **options: Unpack[SolverOptions]) -> Tensor:
    """Return samples with operator(x0) near y by MPGD: the ancestral step leads towards D - ζ·∇_D Δ(operator(D), y).

    The gradient is that in the denoised sample D: nothing goes back through the model. z, model, options and errors:
    as for `dps_sample`.

    >>> import torch
    >>> from bicm_diffusion import karras_schedule
    >>> half = dict(operator=lambda x0: x0[:, :1], y=torch.ones(1, 1))
    >>> mpgd_sample(lambda z, t: z / (1 + t), torch.ones(1, 2), karras_schedule(4, t_max=3.0), **half).shape
    torch.Size([1, 2])
    """
    run, scaled = Run("mpgd_sample", model, z, schedule, **options), None
    for i in run.steps(range(schedule.steps, 0, -1)):
        output = run.evaluate(i, z, scaled)
        x0 = leaf(run.denoised(i, z, output))
        with torch.enable_grad():
            found = run.problem.measure(x0, 0.0, i, range(1))
        correction = Correction(gradient(found, x0), -run.size(i), clean=True)
        z, scaled = run.down(i, z, output, correction, ask=True)
        run.report(i - 1, z, output)
    return z


def _guided(run: Run, z: Tensor, radii: list[float], draws: int) -> Tensor:
    for i in run.steps(range(run.schedule.steps, 0, -1)):
        z, output = _step(run, i, z, radii[i], draws, 0)
        run.report(i - 1, z, output)
    return z


def _step(run: Run, i: int, z: Tensor, radius: float, draws: int, repeat: int) -> tuple[Tensor, Output]:
    """One step down with the gradient through the model; every repeat of a step has noise of its own."""
    state = leaf(z)
    with torch.enable_grad():
        output, x0 = run.tracked(i, state)
        # A repeat measures at other noise as well, where there is any.
        found = run.problem.measure(x0, radius, i, range(repeat * draws, (repeat + 1) * draws))
    key = fold_in(run.key, repeat) if repeat else None
    return run.down(i, z, output, Correction(gradient(found, state), -run.size(i)), key=key)[0], output
