"""Samplers with k-diffusion's signatures: `sample_*(model, x, sigmas, extra_args, callback, …)`.

model(x, sigma, **extra_args), sigma (B,), returns the denoised sample; sigmas (N + 1,) descend, usually to 0. Weights
are formed on the host in float64 from one read of `sigmas`; every update is one fused launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.adapters.arithmetic import joined, two_sums, weighted_sum
from bicm_diffusion.adapters.k_diffusion.ancestral import ancestral_ratios, with_noise
from bicm_diffusion.adapters.k_diffusion.noise import NoiseSampler, default_noise_sampler
from bicm_diffusion.adapters.k_diffusion.run import Callback, Churn, ChurnedRun, Network, Run, shifted

HALVES = (torch.float16, torch.bfloat16)


def _sampler(advance: Callable[[ChurnedRun, int, Tensor, float, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Make a sampler from its step, which takes the run, the step's index, state and level, and the denoised state."""

    @torch.no_grad()
    def sample(
        model: Network,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        disable: bool | None = None,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        noise_sampler: NoiseSampler | None = None,
    ) -> Tensor:
        churn = Churn(s_churn, s_tmin, s_tmax, s_noise, noise_sampler)
        run = ChurnedRun(churn, model, x, sigmas, extra_args, callback, disable)
        for i in run.steps():
            x, level = run.churned(x, i)
            x = advance(run, i, x, level, run.ask(x, level))
        return x

    sample.__name__, sample.__qualname__, sample.__doc__ = advance.__name__, advance.__qualname__, advance.__doc__
    return sample


@_sampler
def sample_euler(run: ChurnedRun, i: int, x: Tensor, level: float, denoised: Tensor) -> Tensor:
    """Return a sample by Euler's method (EDM Alg. 2 without its second-order correction).

    x: (B, …), any floating or complex dtype, at sigmas[0]; the result has its shape, or one that the denoised
    samples broadcast to, and its dtype, complex where they are. A step between equal sigmas leaves x unchanged. disable
    hides the progress bar. The callback receives {"x", "i", "sigma", "sigma_hat", "denoised"} before each update; its
    writes to x take effect.

    s_churn, s_tmin, s_tmax, s_noise: EDM's. Noise is `torch.randn_like(x)`, drawn in every step as in k-diffusion,
    also where churn does not act; a noise_sampler(sigma, sigma_next) is called only where it acts
    (`default_noise_sampler(x)` draws with torch too). Raises ValueError where sigmas rise from 0.

    >>> sample_euler(lambda x, sigma: 0 * x, torch.ones(1, 2), torch.tensor([2.0, 1.0, 0.0]), disable=True)
    tensor([[0., 0.]])
    """
    return _euler(run, i, x, level, denoised)


@_sampler
def sample_heun(run: ChurnedRun, i: int, x: Tensor, level: float, denoised: Tensor) -> Tensor:
    """Return a sample by Heun's method (EDM Alg. 2); a step to sigma = 0 is Euler's. Arguments as for `sample_euler`.

    >>> sample_heun(lambda x, sigma: 0 * x, torch.ones(1, 2), torch.tensor([2.0, 1.0, 0.0]), disable=True)
    tensor([[0., 0.]])
    """
    below = run.levels[i + 1]
    if below == 0.0:
        return _euler(run, i, x, level, denoised)
    if below == level:
        x = _euler(run, i, x, level, denoised)
        run.ask(x.clone(), below)
        return x
    # x + half·((x - denoised)/level + (predicted - again)/below). The second evaluation may overwrite its input and the
    # first one's result: the first one's terms are summed before or, where the sum would be rounded to a
    # half, kept.
    ratio, half = below / level, (below - level) / 2
    first, second = [1.0 + half / level, -half / level], [half / below, -half / below]
    state, target = joined(x, denoised)
    if state.dtype in HALVES:
        kept = state if run.callback is None else state.clone(), target.clone()
        predicted = weighted_sum([state, target], [ratio, 1.0 - ratio])
        (predicted,) = run.told(i, x, denoised, predicted)
        moved = weighted_sum(joined(*kept, predicted, run.ask(predicted, below)), first + second)
        return moved if run.callback is None else shifted(moved, x, kept[0])
    predicted, halfway = two_sums([state, target], [ratio, 1.0 - ratio], first)
    predicted, halfway = run.told(i, x, denoised, predicted, halfway)
    return weighted_sum(joined(halfway, predicted, run.ask(predicted, below)), [1.0, *second])


def _euler(run: ChurnedRun, i: int, x: Tensor, level: float, denoised: Tensor) -> Tensor:
    below = run.levels[i + 1]
    state, target = joined(x, denoised)
    if below == level:
        moved = state.clone()
    else:
        ratio = below / level
        moved = weighted_sum([state, target], [ratio, 1.0 - ratio])
    return run.told(i, x, denoised, moved)[0]


@torch.no_grad()
def sample_dpmpp_2m(
    model: Network,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """Return a sample by DPM-Solver++(2M) (DPM-Solver++ Alg. 2). Arguments as for `sample_euler`.

    >>> sample_dpmpp_2m(lambda x, sigma: 0 * x, torch.ones(1, 2), torch.tensor([2.0, 1.0, 0.0]), disable=True)
    tensor([[0., 0.]])
    """
    run = Run(model, x, sigmas, extra_args, callback, disable)
    before, above = None, 0.0  # the denoised sample of the last step of nonzero length, and its level
    for i in run.steps():
        level, below = run.levels[i], run.levels[i + 1]
        denoised = run.ask(x, level)
        run.show(i, x, denoised, sigmas[i])
        if below == level:
            x = joined(x, denoised)[0].clone()
            continue
        ratio = below / level
        if before is None or below == 0.0:
            x = weighted_sum(joined(x, denoised), [ratio, 1.0 - ratio])
        else:
            # Half the inverse ratio of the last step's length to this one's, both in -ln sigma.
            slope = math.log(level / below) / (2.0 * math.log(above / level))
            gain = 1.0 - ratio
            weights = [ratio, gain * (1.0 + slope), -gain * slope]
            x = weighted_sum(joined(x, denoised, before), weights)
        before, above = denoised, level
    return x


@torch.no_grad()
def sample_euler_ancestral(
    model: Network,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float | Tensor = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Return a sample by ancestral steps: Euler's method down to σ_down, then noise of level σ_up.

    σ_up = min(σ', η·σ'·√(1 - σ'²/σ²)) and σ_down² = σ'² - σ_up²; eta: η. s_noise multiplies the noise, a number or a
    tensor. Noise is `torch.randn_like(x)` of the given x; a noise_sampler(sigma, sigma_next) is called in every
    step except those to 0. The callback may write to x, and its step continues from there. The rest: as for
    `sample_euler`. Raises ValueError where sigmas rise.

    >>> sample_euler_ancestral(lambda x, sigma: 0 * x, torch.ones(1, 2), torch.tensor([2.0, 0.0]), disable=True)
    tensor([[0., 0.]])
    """
    run = Run(model, x, sigmas, extra_args, callback, disable)
    draw = default_noise_sampler(x) if noise_sampler is None else noise_sampler
    ratios = [ancestral_ratios(level, below, float(eta)) for level, below in pairwise(run.levels)]
    for i in run.steps():
        denoised = run.ask(x, run.levels[i])
        run.show(i, x, denoised, sigmas[i])
        down, up = ratios[i]
        tensors, weights = [denoised], [down, 1.0 - down]
        if run.levels[i + 1] > 0.0:
            with_noise(tensors, weights, draw(sigmas[i], sigmas[i + 1]), s_noise, up)
        x = weighted_sum(joined(x, *tensors), weights)
    return x
