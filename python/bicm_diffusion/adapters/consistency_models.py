"""OpenAI's consistency models: the denoise function of their networks, and one-step and multistep sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bicm_kernels import affine_step, denoise, scale_input


class ConsistencyDenoiser:
    """`denoise(model, x_t, sigmas, **model_kwargs)`, as consistency models define it.

    model(c_in·x_t, 1000·ln(σ + 1e-44)/4, **model_kwargs) returns F like x_t; sigmas (B,). Returns (F, denoised), the
    second in the dtype of x_t: c_skip·x_t + c_out·F, with distillation the boundary condition at sigma_min (consistency
    models, appendix C), without it EDM's.

    >>> ConsistencyDenoiser().denoise(lambda x, t: x, torch.ones(1, 2), torch.ones(1))[1].shape
    torch.Size([1, 2])
    """

    def __init__(self, sigma_data: float = 0.5, sigma_min: float = 0.002, distillation: bool = True) -> None:
        self.sigma_data, self.sigma_min, self.distillation = sigma_data, sigma_min, distillation

    def denoise(
        self, model: Callable[..., Tensor], x_t: Tensor, sigmas: Tensor, **model_kwargs: Any
    ) -> tuple[Any, Any]:
        """Return (F, denoised) at the levels sigmas."""
        sigmas = sigmas.reshape(-1).expand(x_t.shape[0]).contiguous()
        times = 1000 * 0.25 * torch.log(sigmas + 1e-44)
        output = model(scale_input(x_t, sigmas, sigma_data=self.sigma_data), times, **model_kwargs)
        parameterization = "cm" if self.distillation else "edm"
        denoised = denoise(
            x_t,
            output,
            sigmas,
            parameterization=parameterization,
            sigma_data=self.sigma_data,
            sigma_min=self.sigma_min,
        )
        return output, denoised


@torch.no_grad()
def sample_onestep(distiller: Callable[..., Tensor], x: Tensor, sigmas: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return distiller(x, sigmas[0]·1): one evaluation, from x at the highest level.

    >>> sample_onestep(lambda x, sigma: 0 * x, torch.ones(1, 2), torch.tensor([80.0, 0.0]))
    tensor([[0., 0.]])
    """
    return distiller(x, sigmas[0] * x.new_ones([x.shape[0]]))


@torch.no_grad()
def stochastic_iterative_sampler(
    distiller: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor | None,
    generator: Any,
    ts: Sequence[int],
    progress: bool = False,
    callback: Callable[[dict[str, Any]], object] | None = None,
    t_min: float = 0.002,
    t_max: float = 80.0,
    rho: float = 7.0,
    steps: int = 40,
) -> Tensor:
    """Return a sample by multistep consistency sampling (consistency models Alg. 1).

    distiller(x, t), t (B,), returns the denoised sample; ts: indices on the grid of `steps` levels from t_max to t_min,
    the last one the level that the last evaluation is renoised to. generator.randn_like(x) draws the noise. sigmas is
    taken and not read, as in the function that this stands for.

    >>> from types import SimpleNamespace
    >>> noise = SimpleNamespace(randn_like=torch.randn_like)
    >>> stochastic_iterative_sampler(lambda x, t: 0 * x, torch.ones(1, 2), None, noise, ts=[0, 39]).shape
    torch.Size([1, 2])
    """
    high, low = t_max ** (1 / rho), t_min ** (1 / rho)
    levels = [(high + index / (steps - 1) * (low - high)) ** rho for index in ts]
    for i, (level, below) in enumerate(pairwise(levels)):
        denoised = distiller(x, torch.full((x.shape[0],), level, dtype=x.dtype, device=x.device))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": level, "denoised": denoised})
        below = min(max(below, t_min), t_max)
        x = affine_step([denoised, generator.randn_like(x)], [1.0, max(below**2 - t_min**2, 0.0) ** 0.5])
    return x
