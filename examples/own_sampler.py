"""A sampler of your own from the fused ops, and one whose inversion returns every bit.

Both integrate the probability-flow ODE dx/dσ = d(x, σ) = (x − D(x, σ))/σ of a variance-exploding process:

* Adams–Bashforth of order two, one launch per step: x' = x + h·(d + h/(2h₋)·(d − d₋)), h and h₋ this and the last step;
* leapfrog, x' = x₋ + (σ' − σ₋)·d(x), on integers: both directions add or subtract the same rounded increment.

    python examples/own_sampler.py

Needs no extra.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

import bicm_kernels as bk
from bicm_diffusion import karras_levels

Denoiser = Callable[[Tensor, float], Tensor]


def adams_bashforth_sample(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Samples at the last level from x (B, …) at the first; sigmas fall and stay above 0.

    It can be differentiated: the ops record gradients. Call it under `torch.no_grad()` where none are wanted.
    """
    last: tuple[Tensor, Tensor, float, float] | None = None
    for sigma, following in pairwise(sigmas):
        h, denoised = following - sigma, denoiser(x, sigma)
        if last is None:
            # d = (x − D)/σ: its two terms are weights of one affine map.
            reached = bk.affine_step([x, denoised], [1 + h / sigma, -h / sigma])
        else:
            x_last, denoised_last, sigma_last, h_last = last
            of_d, of_last = h * (1 + h / (2 * h_last)) / sigma, h * h / (2 * h_last) / sigma_last
            tensors = [x, denoised, x_last, denoised_last]
            reached = bk.affine_step(tensors, [1 + of_d, -of_d, -of_last, of_last])
        last, x = (x, denoised, sigma, h), reached
    return x


def slope(denoiser: Denoiser, q: Tensor, levels: tuple[float, float, float]) -> tuple[list[Tensor], list[float]]:
    """The tensors and weights of (σ' − σ₋)·d at the middle level, from the middle state only."""
    before, sigma, after = levels
    x, weight = bk.fixed_point_decode(q), (after - before) / sigma
    return [x, denoiser(x, sigma)], [weight, -weight]


@torch.no_grad()
def leapfrog_sample(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The int64 states at the last two levels, from x (B, …) at the first; Euler's method makes the second state."""
    h = (sigmas[1] - sigmas[0]) / sigmas[0]
    second = bk.affine_step([x, denoiser(x, sigmas[0])], [1 + h, -h])
    last, current = bk.fixed_point_encode(x), bk.fixed_point_encode(second)
    info = torch.zeros_like(last)  # remainders of a ratio n/m; the ratio 1 leaves none
    for levels in zip(sigmas[:-2], sigmas[1:-1], sigmas[2:], strict=True):
        following, info = bk.exact_affine_step(last, *slope(denoiser, current, levels), info)
        last, current = current, following
    return last, current


@torch.no_grad()
def leapfrog_invert(denoiser: Denoiser, pair: tuple[Tensor, Tensor], sigmas: Sequence[float]) -> Tensor:
    """What `leapfrog_sample` started from, to the bit, given a denoiser that returns the same bits twice."""
    current, following = pair
    info = torch.zeros_like(current)
    for levels in reversed(list(zip(sigmas[:-2], sigmas[1:-1], sigmas[2:], strict=True))):
        last, info = bk.exact_affine_inverse_step(following, *slope(denoiser, current, levels), info)
        following, current = current, last
    return bk.fixed_point_decode(current)


def main() -> None:
    # The exact denoiser of data N(0, 1/4), so that the result is known: x·√(1/4 + σ_min²)/√(1/4 + σ_max²).
    def denoiser(x: Tensor, sigma: float) -> Tensor:
        return 0.25 / (0.25 + sigma * sigma) * x

    sigmas = karras_levels(60).flip(0).tolist()
    # On the integers' grid, so that the inversion returns the same numbers.
    x = (80 * bk.normal((16, 3, 8, 8), seed=0) * 2**16).round() / 2**16
    exact = x * ((0.25 + sigmas[-1] ** 2) / (0.25 + sigmas[0] ** 2)) ** 0.5
    error = (adams_bashforth_sample(denoiser, x, sigmas) - exact).abs().max()
    print(f"Adams-Bashforth, 60 levels: error {error:.1e}")
    pair = leapfrog_sample(denoiser, x, sigmas)
    error = (bk.fixed_point_decode(pair[1]) - exact).abs().max()
    back = leapfrog_invert(denoiser, pair, sigmas)
    print(f"leapfrog, 60 levels: error {error:.1e}; inverted to the bit: {torch.equal(back, x)}")


if __name__ == "__main__":
    main()
