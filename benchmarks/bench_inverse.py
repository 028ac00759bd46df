"""A guided update of the inverse solvers, without network and gradient, against the equations as written in the papers.

Ours is the solver's launch after the gradient is computed: the raw output F, the correction and the ancestral noise in
one op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_samplers import DATA, EDM, INDEX, silent
from benchmarks.cases import SEED, Case
from bicm_diffusion import Preconditioned
from bicm_diffusion.samplers.ancestral import Ancestral
from bicm_diffusion.samplers.guide import Evaluation, Plain, Shift, changed
from bicm_diffusion.samplers.loop import Loop
from bicm_diffusion.samplers.prediction import Level, denoised_weights

SCALE = 0.5
HERE = Level(EDM.times[INDEX], EDM.alpha[INDEX], EDM.sigma[INDEX])
SIGMA, BELOW = EDM.sigma[INDEX], EDM.sigma[INDEX - 1]
RATIO = (BELOW / SIGMA) ** 2


def guiding(at: Evaluation) -> None:
    """A guide that is never called; it makes a run handle guided outputs."""


LOOP = Loop("benchmark", silent, torch.empty(1, 1), EDM, prediction=Preconditioned(sigma_data=DATA), guide=guiding)
ROW = Ancestral(LOOP, SEED, 0).rows[INDEX]
OF_STATE, OF_OUTPUT = denoised_weights(LOOP.prediction, HERE)


def update(x: Tensor, F: Tensor, direction: Tensor, weight: float) -> Tensor:
    """The part of a run after its guide has returned a shift of the denoised sample."""
    at = Evaluation(INDEX, *HERE, x, Plain(lambda z, tracked: F, lambda z, output: z))
    output = changed(Shift(direction, weight), at, OF_STATE, OF_OUTPUT)
    noise: dict[str, Any] = {"noise_weight": ROW[2], "seed": SEED}
    return LOOP.advance_with_noise([x, output], ROW[:2], noise)[0]


def ours_dps(x: Tensor, F: Tensor, gradient: Tensor) -> Tensor:
    """One launch: DPS, and LGD, FreeDoM and CM posterior sampling, which differ only in their gradients."""
    return update(x, F, gradient, -SCALE / (1.0 - RATIO))


def ours_mpgd(x: Tensor, F: Tensor, gradient: Tensor) -> Tensor:
    """One launch: the correction is applied to the denoised sample."""
    return update(x, F, gradient, -SCALE)


def dps(x: Tensor, F: Tensor, gradient: Tensor, draw: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
    """EDM's denoiser (eq. 7), an ancestral step, and the correction (DPS Alg. 1)."""
    return ancestral(x, denoised(x, F), draw) - SCALE * gradient


def mpgd(x: Tensor, F: Tensor, gradient: Tensor, draw: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
    """The same with the correction before the step."""
    return ancestral(x, denoised(x, F) - SCALE * gradient, draw)


def denoised(x: Tensor, F: Tensor) -> Tensor:
    """EDM eq. 7."""
    total = DATA**2 + SIGMA**2
    return DATA**2 / total * x + DATA * SIGMA / total**0.5 * F


def ancestral(x: Tensor, x0: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """D + ρ·(x - D) + σ'·√(1 - ρ)·n."""
    return x0 + RATIO * (x - x0) + BELOW * (1.0 - RATIO) ** 0.5 * draw(x)


CASES = (
    Case("inverse_dps", ours_dps, dps, tensors=3, reads=3, writes=1, noise="added"),
    Case("inverse_mpgd", ours_mpgd, mpgd, tensors=3, reads=3, writes=1, noise="added"),
)
