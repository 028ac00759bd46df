"""Denoising (EDM): levels from a lognormal, and one batch's loss in the units of the network's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.keys import TIMES, device_of
from bicm_diffusion.objectives.evaluation import Loss, Network, evaluator, level_dtype, noise_key
from bicm_diffusion.samplers.checks import check_batch, check_level, check_state
from bicm_kernels import affine_step, fold_in, normal

P_MEAN, P_STD = -1.2, 1.2


def draw_denoising_levels(
    batch: int,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    sample_id: int | Tensor = 0,
    p_mean: float = P_MEAN,
    p_std: float = P_STD,
) -> Tensor:
    """Return noise levels (B,) float64 with ln t ~ N(p_mean, p_std²), keyed by (seed, sample, step).

    >>> bool((draw_denoising_levels(4, seed=0, step=0) > 0).all())
    True
    """
    check_batch(batch)
    key: dict[str, Any] = {"seed": fold_in(seed, TIMES), "step": step, "sample_id": sample_id}
    z = normal((batch, 1), **key, dtype=torch.float64, device=device_of(*key.values()))[:, 0]
    return (p_mean + p_std * z).exp()


def denoising_loss(
    network: Network,
    x: Tensor,
    t: Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    sample_id: int | Tensor = 0,
    extra_args: Mapping[str, Any] | None = None,
    sigma_data: float = 0.5,
) -> Loss:
    """Return EDM's denoising loss, λ(t)·(D(x + tn, t) - x)² as a mean over elements, λ = (t² + σ_d²)/(t σ_d)².

    It is computed as (F - F*)² with F* = (t x/σ_d - σ_d n)/√(σ_d² + t²), without cancellation or, even at level 0,
    division by zero. F* has unit variance for data of variance σ_d².

    network: called as network(c_in(t)·x, t, **extra_args) -> F (B, …), with t (B,) in x's precision.
    x: clean samples (B, …), floating. t: noise levels (B,) >= 0, as from `draw_denoising_levels`.
    sigma_data: σ_d, the standard deviation of the data.
    seed, step, sample_id: the key, see `bicm_kernels.normal`; the dropout mask by its first sample, too.
    Raises TypeError for a network that `bct_loss` refuses.

    >>> x = torch.zeros(4, 2)
    >>> sorted(denoising_loss(lambda x, t: x, x, torch.ones(4), seed=0, step=0).terms)
    ['denoising']
    """
    check_state("x", x)
    check_level("sigma_data", sigma_data)
    if not isinstance(t, Tensor) or (t.dim() and t.shape != x.shape[:1]):
        raise TypeError(f"t: expected levels ({len(x)},), as draw_denoising_levels gives, got {described(t)}")
    evaluate = evaluator(network, x, seed=seed, step=step, sample_id=sample_id, extra_args=extra_args, end=None)
    t = t.to(x.device, torch.float64)
    root = (sigma_data * sigma_data + t * t).sqrt()
    noise = noise_key(x, seed, step, sample_id)
    scaled = affine_step([x], [1 / root], noise_weight=t / root, **noise)
    goal = affine_step([x], [t / (sigma_data * root)], noise_weight=-sigma_data / root, **noise)
    output = evaluate(scaled, t.to(level_dtype(x)))
    # Halves are squared in float32.
    difference = output.to(torch.promote_types(output.dtype, torch.float32)) - goal
    loss = difference.square().mean()
    return Loss(loss, {"denoising": loss})
