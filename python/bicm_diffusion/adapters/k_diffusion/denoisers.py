"""Denoisers around networks: D(x, σ) = c_skip·x + c_out·F (EDM eq. 7), and the loss that trains them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from bicm_diffusion.adapters.k_diffusion.run import Network
from bicm_diffusion.adapters.preconditioning import Scalings, column, per_sample, precondition, result_dtype
from bicm_kernels import affine_step, denoise, scale_input

Weighting = Callable[[Tensor], Tensor]


class Denoiser(nn.Module):
    """k-diffusion's denoiser: D(x, σ) = c_skip·x + c_out·inner_model(c_in·x, σ, **kwargs) (EDM eq. 7).

    Called with x (B, …) and sigma, 0-d, (B,) or with more dimensions where levels differ within a sample, it returns
    the denoised sample in the dtype to which x, sigma and the network's output promote. sigma_data is in units of x.
    weighting and scales are `loss`'s: "karras", "soft-min-snr", "snr" or a function of sigma, and the number of
    scales. Raises ValueError for another weighting.

    >>> Denoiser(lambda x, sigma: x)(torch.ones(1, 2), torch.ones(1))
    tensor([[1., 1.]])
    """

    def __init__(
        self,
        inner_model: Network,
        sigma_data: float = 1.0,
        weighting: str | Weighting = "karras",
        scales: float = 1,
    ) -> None:
        super().__init__()
        self.inner_model, self.sigma_data, self.scales = inner_model, sigma_data, scales
        self.weighting: Weighting
        if callable(weighting):
            self.weighting = weighting
        elif weighting in WEIGHTINGS:
            self.weighting = getattr(self, WEIGHTINGS[weighting])
        else:
            raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)} or a function, got {weighting!r}")
        self._fused = type(self).get_scalings is Denoiser.get_scalings  # a subclass may override them

    def get_scalings(self, sigma: Tensor) -> Scalings:
        """Return c_skip, c_out and c_in at the levels sigma."""
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total**0.5, 1 / total**0.5

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:  # noqa: A002
        """Return the denoised sample."""
        return precondition(
            lambda scaled: self._ask(scaled, sigma, kwargs),
            input,
            sigma,
            self.get_scalings,
            fused=self._fused,
            sigma_data=self.sigma_data,
            parameterization="edm",
        )[1]

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:  # noqa: A002
        """Return the weighted squared error of each sample (B,), differentiable: weight·mean((F − F*)²).

        input: (B, …) clean samples; noise: standard normal, like input; sigma: their levels, (B,). F is the network's
        output at input + sigma·noise and F* the output whose denoised sample is input. With scales other than 1 the
        error is that of the cosine transform over the last two dimensions of (B, …) with four, or the last three of
        five, its squares weighted by −log2 of the frequency (Nyquist's is 1/2), at most `scales` where that is 1 or
        more; of three, as in k-diffusion, the transform is over the second and the weights are along the third.

        >>> Denoiser(lambda x, sigma: x).loss(torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2))
        tensor([0., 0.])
        """
        weight = self.weighting(sigma)
        scaled, target = self._problem(input, noise, sigma)
        error = self._ask(scaled, sigma, kwargs) - target
        if self.scales == 1:
            return (error**2).flatten(1).mean(1) * weight
        squares = cosine_transform(error) ** 2
        frequencies = frequency_weights(squares.shape[2:], self.scales, squares.dtype, squares.device)
        return (squares * frequencies).flatten(1).mean(1) * weight

    def _even(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def _soft_min_snr(self, sigma: Tensor) -> Tensor:
        return (sigma * self.sigma_data) ** 2 / (sigma**2 + self.sigma_data**2) ** 2

    def _snr(self, sigma: Tensor) -> Tensor:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def _ask(self, scaled: Tensor, sigma: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return self.inner_model(scaled, sigma, **kwargs)

    def _problem(self, x: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input and its target output."""
        level = per_sample(sigma, x, noise) if self._fused and noise.shape == x.shape else None
        if level is None:
            c_skip, c_out, c_in = (column(c, x) for c in self.get_scalings(sigma))
            noisy = x + noise * column(sigma, x)
            return noisy * c_in, (x - c_skip * noisy) / c_out
        x = x.to(result_dtype(x, noise, sigma))
        # (x − c_skip·(x + σ·n))/c_out without its difference, which loses digits where σ is small.
        root = (level**2 + self.sigma_data**2) ** 0.5
        scaled = affine_step([x, noise], [1 / root, level / root])
        return scaled, affine_step([x, noise], [level / (self.sigma_data * root), -self.sigma_data / root])


class EDMDenoiser(Denoiser):
    """A preconditioned network as a denoiser: D(x, σ) = c_skip·x + c_out·F(c_in·x, ln(σ)/4) (EDM eq. 7).

    inner_model(c_in·x, c_noise, **kwargs) returns F like x; c_noise (B,). Called with x (B, …) and sigma (B,) or 0-d,
    it returns the denoised sample in the dtype of x, which may be float64 around a float32 network: the network's input
    has dtype inner_dtype if given. weighting and scales are those of `Denoiser`.

    >>> EDMDenoiser(lambda x, c_noise: x)(torch.ones(1, 2), torch.ones(1)).shape
    torch.Size([1, 2])
    """

    def __init__(
        self,
        inner_model: Network,
        sigma_data: float = 0.5,
        inner_dtype: torch.dtype | None = None,
        weighting: str | Weighting = "karras",
        scales: float = 1,
    ) -> None:
        super().__init__(inner_model, sigma_data, weighting, scales)
        self.inner_dtype = inner_dtype

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:  # noqa: A002
        """Return the denoised sample."""
        sigma = sigma.reshape(-1).expand(input.shape[0]).contiguous()
        if not self._fused:
            return super().forward(input, sigma, **kwargs).to(input.dtype)
        output = self._ask(scale_input(input, sigma, sigma_data=self.sigma_data), sigma, kwargs)
        return denoise(input, output, sigma, parameterization="edm", sigma_data=self.sigma_data)

    def _ask(self, scaled: Tensor, sigma: Tensor, kwargs: dict[str, Any]) -> Tensor:
        c_noise = sigma.reshape(-1).expand(scaled.shape[0]).log() / 4
        if self.inner_dtype is not None:
            scaled, c_noise = scaled.to(self.inner_dtype), c_noise.to(self.inner_dtype)
        return self.inner_model(scaled, c_noise, **kwargs)


#: The weightings of a loss by name, and the methods that compute them.
WEIGHTINGS = {"karras": "_even", "soft-min-snr": "_soft_min_snr", "snr": "_snr"}

#: The dimensions of a cosine transform by the number of dimensions of its samples.
TRANSFORMED = {3: (-2,), 4: (-2, -1), 5: (-3, -2, -1)}


def cosine_transform(x: Tensor) -> Tensor:
    """Return the orthonormal cosine transform (DCT-II) of x: of sequences (B, n, …), of images or of volumes.

    Raises ValueError for another number of dimensions than three, four or five.

    >>> cosine_transform(torch.ones(1, 4, 1)).flatten()
    tensor([2., 0., 0., 0.])
    """
    if x.dim() not in TRANSFORMED:
        raise ValueError(f"scales: expected samples of three, four or five dimensions, got {tuple(x.shape)}")
    for dim in TRANSFORMED[x.dim()]:
        x = torch.tensordot(x, _cosines(x.shape[dim], x.dtype, x.device), ([dim], [0])).movedim(-1, dim)
    return x


@lru_cache(64)
def _cosines(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """sqrt(2/n)·cos(π(2i + 1)k/2n) in row i and column k, the first column divided by sqrt(2)."""
    with torch.inference_mode(False):  # it is kept, and an inference tensor could not be saved for a backward pass
        i = torch.arange(n, dtype=torch.float64)
        matrix = math.sqrt(2 / n) * torch.cos(math.pi / (2 * n) * (2 * i[:, None] + 1) * i)
        matrix[:, 0] /= math.sqrt(2)
        return matrix.to(device, dtype)


@lru_cache(64)
def frequency_weights(shape: torch.Size, scales: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return -log2 of each dimension's frequency, from 1/2n to 1/2, the least of the dimensions; at most `scales`.

    A `scales` below 1 bounds nothing.

    >>> frequency_weights(torch.Size([2]), 0, torch.float32, torch.device("cpu"))
    tensor([2., 1.])
    """
    with torch.inference_mode(False):
        weights = torch.full(shape, math.inf, dtype=dtype, device=device)
        for dim, n in enumerate(shape):
            frequencies = torch.linspace(0.5 / n, 0.5, n, dtype=dtype, device=device)
            rows = -torch.log2(frequencies)
            weights = torch.minimum(weights, rows.reshape([n if k == dim else 1 for k in range(len(shape))]))
        return weights.clamp_max(scales) if scales >= 1 else weights
