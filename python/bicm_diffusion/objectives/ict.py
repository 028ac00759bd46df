"""Improved consistency training (iCT): one batch's loss, on fused ops, from keyed draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
from bicm_diffusion.schedules.karras import T_MIN
from bicm_kernels import noisy_pair


def ict_loss(
    network: Network,
    x: Tensor,
    levels: Sequence[Tensor],
    *,
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
    """Return the iCT loss of a batch (BCM eq. 5), d(f(x_{n+1}, t_{n+1}), sg f(x_n, t_n)) / (t_{n+1} - t_n), a mean.

    Two evaluations, with one noise and one dropout mask, keyed by (seed, step, first sample) with another purpose than
    the noise.

    network: called as network(c_in(t)·x, t, u, **extra_args) with u = t_min for "bcm", and as network(c_in(t)·x, t,
        **extra_args) for "cm"; t and u are (B,), in x's precision. Returns F (B, …).
    x: clean samples (B, …), floating. levels: t_n and t_{n+1}, (B,) float64, the first two of `draw_levels`.
    parameterization: f of "bcm" or "cm", see `bicm_kernels.denoise`.
    sigma_data: σ_d, the standard deviation of the data. t_min: the lowest level, at which f is the sample itself.
    c, gradient: see `bicm_kernels.pseudo_huber`. seed, step, sample_id: the key, see `bicm_kernels.normal`.
    Raises ValueError for another parameterization or gradient, and TypeError for a network that `bct_loss` refuses.
    Warns of levels that do not begin at t_min, if they are on the host.

    >>> import torch
    >>> from bicm_diffusion import LevelTable, draw_levels, karras_levels
    >>> x, levels = torch.zeros(4, 2), draw_levels(LevelTable(karras_levels(11)), 4, seed=0, step=0)
    >>> sorted(ict_loss(lambda x, t: x, x, levels, seed=0, step=0, parameterization="cm").terms)
    ['consistency']
    """
    check_parameterization(parameterization)
    form = Form(parameterization, sigma_data, t_min)
    check_pair(network, x, levels, t_min)
    evaluate = evaluator(network, x, seed=seed, step=step, sample_id=sample_id, extra_args=extra_args, end=form.end)
    low, high = (level.to(x.device, level_dtype(x)) for level in levels[:2])
    pair = [*noisy_pair(x, low, high, **noise_key(x, seed, step, sample_id), sigma_data=sigma_data)]
    return weighted_distance(evaluate, form, pair, levels, c=c, gradient=gradient)
