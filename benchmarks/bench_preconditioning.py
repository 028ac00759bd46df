"""Preconditioning against the tensor operations of consistency models' code, with a level per sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import bicm_kernels as bk
from benchmarks.cases import SEED, Case, column

SIGMA_DATA = 0.5


def scale_input(x: Tensor, t: Tensor) -> Tensor:
    """``scale_input`` with a level per sample."""
    return bk.scale_input(x, t)


def torch_scale_input(x: Tensor, t: Tensor) -> Tensor:
    """c_in x as EDM writes it."""
    t = column(t, x)
    return x * (1 / (SIGMA_DATA**2 + t**2).sqrt()).to(x.dtype)


def denoise(x: Tensor, F: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """``denoise`` from a level to a level, both per sample."""
    return bk.denoise(x, F, t, u)


def torch_denoise(x: Tensor, F: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """BCM eq. 20, 39 and 43 as written."""
    t, u = column(t, x), column(u, x)
    c_skip = (SIGMA_DATA**2 + t * u) / (SIGMA_DATA**2 + t**2)
    c_out = SIGMA_DATA * (t - u) / (SIGMA_DATA**2 + t**2).sqrt()
    return c_skip.to(x.dtype) * x + c_out.to(x.dtype) * F


def renoise(x: Tensor, F: Tensor, t: Tensor, u: Tensor, *, sigma: float) -> tuple[Tensor, Tensor]:
    """``renoise`` with the benchmark's seed."""
    return bk.renoise(x, F, t, u, sigma, seed=SEED)


def torch_renoise(
    x: Tensor, F: Tensor, t: Tensor, u: Tensor, *, sigma: float, draw: Callable[[Tensor], Tensor] = torch.randn_like
) -> tuple[Tensor, Tensor]:
    """The denoised sample, fresh noise, and the next evaluation's input, one after the other."""
    noisy = torch_denoise(x, F, t, u) + sigma * draw(x)
    return noisy, noisy * (1 / (SIGMA_DATA**2 + sigma**2) ** 0.5)


def generated_pair(x: Tensor, F: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """``noisy_pair`` of the network's predictions, scaled for the network."""
    return bk.noisy_pair(x, t, 1.5 * t, F=F, sigma_data=SIGMA_DATA, seed=SEED, step=0)


def torch_generated_pair(
    x: Tensor, F: Tensor, t: Tensor, *, draw: Callable[[Tensor], Tensor] = torch.randn_like
) -> tuple[Tensor, Tensor]:
    """GC Alg. 1: noise, the denoised sample, the same noise at both levels, c_in."""
    noise, low = draw(x), column(t, x)
    generated = torch_denoise(x + low.to(x.dtype) * noise, F, t, torch.full_like(t, 0.002))
    both = [(level, generated + level.to(x.dtype) * noise) for level in (low, 1.5 * low)]
    first, second = (y * (1 / (SIGMA_DATA**2 + level**2).sqrt()).to(x.dtype) for level, y in both)
    return first, second


CASES = (
    Case("scale_input", scale_input, torch_scale_input, tensors=1, reads=1, writes=1, per_sample=1),
    Case("denoise", denoise, torch_denoise, tensors=2, reads=2, writes=1, per_sample=2),
    Case(
        "renoise",
        renoise,
        torch_renoise,
        tensors=2,
        reads=2,
        writes=2,
        per_sample=2,
        coefficients={"sigma": 0.7},
        noise="added",
    ),
    Case(
        "noisy_pair_generated",
        generated_pair,
        torch_generated_pair,
        tensors=2,
        reads=2,
        writes=2,
        per_sample=1,
        noise="added",
    ),
)
