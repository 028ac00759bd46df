"""Sampler updates in PyTorch: affine maps of a few tensors plus keyed noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bicm_kernels.reference.arithmetic import check_sequence, compute_dtype, like_first, per_sample
from bicm_kernels.reference.noise import plus_noise

Number = float | Tensor
TensorOrPair = Tensor | tuple[Tensor, Tensor]


def guide(operands: Sequence[TensorOrPair], guidance_scale: Number | None, compute: torch.dtype) -> list[Tensor]:
    """The operands in the compute type; a pair becomes eps_uncond + s (eps_cond - eps_uncond)."""
    tensors: list[Tensor] = []
    for operand in operands:
        if isinstance(operand, Tensor):
            tensors.append(operand.to(compute))
            continue
        assert guidance_scale is not None
        uncond, cond = (x.to(compute) for x in operand)
        tensors.append(uncond + per_sample(guidance_scale, uncond, compute) * (cond - uncond))
    return tensors


def first_of(operands: Sequence[TensorOrPair]) -> Tensor:
    """The first state tensor, which gives the result its dtype and layout."""
    check_sequence("tensors", operands)
    return operands[0] if isinstance(operands[0], Tensor) else operands[0][0]


def flatten(operands: Sequence[TensorOrPair]) -> list[Tensor]:
    """Every tensor, pairs opened."""
    return [x for operand in operands for x in ([operand] if isinstance(operand, Tensor) else operand)]


def fold(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Sum of w_k x_k as a left fold: one product, one sum at a time."""
    result = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        result = result + weight * tensor
    return result


def affine_step(
    tensors: Sequence[TensorOrPair],
    weights: Sequence[Number],
    *,
    noise_weight: Number = 0.0,
    guidance_scale: Number | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_id: int | Tensor = 0,
) -> Tensor:
    """Sum of w_k x_k, plus w_n n."""
    first, compute = first_of(tensors), compute_dtype(*flatten(tensors))
    table = [per_sample(weight, first, compute) for weight in weights]
    result = fold(guide(tensors, guidance_scale, compute), table)
    if seed is not None:
        result = plus_noise(result, first, noise_weight, seed, step, sample_id)
    return like_first(result, first)


def ddim_step(z: Tensor, eps: TensorOrPair, *, a: Number, b: Number, guidance_scale: Number | None = None) -> Tensor:
    """BDIA eq. 6: a z + b eps."""
    return affine_step([z, eps], [a, b], guidance_scale=guidance_scale)


def bdia_step(
    z_last: Tensor,
    z: Tensor,
    eps: TensorOrPair,
    *,
    a: Number,
    b: Number,
    a_last: Number,
    b_last: Number,
    gamma: Number = 1.0,
    guidance_scale: Number | None = None,
) -> Tensor:
    """BDIA eq. 24: z_{i-1} = gamma z_{i+1} + (a - gamma/a_last) z_i + (b + gamma b_last/a_last) eps."""
    operands = [z_last, z, eps]
    compute = compute_dtype(*flatten(operands))
    a, b, a_last, b_last, gamma = (per_sample(x, z, compute) for x in (a, b, a_last, b_last, gamma))
    weights = [gamma, a - gamma / a_last, b + gamma * (b_last / a_last)]
    result = fold(guide(operands, guidance_scale, compute), weights)
    return like_first(result, z_last)


def bdia_inverse_step(
    z_next: Tensor,
    z: Tensor,
    eps: TensorOrPair,
    *,
    a: Number,
    b: Number,
    a_last: Number,
    b_last: Number,
    gamma: Number = 1.0,
    guidance_scale: Number | None = None,
) -> Tensor:
    """BDIA eq. 28: z_{i+1} = z_{i-1}/gamma + (1/a_last - a/gamma) z_i - (b/gamma + b_last/a_last) eps."""
    operands = [z_next, z, eps]
    compute = compute_dtype(*flatten(operands))
    a, b, a_last, b_last, gamma = (per_sample(x, z, compute) for x in (a, b, a_last, b_last, gamma))
    one = torch.ones((), dtype=compute, device=z.device)
    weights = [one / gamma, one / a_last - a / gamma, -(b / gamma + b_last / a_last)]
    result = fold(guide(operands, guidance_scale, compute), weights)
    return like_first(result, z_next)


def denoised_step(
    tensors: Sequence[TensorOrPair],
    x0_weights: Sequence[Number],
    weights: Sequence[Number],
    *,
    x0_weight: Number,
    clip: Number | None = None,
    noise_weight: Number = 0.0,
    next_scale: Number | None = None,
    guidance_scale: Number | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_id: int | Tensor = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x0 = clip(sum p_k x_k); out = sum w_k x_k + x0_weight x0 + w_n n; next = next_scale out."""
    first, compute = first_of(tensors), compute_dtype(*flatten(tensors))
    operands = guide(tensors, guidance_scale, compute)
    x0 = fold(operands, [per_sample(weight, first, compute) for weight in x0_weights])
    if clip is not None:
        bound = per_sample(clip, first, compute)
        x0 = torch.where(x0 > bound, bound, torch.where(x0 < -bound, -bound, x0))
    out = fold(operands, [per_sample(weight, first, compute) for weight in weights])
    out = out + per_sample(x0_weight, first, compute) * x0
    if seed is not None:
        out = plus_noise(out, first, noise_weight, seed, step, sample_id)
    following = None
    if next_scale is not None:
        following = like_first(per_sample(next_scale, first, compute) * out, first)
    return like_first(out, first), like_first(x0, first), following
