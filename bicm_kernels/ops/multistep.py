"""Sampler updates: affine maps of a few tensors plus keyed noise, one kernel for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bicm_kernels import backend, reference
from bicm_kernels.ops import arguments, checks
from bicm_kernels.ops.arguments import UNWEIGHTED, Integer, Number, dynamo
from bicm_kernels.ops.op import Op

TensorOrPair = Tensor | tuple[Tensor, Tensor]

_NUMBERS = (float, int)
_BDIA = ("a", "b", "a_last", "b_last", "gamma")
DDIM_STEP = Op("ddim_step", ("z", "eps"), guided=True, coefficients=("a", "b"))
BDIA_STEP = Op("bdia_step", ("z_last", "z", "eps"), guided=True, coefficients=_BDIA)
BDIA_INVERSE_STEP = Op("bdia_inverse_step", ("z_next", "z", "eps"), guided=True, coefficients=_BDIA)
AFFINE_STEP = Op("affine_step", guided=True, weights=("weights",), numbers=("noise_weight",), noise="noise_weight")
DENOISED_STEP = Op(
    "denoised_step",
    guided=True,
    weights=("x0_weights", "weights"),
    numbers=("x0_weight", "clip?", "noise_weight", "next_scale?"),
    noise="noise_weight",
    outs=("out", "x0", "next"),
    needs={"next": "next_scale"},
)


def affine_gradient(gradients: Sequence[Tensor], weights: Sequence[Number]) -> Tensor:
    """The sum of w_k g_k as a derivative; through the reference where it is differentiated or mapped itself."""
    if all(map(arguments.plain_gradient, gradients)):
        found: Tensor = torch.ops.bicm_kernels.affine_step.tensor([*gradients], weights, None, None, None, None, None)
        return found
    return reference.affine_step(gradients, weights)


def ddim_step(
    z: Tensor,
    eps: TensorOrPair,
    *,
    a: Number,
    b: Number,
    guidance_scale: Number | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One DDIM update, or one step of DDIM inversion: a z + b eps (BDIA eq. 6 and 8).

    Args:
        z: state (B, ...), float16, bfloat16, float32 or float64, any strides.
        eps: predicted noise like z, of any of these dtypes; or a pair (eps_uncond, eps_cond) with ``guidance_scale``.
        a, b: alpha_{i-1}/alpha_i and sigma_{i-1} - sigma_i a; float, 0-d or (B,) tensor.
        guidance_scale: s in eps_uncond + s (eps_cond - eps_uncond), which the kernel forms.
        out: receives the result; exactly z or eps, or disjoint from both.

    Returns:
        The next state, in the dtype and layout of z.

    Raises:
        TypeError, ValueError: an argument has another type, shape or device.

    >>> import torch, bicm_kernels as bk
    >>> bk.ddim_step(torch.ones(1, 2), torch.ones(1, 2), a=2.0, b=0.5)
    tensor([[2.5000, 2.5000]])
    """
    return DDIM_STEP.call((z, eps), (a, b), guidance_scale, outs=None if out is None else (out,))


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
    out: Tensor | None = None,
) -> Tensor:
    """One BDIA-DDIM update, z_{i-1} from z_{i+1} and z_i (BDIA eq. 24).

    gamma z_{i+1} + (a_i - gamma/a_{i+1}) z_i + (b_i + gamma b_{i+1}/a_{i+1}) eps_i, folded from the left.

    Args:
        z_last, z: states z_{i+1} and z_i, (B, ...) of one dtype, any strides.
        eps: predicted noise at z_i, or a pair (eps_uncond, eps_cond) with ``guidance_scale``.
        a, b, a_last, b_last: DDIM's coefficients at i and at i + 1; float, 0-d or (B,) tensor.
        gamma: 1 is time-symmetric, 0 is DDIM; float, 0-d or (B,) tensor.
        guidance_scale: s in eps_uncond + s (eps_cond - eps_uncond), which the kernel forms.
        out: receives the result; exactly one of the tensors, or disjoint from all.

    Returns:
        z_{i-1}, in the dtype and layout of z_last.

    Raises:
        TypeError, ValueError: an argument has another type, shape or device.

    >>> import torch, bicm_kernels as bk
    >>> x = torch.ones(1, 2); bk.bdia_step(x, x, x, a=1.0, b=0.5, a_last=1.0, b_last=0.5)
    tensor([[2., 2.]])
    """
    coefficients = (a, b, a_last, b_last, gamma)
    return BDIA_STEP.call((z_last, z, eps), coefficients, guidance_scale, outs=None if out is None else (out,))


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
    out: Tensor | None = None,
) -> Tensor:
    """The inverse of ``bdia_step``: z_{i+1} from z_{i-1} and z_i (BDIA eq. 28), up to rounding that grows as gamma^-N.

    z_{i-1}/gamma + (1/a_{i+1} - a_i/gamma) z_i - (b_i/gamma + b_{i+1}/a_{i+1}) eps_i, folded from the left.

    Args:
        z_next, z: states z_{i-1} and z_i, (B, ...) of one dtype, any strides.
        eps, a, b, a_last, b_last, guidance_scale, out: as for ``bdia_step``.
        gamma: as for ``bdia_step``; at 0, and where a_last is 0, there is no inverse, and the result is not finite.

    Returns:
        z_{i+1}, in the dtype and layout of z_next.

    Raises:
        TypeError, ValueError: an argument has another type, shape or device.

    >>> import torch, bicm_kernels as bk
    >>> x = torch.ones(1, 2); bk.bdia_inverse_step(2 * x, x, x, a=1.0, b=0.5, a_last=1.0, b_last=0.5)
    tensor([[1., 1.]])
    """
    coefficients = (a, b, a_last, b_last, gamma)
    return BDIA_INVERSE_STEP.call((z_next, z, eps), coefficients, guidance_scale, outs=None if out is None else (out,))


def affine_step(
    tensors: Sequence[TensorOrPair],
    weights: Sequence[Number],
    *,
    noise_weight: Number = UNWEIGHTED,
    guidance_scale: Number | None = None,
    seed: Integer | None = None,
    step: Integer = 0,
    sample_id: Integer = 0,
    out: Tensor | None = None,
) -> Tensor:
    """An affine sampler update: sum of w_k x_k plus w_n n, a left fold with keyed noise last.

    Args:
        tensors: 1 to 5 tensors (B, ...), any floating dtypes and strides; the last may be a pair
            (eps_uncond, eps_cond) with ``guidance_scale``.
        weights: one per tensor; float, 0-d or (B,) tensor.
        noise_weight: weight of the noise; a sample whose weight is exactly 0 draws none. If it is omitted while a seed
            is given, nothing is drawn, and a warning is issued once.
        guidance_scale: s in eps_uncond + s (eps_cond - eps_uncond), which the kernel forms.
        seed, step, sample_id: the noise's key, see ``normal``; None draws no noise. A loop must pass a different
            ``step`` each time, or all steps draw the same noise.
        out: receives the result; exactly one of the tensors, or disjoint from all.

    Returns:
        The sum, in the dtype and layout of the first tensor.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device or range.

    >>> import torch, bicm_kernels as bk
    >>> bk.affine_step([torch.ones(1, 2), torch.ones(1, 2)], [2.0, 0.5])
    tensor([[2.5000, 2.5000]])
    """
    if seed is not None and noise_weight is UNWEIGHTED:
        arguments.notice_unweighted("affine_step")
    outs = None if out is None else (out,)
    return AFFINE_STEP.call(tensors, weights, guidance_scale, noise_weight, seed, step, sample_id, outs=outs)


class DenoisedStep(NamedTuple):
    """What ``denoised_step`` returns: the next state, the denoised sample, and the scaled input or None."""

    out: Tensor
    x0: Tensor
    next: Tensor | None


def denoised_step(
    tensors: Sequence[TensorOrPair],
    x0_weights: Sequence[Number],
    weights: Sequence[Number],
    *,
    x0_weight: Number,
    clip: Number | None = None,
    noise_weight: Number = UNWEIGHTED,
    next_scale: Number | None = None,
    guidance_scale: Number | None = None,
    seed: Integer | None = None,
    step: Integer = 0,
    sample_id: Integer = 0,
    out: Sequence[Tensor] | None = None,
) -> DenoisedStep:
    """A sampler update that passes through the denoised sample, and the next evaluation's scaled input, in one pass.

    x0 = clip(sum of p_k x_k); out = sum of w_k x_k + x0_weight x0 + w_n n; next = next_scale out.

    Args:
        tensors: 1 to 5 tensors (B, ...), any floating dtypes and strides; the last may be a pair
            (eps_uncond, eps_cond) with ``guidance_scale``.
        x0_weights, weights: p_k and w_k, one per tensor; float, 0-d or (B,) tensor.
        x0_weight: weight of x0 in the result.
        clip: x0 is clipped to [-clip, clip], >= 0 (checked for floats); None clips nothing.
        noise_weight, seed, step, sample_id: keyed noise, see ``affine_step``.
        next_scale: c_in of the next evaluation; None returns no scaled input.
        guidance_scale: s in eps_uncond + s (eps_cond - eps_uncond), which the kernel forms.
        out: (out, x0) or, with next_scale, (out, x0, next) that receive the results; each may be exactly an input.

    Returns:
        A named tuple (out, x0, next), all in the dtype and layout of the first tensor; next is None without
        ``next_scale``.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device or range.

    >>> import torch, bicm_kernels as bk
    >>> bk.denoised_step([torch.full((1, 1), 3.0)], [1.0], [0.5], x0_weight=0.5, clip=1.0)
    DenoisedStep(out=tensor([[2.]]), x0=tensor([[1.]]), next=None)
    """
    if seed is not None and noise_weight is UNWEIGHTED:
        arguments.notice_unweighted("denoised_step")
    if clip is not None and not dynamo() and isinstance(clip, _NUMBERS) and clip < 0.0:
        raise ValueError(f"clip must be at least 0, or None, got {clip}")
    call = (
        tensors,
        x0_weights,
        weights,
        guidance_scale,
        x0_weight,
        clip,
        noise_weight,
        next_scale,
        seed,
        step,
        sample_id,
    )
    outs: tuple[Tensor, ...] | None = None
    direct = backend.direct
    if direct is not None and out is None and not dynamo():
        results = direct.denoised_step(*call)  # as in `Op.call`, which takes longer to be called than to do this
        if results is None:
            results = DENOISED_STEP.call(*call, refused=True)
        return tuple.__new__(DenoisedStep, results)
    if out is not None:
        checks.check_sequence("out", out, "(out, x0)" if next_scale is None else "(out, x0, next)")
        outs = tuple(out)
        if len(outs) != (2 if next_scale is None else 3):
            raise ValueError(f"out must hold (out, x0), and next with next_scale, got {len(outs)} tensors")
    results = DENOISED_STEP.call(*call) if outs is None else DENOISED_STEP.call(*call, outs=outs)
    return tuple.__new__(DenoisedStep, results)
