"""Sampler updates against the equations as written in the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bicm_kernels as bk
from benchmarks.cases import SEED, Case

BDIA = {"a": 1.021, "b": -0.034, "a_last": 1.025, "b_last": -0.041, "gamma": 0.96}
DDIM = {"a": 1.021, "b": -0.034}
GUIDANCE = 7.5
ADAMS = {"weights": [1.021, -0.071, 0.076, -0.047, 0.012]}
ANCESTRAL = {"weights": [1.021, -0.052], "noise_weight": 0.18}
# An Euler step of a preconditioned denoiser from sigma = 2 to 1.2, and c_in of the next evaluation.
EULER = {"c_skip": 0.0588, "c_out": 0.485, "ratio": 0.6, "clip": 1.0, "next_scale": 0.769}


def bdia(
    z_last: Tensor, z: Tensor, eps: Tensor, *, a: float, b: float, a_last: float, b_last: float, gamma: float
) -> Tensor:
    """BDIA eq. 24, as written."""
    return gamma * z_last - gamma * (z / a_last - (b_last / a_last) * eps) + (a * z + b * eps)


def bdia_guided(
    z_last: Tensor,
    z: Tensor,
    eps_uncond: Tensor,
    eps_cond: Tensor,
    *,
    guidance_scale: float,
    **bdia_numbers: float,
) -> Tensor:
    """Classifier-free guidance, then BDIA eq. 24."""
    eps = eps_uncond + guidance_scale * (eps_cond - eps_uncond)
    return bdia(z_last, z, eps, **bdia_numbers)


def bdia_inverse(
    z_next: Tensor, z: Tensor, eps: Tensor, *, a: float, b: float, a_last: float, b_last: float, gamma: float
) -> Tensor:
    """BDIA eq. 28, as written."""
    return z_next / gamma - (a * z + b * eps) / gamma + (z / a_last - (b_last / a_last) * eps)


def ddim(z: Tensor, eps: Tensor, *, a: float, b: float) -> Tensor:
    """BDIA eq. 6, as written."""
    return a * z + b * eps


def adams(z: Tensor, e1: Tensor, e2: Tensor, e3: Tensor, e4: Tensor, *, weights: list[float]) -> Tensor:
    """A linear multistep update from the four last predictions."""
    w0, w1, w2, w3, w4 = weights
    return w0 * z + w1 * e1 + w2 * e2 + w3 * e3 + w4 * e4


def ancestral(
    z: Tensor,
    eps: Tensor,
    *,
    weights: list[float],
    noise_weight: float,
    draw: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """A DDIM update with eta > 0."""
    return weights[0] * z + weights[1] * eps + noise_weight * draw(z)


def euler(
    x: Tensor, F: Tensor, *, c_skip: float, c_out: float, ratio: float, clip: float, next_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The denoised sample, clipped; an Euler step towards it; the input of the next evaluation."""
    x0 = (c_skip * x + c_out * F).clamp(-clip, clip)
    out = ratio * x + (1 - ratio) * x0
    return out, x0, next_scale * out


def ours_bdia_guided(z_last: Tensor, z: Tensor, eps_uncond: Tensor, eps_cond: Tensor, **numbers: Any) -> Tensor:
    """``bdia_step`` with a pair of predictions."""
    return bk.bdia_step(z_last, z, (eps_uncond, eps_cond), **numbers)


def ours_affine(*tensors: Tensor, **numbers: Any) -> Tensor:
    """``affine_step`` of tensors given one by one."""
    return bk.affine_step(tensors, **numbers)


def ours_ancestral(*tensors: Tensor, **numbers: Any) -> Tensor:
    """``affine_step`` with noise."""
    return bk.affine_step(tensors, seed=SEED, **numbers)


def ours_euler(
    *tensors: Tensor, c_skip: float, c_out: float, ratio: float, **numbers: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``denoised_step`` as an Euler step."""
    return bk.denoised_step(tensors, [c_skip, c_out], [ratio, 0.0], x0_weight=1 - ratio, **numbers)


CASES = (
    Case("bdia_step", bk.bdia_step, bdia, tensors=3, reads=3, writes=1, coefficients=BDIA),
    Case(
        "bdia_step_guided",
        ours_bdia_guided,
        bdia_guided,
        tensors=4,
        reads=4,
        writes=1,
        coefficients=BDIA | {"guidance_scale": GUIDANCE},
    ),
    Case(
        "bdia_inverse_step",
        bk.bdia_inverse_step,
        bdia_inverse,
        tensors=3,
        reads=3,
        writes=1,
        coefficients=BDIA,
    ),
    Case("ddim_step", bk.ddim_step, ddim, tensors=2, reads=2, writes=1, coefficients=DDIM),
    Case("affine_step_5", ours_affine, adams, tensors=5, reads=5, writes=1, coefficients=ADAMS),
    Case(
        "affine_step_noise",
        ours_ancestral,
        ancestral,
        tensors=2,
        reads=2,
        writes=1,
        coefficients=ANCESTRAL,
        noise="added",
    ),
    Case("denoised_step", ours_euler, euler, tensors=2, reads=2, writes=3, coefficients=EULER),
)
