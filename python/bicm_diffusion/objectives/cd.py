"""Consistency distillation (CD): one batch's loss, with targets from a given denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.objectives.evaluation import (
    Form,
    Loss,
    Network,
    check_pair,
    check_parameterization,
    evaluator,
    level_dtype,
    noise_key,
    weighted_distance,
)
from bicm_diffusion.samplers.checks import check_model, check_output
from bicm_diffusion.schedules.karras import T_MIN
from bicm_kernels import add_noise, affine_step, scale_input


def cd_loss(
    network: Network,
    x: Tensor,
    levels: Sequence[Tensor],
    *,
    denoiser: Callable[[Tensor, Tensor], Tensor],
    seed: int | Tensor,
    step: int | Tensor,
    sample_id: int | Tensor = 0,
    extra_args: Mapping[str, Any] | None = None,
    parameterization: str = "bcm",
    c: float | None = None,
    sigma_data: float = 0.5,
    t_min: float = T_MIN,
    gradient: str = "auto",
) -> Loss:
    """Return the CD loss of a batch, d(f(x_{n+1}, t_{n+1}), sg f(x_n, t_n)) / (t_{n+1} - t_n), a mean (GC eq. 4, 5).

    x_n = x_{n+1} + (t_n - t_{n+1})·(x_{n+1} - D(x_{n+1}, t_{n+1}))/t_{n+1}: Euler's step by a denoiser D, in place of
    iCT's x + t_n·z. Two evaluations of the network and one of D, which share their dropout mask.

    network, x, levels, parameterization, sigma_data, t_min, c, gradient, seed, step, sample_id: see `ict_loss`.
    denoiser: D(x_t, t) -> (B, …), with x_t not multiplied by c_in and t (B,) in x's precision; it is not trained.
    Raises ValueError for another parameterization or gradient, and where D returns another shape; TypeError for a
    network that `bct_loss` refuses.

    >>> from bicm_diffusion import LevelTable, draw_levels, karras_levels
    >>> x, levels = torch.zeros(4, 2), draw_levels(LevelTable(karras_levels(11)), 4, seed=0, step=0)
    >>> options = {"parameterization": "cm", "seed": 0, "step": 0}
    >>> sorted(cd_loss(lambda x, t: x, x, levels, denoiser=lambda x, t: 0 * x, **options).terms)
    ['consistency']
    """
    check_parameterization(parameterization)
    form = Form(parameterization, sigma_data, t_min)
    check_pair(network, x, levels, t_min)
    check_model(denoiser, "denoiser(x, t)", "denoiser")
    evaluate = evaluator(network, x, seed=seed, step=step, sample_id=sample_id, extra_args=extra_args, end=form.end)
    low, high = (level.to(x.device, torch.float64) for level in levels[:2])
    noisy = add_noise(x, high.to(level_dtype(x)), **noise_key(x, seed, step, sample_id))
    with torch.no_grad():
        with evaluate.alike():
            denoised = denoiser(noisy, high.to(level_dtype(x)))
        check_output(denoised, x, name="denoiser")
        # c_in of the lower level times Euler's step, (t_n/t_{n+1})·x_{n+1} + (1 - t_n/t_{n+1})·D, in one pass.
        c_in, kept = 1 / (sigma_data * sigma_data + low * low).sqrt(), low / high
        x_low = affine_step([noisy, denoised], [c_in * kept, c_in * (1 - kept)])
    pair = [x_low, scale_input(noisy, high.to(level_dtype(x)), sigma_data=sigma_data)]
    del x_low, noisy, denoised
    return weighted_distance(evaluate, form, pair, levels, c=c, gradient=gradient)
