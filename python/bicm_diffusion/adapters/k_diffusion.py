"""Samplers and denoisers that are called as k-diffusion's are: `sample_*(model, x, sigmas, extra_args, callback, …)`.

model(x, sigma, **extra_args), sigma (B,), returns the denoised sample; sigmas (N + 1,) descend, usually to 0. Weights
are formed on the host in float64 from one read of `sigmas`; every update is one fused launch. A
`noise_sampler(sigma, sigma_next)` is honoured as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.adapters.noise import randn_like
from bicm_diffusion.extras import extra
from bicm_diffusion.keys import K_DIFFUSION
from bicm_kernels import affine_step, denoise, fold_in, normal, scale_input

Network = Callable[..., Tensor]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[dict[str, Any]], object]

MOST_CHURN = math.sqrt(2.0) - 1.0


def _sampler(advance: Callable[[_Run, int, Tensor, float, Tensor], Tensor]) -> Callable[..., Tensor]:
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
        run = _Run(model, x, sigmas, extra_args, callback, disable)
        for i in run.steps():
            x, level = run.churned(x, i, s_churn, s_tmin, s_tmax, s_noise, noise_sampler)
            x = advance(run, i, x, level, run.denoised(x, i, level))
        return x

    sample.__name__, sample.__qualname__, sample.__doc__ = advance.__name__, advance.__qualname__, advance.__doc__
    return sample


@_sampler
def sample_euler(run: _Run, i: int, x: Tensor, level: float, denoised: Tensor) -> Tensor:
    """Return a sample by Euler's method (EDM Alg. 2 without its second-order correction).

    x: (B, …), any floating dtype, at sigmas[0]; the result has its shape and dtype. s_churn, s_tmin, s_tmax, s_noise:
    EDM's; noise comes from noise_sampler, by default that of torch.randn_like. disable hides the progress bar. The
    callback takes {"x", "i", "sigma", "sigma_hat", "denoised"} before each update.

    >>> sample_euler(lambda x, sigma: 0 * x, torch.ones(1, 2), torch.tensor([2.0, 1.0, 0.0]), disable=True)
    tensor([[0., 0.]])
    """
    ratio = run.levels[i + 1] / level
    return affine_step([x, denoised], [ratio, 1.0 - ratio])


@_sampler
def sample_heun(run: _Run, i: int, x: Tensor, level: float, denoised: Tensor) -> Tensor:
    """Return a sample by Heun's method (EDM Alg. 2); a step to sigma = 0 is Euler's. Arguments as for `sample_euler`.

    >>> sample_heun(lambda x, sigma: 0 * x, torch.ones(1, 2), torch.tensor([2.0, 1.0, 0.0]), disable=True)
    tensor([[0., 0.]])
    """
    below = run.levels[i + 1]
    ratio = below / level
    predicted = affine_step([x, denoised], [ratio, 1.0 - ratio])
    if below == 0.0:
        return predicted
    again = run.ask(predicted, below)
    # x + (below - level)/2·((x - denoised)/level + (predicted - again)/below), gathered by tensor.
    half = (below - level) / 2
    return affine_step(
        [x, denoised, predicted, again], [1.0 + half / level, -half / level, half / below, -half / below]
    )


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
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    before: Tensor | None = None
    for i in run.steps():
        level, below = run.levels[i], run.levels[i + 1]
        denoised = run.denoised(x, i, level)
        ratio = below / level
        if before is None or below == 0.0:
            x = affine_step([x, denoised], [ratio, 1.0 - ratio])
        else:
            # Half the inverse of the last step's share of this one, both measured in -ln sigma.
            slope = math.log(level / below) / (2.0 * math.log(run.levels[i - 1] / level))
            gain = 1.0 - ratio
            x = affine_step([x, denoised, before], [ratio, gain * (1.0 + slope), -gain * slope])
        before = denoised
    return x


class Denoiser:
    """k-diffusion's denoiser: D(x, σ) = c_skip·x + c_out·inner_model(c_in·x, σ, **kwargs) (EDM eq. 7).

    Called with x (B, …) and sigma (B,) or 0-d, it returns the denoised sample in the dtype of x; sigma_data is in units
    of x.

    >>> Denoiser(lambda x, sigma: x)(torch.ones(1, 2), torch.ones(1))
    tensor([[1., 1.]])
    """

    def __init__(self, inner_model: Network, sigma_data: float = 1.0) -> None:
        self.inner_model, self.sigma_data = inner_model, sigma_data

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_skip, c_out and c_in at the levels sigma."""
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt()

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        sigma = sigma.reshape(-1).expand(x.shape[0]).contiguous()
        output = self.inner_model(scale_input(x, sigma, sigma_data=self.sigma_data), sigma, **kwargs)
        return denoise(x, output, sigma, parameterization="edm", sigma_data=self.sigma_data)


class EDMDenoiser:
    """A preconditioned network as a denoiser: D(x, σ) = c_skip·x + c_out·F(c_in·x, ln(σ)/4) (EDM eq. 7).

    inner_model(c_in·x, c_noise, **kwargs) returns F like x. Called with x (B, …) and sigma (B,) or 0-d, it returns the
    denoised sample in the dtype of x, which may be float64 around a float32 network: the network sees inner_dtype where
    that is given.

    >>> EDMDenoiser(lambda x, c_noise: x)(torch.ones(1, 2), torch.ones(1)).shape
    torch.Size([1, 2])
    """

    def __init__(self, inner_model: Network, sigma_data: float = 0.5, inner_dtype: torch.dtype | None = None) -> None:
        self.inner_model, self.sigma_data, self.inner_dtype = inner_model, sigma_data, inner_dtype

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        sigma = sigma.reshape(-1).expand(x.shape[0]).contiguous()
        scaled = scale_input(x, sigma, sigma_data=self.sigma_data)
        c_noise = sigma.log() / 4
        if self.inner_dtype is not None:
            scaled, c_noise = scaled.to(self.inner_dtype), c_noise.to(self.inner_dtype)
        output = self.inner_model(scaled, c_noise, **kwargs)
        return denoise(x, output, sigma, parameterization="edm", sigma_data=self.sigma_data)


def keyed_noise_sampler(x: Tensor, sigmas: Tensor, seed: int | Tensor, sample_id: int | Tensor = 0) -> NoiseSampler:
    """Return a noise sampler whose step i is noise keyed by (seed, i, sample): the same bits in every batch.

    It is `bicm_kernels.normal` with the seed `fold_in(seed, bicm_diffusion.keys.K_DIFFUSION)`.

    x: the state that is sampled, for shape, dtype and device; sigmas: the grid that the sampler runs on.

    >>> x, sigmas = torch.ones(1, 2), torch.tensor([2.0, 1.0])
    >>> keyed_noise_sampler(x, sigmas, seed=0)(sigmas[0], sigmas[1]).shape
    torch.Size([1, 2])
    """
    key = fold_in(seed, K_DIFFUSION)
    index = {level: i for i, level in enumerate(sigmas.tolist())}
    spacing = sigmas.stride(0) * sigmas.element_size() if len(sigmas) > 1 else 0

    def step_of(sigma: Tensor) -> int:
        """A level's place, told by where it lies: to ask its device for the value would wait for it."""
        if spacing and sigma.dtype is sigmas.dtype and sigma.device == sigmas.device:
            place, rest = divmod(sigma.data_ptr() - sigmas.data_ptr(), spacing)
            if rest == 0 and 0 <= place < len(sigmas):
                return place
        return index[sigma.item()]

    def sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        step = step_of(sigma)
        return normal(x.shape, seed=key, step=step, sample_id=sample_id, dtype=x.dtype, device=x.device)

    return sampler


class _Run:
    """What the samplers' loops share."""

    def __init__(
        self,
        model: Network,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None,
        callback: Callback | None,
        disable: bool | None,
    ) -> None:
        self.model, self.sigmas, self.extra_args, self.callback = model, sigmas, extra_args or {}, callback
        self.levels: Sequence[float] = sigmas.tolist()
        self.disable = disable
        self.batch, self.dtype = x.shape[0], sigmas.dtype

    def steps(self) -> Iterable[int]:
        indices = range(len(self.levels) - 1)
        if self.disable:
            return indices
        with extra("diffusion", "or pass disable=True"):
            from tqdm.auto import trange

        return trange(len(indices), disable=self.disable)

    def ask(self, x: Tensor, level: float) -> Tensor:
        return self.model(x, torch.full((self.batch,), level, dtype=self.dtype, device=x.device), **self.extra_args)

    def denoised(self, x: Tensor, i: int, level: float) -> Tensor:
        denoised = self.ask(x, level)
        if self.callback is not None:
            sigma_hat = self.sigmas[i] * 0 + level
            self.callback({"x": x, "i": i, "sigma": self.sigmas[i], "sigma_hat": sigma_hat, "denoised": denoised})
        return denoised

    def churned(
        self,
        x: Tensor,
        i: int,
        churn: float,
        low: float,
        high: float,
        deviation: float,
        noise_sampler: NoiseSampler | None,
    ) -> tuple[Tensor, float]:
        """The state and its level, raised where churn asks for it."""
        level = self.levels[i]
        lift = min(churn / (len(self.levels) - 1), MOST_CHURN) if low <= level <= high else 0.0
        if lift <= 0.0:
            return x, level
        raised = level * (1.0 + lift)
        if noise_sampler is None:
            noise = randn_like(x)
        else:
            noise = noise_sampler(self.sigmas[i], self.sigmas[i + 1])
        return affine_step([x, noise], [1.0, deviation * math.sqrt(raised**2 - level**2)]), raised
