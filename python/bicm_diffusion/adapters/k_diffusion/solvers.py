"""k-diffusion's DPM-Solver++ samplers with noise, and its linear multistep sampler; every update is one launch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from bicm_diffusion.adapters.arithmetic import joined, two_sums, weighted_sum
from bicm_diffusion.adapters.k_diffusion.ancestral import ancestral_ratios, with_noise
from bicm_diffusion.adapters.k_diffusion.noise import NoiseSampler, brownian_noise_sampler, default_noise_sampler
from bicm_diffusion.adapters.k_diffusion.run import Callback, Network, Run, shifted

#: How many tensors one launch adds up.
MOST_TERMS = 5


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
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
    """Return a sample by DPM-Solver++(2S) down to σ_down, then noise of level σ_up: two evaluations a step.

    σ_down, σ_up, eta, s_noise and the noise: as for `sample_euler_ancestral`; a step to σ_down = 0 is
    Euler's. The rest: as for `sample_euler`. Raises ValueError where sigmas rise.

    >>> sample_dpmpp_2s_ancestral(lambda x, sigma: 0 * x, torch.ones(1, 2), torch.tensor([2.0, 0.0]), disable=True)
    tensor([[0., 0.]])
    """
    run = Run(model, x, sigmas, extra_args, callback, disable)
    draw = default_noise_sampler(x) if noise_sampler is None else noise_sampler
    ratios = [ancestral_ratios(level, below, float(eta)) for level, below in pairwise(run.levels)]
    for i in run.steps():
        level, (down, up) = run.levels[i], ratios[i]
        denoised = run.ask(x, level)
        run.show(i, x, denoised, sigmas[i])
        if down:
            half = math.sqrt(down)
            middle = weighted_sum(joined(x, denoised), [half, 1.0 - half])
            denoised = run.ask(middle, half * level)
        tensors, weights = [denoised], [down, 1.0 - down]
        if run.levels[i + 1] > 0.0:
            with_noise(tensors, weights, draw(sigmas[i], sigmas[i + 1]), s_noise, up)
        x = weighted_sum(joined(x, *tensors), weights)
    return x


@torch.no_grad()
def sample_dpmpp_sde(
    model: Network,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float | Tensor = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 1 / 2,
) -> Tensor:
    """Return a sample by DPM-Solver++ SDE: two evaluations and two noises a step.

    r: the position of the second evaluation between the levels, in ln σ. A noise_sampler(sigma, sigma_next) is called
    for the intermediate and the whole step, with levels rounded by exp(ln σ), as in k-diffusion; without one the noise
    is a Brownian path, `brownian_noise_sampler`. eta, s_noise: as for `sample_euler_ancestral`, the rest: as for
    `sample_euler`. Raises ValueError where sigmas rise, ImportError without a noise_sampler where torchsde is not
    installed.

    >>> draw = default_noise_sampler(torch.ones(1, 2))
    >>> sigmas = torch.tensor([2.0, 0.0])
    >>> sample_dpmpp_sde(lambda x, sigma: 0 * x, torch.ones(1, 2), sigmas, disable=True, noise_sampler=draw)
    tensor([[0., 0.]])
    """
    run = Run(model, x, sigmas, extra_args, callback, disable)
    draw = brownian_noise_sampler(x, sigmas) if noise_sampler is None else noise_sampler
    share = 1.0 / (2.0 * r)
    for i in run.steps():
        level, below = run.levels[i], run.levels[i + 1]
        denoised = run.ask(x, level)
        run.show(i, x, denoised, sigmas[i])
        if below == 0.0:
            x = weighted_sum(joined(x, denoised), [0.0, 1.0])
            continue
        t, t_next = sigmas[i].log().neg(), sigmas[i + 1].log().neg()
        middle = (t + (t_next - t) * r).neg().exp()
        between = level * (below / level) ** r
        down, up = ancestral_ratios(level, between, float(eta))
        tensors, weights = [denoised], [down, 1.0 - down]
        with_noise(tensors, weights, draw(t.neg().exp(), middle), s_noise, up)
        second = run.ask(weighted_sum(joined(x, *tensors), weights), between)
        down, up = ancestral_ratios(level, below, float(eta))
        gain = 1.0 - down
        tensors, weights = [denoised, second], [down, gain * (1.0 - share), gain * share]
        with_noise(tensors, weights, draw(t.neg().exp(), t_next.neg().exp()), s_noise, up)
        x = weighted_sum(joined(x, *tensors), weights)
    return x


@torch.no_grad()
def sample_dpmpp_2m_sde(
    model: Network,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float | Tensor = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
) -> Tensor:
    """Return a sample by DPM-Solver++(2M) SDE (DPM-Solver++ eq. 14 at eta = 1): one evaluation and one noise a step.

    A step to σ = 0 returns the denoised sample. noise_sampler: without one, `brownian_noise_sampler`. The other
    arguments: as for `sample_euler_ancestral`. Raises ValueError for another solver_type.

    >>> draw = default_noise_sampler(torch.ones(1, 2))
    >>> sigmas = torch.tensor([2.0, 0.0])
    >>> sample_dpmpp_2m_sde(lambda x, sigma: 0 * x, torch.ones(1, 2), sigmas, disable=True, noise_sampler=draw)
    tensor([[0., 0.]])
    """
    if solver_type not in ("heun", "midpoint"):
        raise ValueError(f"solver_type: expected 'heun' or 'midpoint', got {solver_type!r}")
    run = Run(model, x, sigmas, extra_args, callback, disable)
    return _multistep(run, x, eta, s_noise, noise_sampler, 2, solver_type == "midpoint")


@torch.no_grad()
def sample_dpmpp_3m_sde(
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
    """Return a sample by DPM-Solver++(3M) SDE: one evaluation and one noise a step. See `sample_dpmpp_2m_sde`.

    >>> draw = default_noise_sampler(torch.ones(1, 2))
    >>> sigmas = torch.tensor([2.0, 0.0])
    >>> sample_dpmpp_3m_sde(lambda x, sigma: 0 * x, torch.ones(1, 2), sigmas, disable=True, noise_sampler=draw)
    tensor([[0., 0.]])
    """
    run = Run(model, x, sigmas, extra_args, callback, disable)
    return _multistep(run, x, eta, s_noise, noise_sampler, 3, midpoint=False)


def _multistep(
    run: Run,
    x: Tensor,
    eta: float,
    s_noise: float | Tensor,
    noise_sampler: NoiseSampler | None,
    order: int,
    midpoint: bool,
) -> Tensor:
    sigmas = run.sigmas
    draw = brownian_noise_sampler(x, sigmas) if noise_sampler is None else noise_sampler
    #: Denoised samples of earlier steps of nonzero length, the last one first, and these lengths in ln σ.
    history: list[Tensor] = []
    lengths: list[float] = []
    for i in run.steps():
        level, below = run.levels[i], run.levels[i + 1]
        denoised = run.ask(x, level)
        run.show(i, x, denoised, sigmas[i])
        if below == 0.0:
            x = weighted_sum(joined(x, denoised), [0.0, 1.0])
            continue
        h = math.log(level / below)
        if eta and h < 0.0:
            raise ValueError(f"sigmas: expected levels that do not rise, got {level} and then {below}")
        if h:
            weights = solver_weights(h, lengths, float(eta), midpoint)
            tensors = [denoised, *history]
        else:
            tensors, weights = [], [1.0]
        if eta:
            deviation = below * math.sqrt(-math.expm1(-2.0 * eta * h))
            with_noise(tensors, weights, draw(sigmas[i], sigmas[i + 1]), s_noise, deviation)
        x = weighted_sum(joined(x, *tensors), weights) if tensors else x.clone()
        if h:
            history, lengths = [denoised, *history][: order - 1], [h, *lengths][: order - 1]
    return x


def solver_weights(h: float, lengths: Sequence[float], eta: float, midpoint: bool) -> list[float]:
    """Weights of the state and of the denoised samples, from now backwards, in a step of length h in ln σ.

    lengths: of the steps before, none for the first order, one for the second, two for the third.

    >>> [round(w, 3) for w in solver_weights(1.0, [1.0], 0.0, True)]
    [0.368, 0.948, -0.316]
    """
    whole = h * (1.0 + eta)
    kept, gain = math.exp(-whole), -math.expm1(-whole)
    if not lengths:
        return [kept, gain]
    slope = 1.0 - gain / whole
    if len(lengths) == 1:
        change = (0.5 * gain if midpoint else slope) * h / lengths[0]
        return [kept, gain + change, -change]
    before, earlier = lengths[0] / h, lengths[1] / h
    share, curve = before / (before + earlier), (slope / whole - 0.5) / (before + earlier)
    near = (slope * (1.0 + share) - curve) / before
    far = (curve - slope * share) / earlier
    return [kept, gain + near, far - near, -far]


@torch.no_grad()
def sample_lms(
    model: Network,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
) -> Tensor:
    """Return a sample by the linear multistep method: slopes of up to `order` steps, integrated as a polynomial.

    Arguments as for `sample_euler`. Raises ValueError for an order below 1.

    >>> sample_lms(lambda x, sigma: 0 * x, torch.ones(1, 2), torch.tensor([2.0, 1.0, 0.0]), disable=True)
    tensor([[0., 0.]])
    """
    if order < 1:
        raise ValueError(f"order: expected at least 1, got {order}")
    run = Run(model, x, sigmas, extra_args, callback, disable)
    slopes: list[Tensor] = []
    levels: list[float] = []
    for i in run.steps():
        level, below = run.levels[i], run.levels[i + 1]
        denoised = run.ask(x, level)
        if level == below:
            run.show(i, x, denoised, sigmas[i])
            x = joined(x, denoised)[0].clone()
            continue
        first, *weights = polynomial_weights([level, *levels][:order], below)
        kept = slopes[: order - 1]
        # The slope, which later steps take, is made in the same launch.
        tensors = joined(x, denoised, *kept[: MOST_TERMS - 2])
        sums = [1.0 + first / level, -first / level, *weights[: MOST_TERMS - 2]]
        moved, made = two_sums(tensors, sums, [1.0 / level, -1.0 / level, *[0.0] * (len(tensors) - 2)])
        for k in range(MOST_TERMS - 2, len(kept), MOST_TERMS - 1):
            some = slice(k, k + MOST_TERMS - 1)
            moved = weighted_sum(joined(moved, *kept[some]), [1.0, *weights[some]])
        before = x if run.callback is None else x.clone()
        run.show(i, x, denoised, sigmas[i])
        x = moved if run.callback is None else shifted(moved, x, before)
        slopes, levels = [made, *kept], [level, *levels][:order]
    return x


def polynomial_weights(levels: Sequence[float], end: float) -> list[float]:
    """Integrals from the first of distinct levels to `end` of their Lagrange polynomials.

    >>> polynomial_weights([2.0], 1.0), polynomial_weights([2.0, 3.0], 1.0)
    ([-1.0], [-1.5, 0.5])
    """
    length = end - levels[0]
    nodes = [(level - levels[0]) / length for level in levels]
    weights = []
    for j, node in enumerate(nodes):
        polynomial = [1.0]  # its coefficients, that of the constant first
        for k, other in enumerate(nodes):
            if k != j:
                raised, scaled = [0.0, *polynomial], [*(other * c for c in polynomial), 0.0]
                polynomial = [(a - b) / (node - other) for a, b in zip(raised, scaled, strict=True)]
        weights.append(length * sum(c / (power + 1) for power, c in enumerate(polynomial)))
    return weights
