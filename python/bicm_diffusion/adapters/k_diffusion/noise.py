"""Noise samplers: `noise_sampler(sigma, sigma_next)` is the noise of one step."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from bicm_diffusion.adapters.noise import randn_like
from bicm_diffusion.keys import K_DIFFUSION
from bicm_kernels import fold_in, normal

NoiseSampler = Callable[[Tensor, Tensor], Tensor]


def default_noise_sampler(x: Tensor) -> NoiseSampler:
    """Return a noise sampler that draws `torch.randn_like(x)` from torch's default generator, for all levels.

    >>> import torch
    >>> default_noise_sampler(torch.ones(1, 2))(torch.tensor(2.0), torch.tensor(1.0)).shape
    torch.Size([1, 2])
    """
    return lambda sigma, sigma_next: randn_like(x)


def brownian_noise_sampler(x: Tensor, sigmas: Tensor, seed: int | None = None) -> NoiseSampler:
    """Return a noise sampler whose noises are increments of one Brownian path, as k-diffusion's SDE samplers draw.

    noise_sampler(sigma, sigma_next) is (W(sigma_next) - W(sigma))/√|sigma_next - sigma|: intervals that overlap share
    their common increment. x: the state, for shape, dtype and device; sigmas: the path runs from the smallest of them
    above 0 to the largest. seed: by default drawn from torch's default generator, as in k-diffusion.
    Raises ImportError where torchsde, which provides `BrownianTree`, is not installed.

    >>> x, sigmas = torch.ones(1, 2), torch.tensor([2.0, 1.0, 0.0])
    >>> noise = brownian_noise_sampler(x, sigmas, seed=0)  # doctest: +SKIP
    >>> noise(sigmas[0], sigmas[1]).shape  # doctest: +SKIP
    torch.Size([1, 2])
    """
    try:
        torchsde = import_module("torchsde")
    except ImportError as error:
        raise ImportError(
            "torchsde is not installed: pip install torchsde, or pass noise_sampler=, as default_noise_sampler(x) or "
            "keyed_noise_sampler(x, sigmas, seed)"
        ) from error
    least, most = sigmas[sigmas > 0].min(), sigmas.max()
    entropy = torch.randint(0, 2**63 - 1, []).item() if seed is None else seed
    path = torchsde.BrownianTree(least, torch.zeros_like(x), most, entropy=entropy)

    def sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        low, high = (sigma, sigma_next) if sigma < sigma_next else (sigma_next, sigma)
        noise: Tensor = path(low, high) / (high - low).sqrt()
        return noise if sigma < sigma_next else -noise

    return sampler


def keyed_noise_sampler(x: Tensor, sigmas: Tensor, seed: int | Tensor, sample_id: int | Tensor = 0) -> NoiseSampler:
    """Return a noise sampler whose step i is noise keyed by (seed, i, sample): the same bits in every batch.

    It is `bicm_kernels.normal` with the seed `fold_in(seed, bicm_diffusion.keys.K_DIFFUSION)`. If a step calls it more
    than once, as k-diffusion's sample_dpmpp_sde does, call k after the first has that seed folded with k; the
    count restarts with another step, so that each run needs a new noise sampler.

    x: the state that is sampled, for shape, dtype and device; sigmas: the grid that the sampler runs on. The noise
    sampler raises ValueError for a level that is not on it, up to the rounding of exp(ln σ); sigma_next may be
    in between.

    >>> import torch
    >>> x, sigmas = torch.ones(1, 2), torch.tensor([2.0, 1.0])
    >>> keyed_noise_sampler(x, sigmas, seed=0)(sigmas[0], sigmas[1]).shape
    torch.Size([1, 2])
    """
    key = fold_in(seed, K_DIFFUSION)
    levels: list[float] = sigmas.tolist()
    spacing = sigmas.stride(0) * sigmas.element_size() if len(sigmas) > 1 else 0
    precision = torch.finfo(sigmas.dtype).eps if sigmas.is_floating_point() else 0.0
    asked = [-1, 0]

    def step_of(sigma: Tensor) -> int:
        """A level's index, identified by address, which avoids a device sync."""
        if spacing and sigma.dtype is sigmas.dtype and sigma.device == sigmas.device:
            place, rest = divmod(sigma.data_ptr() - sigmas.data_ptr(), spacing)
            if rest == 0 and 0 <= place < len(sigmas):
                return place
        level = sigma.item()
        place = min(range(len(levels)), key=lambda i: abs(levels[i] - level), default=0)
        # exp(ln σ), which k-diffusion's SDE samplers pass, is off by half a unit of ln σ and of the result.
        off = precision * (1.0 + abs(math.log(level))) * level if level > 0.0 else 0.0
        if not levels or abs(levels[place] - level) > off:
            raise ValueError(f"sigma: expected a level of the grid that the sampler was made for, got {level}")
        return place

    def sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        step = step_of(sigma)
        again = asked[1] + 1 if asked[0] == step else 0
        asked[:] = step, again
        own = fold_in(key, again) if again else key
        return normal(x.shape, seed=own, step=step, sample_id=sample_id, dtype=x.dtype, device=x.device)

    return sampler
