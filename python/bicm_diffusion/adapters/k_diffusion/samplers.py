"""Samplers that are called as k-diffusion's are: `sample_*(model, x, sigmas, extra_args, callback, …)`.

model(x, sigma, **extra_args), sigma (B,), returns the denoised sample; sigmas (N + 1,) descend, usually to 0. Weights
are formed on the host in float64 from one read of `sigmas`; every update is one fused launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.adapters.arithmetic import copy, joined, two_sums, weighted_sum
from bicm_diffusion.adapters.k_diffusion.noise import NoiseSampler
from bicm_diffusion.adapters.k_diffusion.run import Callback, Churn, ChurnedRun, Network, Run, shifted

HALVES = (torch.float16, torch.bfloat16)


def _sampler(advance: Callable[[ChurnedRun, int, Tensor, float, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Make a sampler of its step, which takes the run, the step's number, state and level, and the denoised state."""

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

    x: (B, …), any floating or complex dtype, at sigmas[0]; the result has its shape, or one that the denoised samples
    broadcast to, and its dtype, which the network's sigma has too. A step between equal sigmas leaves x as it is.
    disable hides the progress bar. The callback takes {"x", "i", "sigma", "sigma_hat", "denoised"} before each update;
    what it writes to x counts. Raises ValueError where sigmas rise from 0.

    s_churn, s_tmin, s_tmax, s_noise: EDM's. Noise is `torch.randn_like(x)`, and torch's generator is left as k-diffusion
    leaves it, which draws in every step, also where churn does not act. A noise_sampler(sigma, sigma_next) is asked
    only where it acts; `default_noise_sampler(x)` is one that draws with torch.

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
        run.ask(copy(x), below)
        return x
    # x + half·((x - denoised)/level + (predicted - again)/below). The second evaluation may write to its input and over
    # what the first one returned: the first one's share is summed up before or, where the sum would be rounded to a
    # half, kept.
    ratio, half, before = below / level, (below - level) / 2, run.before(x)
    first, second = [1.0 + half / level, -half / level], [half / below, -half / below]
    if x.dtype in HALVES:
        predicted, kept = weighted_sum([x, denoised], [ratio, 1.0 - ratio]), copy(joined(x, denoised)[1])
    else:
        predicted, halfway = two_sums([x, denoised], [ratio, 1.0 - ratio], first)
    run.show(i, x, denoised)
    predicted = shifted(predicted, x, before)
    again = run.ask(predicted, below)
    if x.dtype in HALVES:
        state = x if before is None else before
        return shifted(weighted_sum([state, kept, predicted, again], first + second), x, before)
    return shifted(weighted_sum([halfway, predicted, again], [1.0, *second]), x, before)


def _euler(run: ChurnedRun, i: int, x: Tensor, level: float, denoised: Tensor) -> Tensor:
    below, before = run.levels[i + 1], run.before(x)
    if below == level:
        moved = copy(joined(x, denoised)[0])
    else:
        ratio = below / level
        moved = weighted_sum([x, denoised], [ratio, 1.0 - ratio])
    run.show(i, x, denoised)
    return shifted(moved, x, before)


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
    before, above = None, 0.0  # the denoised sample of the last step of some length, and its level
    for i in run.steps():
        level, below = run.levels[i], run.levels[i + 1]
        denoised = run.ask(x, level)
        run.show(i, x, denoised)
        if below == level:
            x = copy(joined(x, denoised)[0])
            continue
        ratio = below / level
        if before is None or below == 0.0:
            x = weighted_sum([x, denoised], [ratio, 1.0 - ratio])
        else:
            # Half the inverse of the last step's share of this one, both measured in -ln sigma.
            slope = math.log(level / below) / (2.0 * math.log(above / level))
            gain = 1.0 - ratio
            weights = [ratio, gain * (1.0 + slope), -gain * slope]
            x = weighted_sum([x, denoised, before], weights)
        before, above = denoised, level
    return x
