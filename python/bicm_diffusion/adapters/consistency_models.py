"""OpenAI's consistency models: the denoise function of their networks, and one-step and multistep sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.adapters.arithmetic import promoted, weighted_sum
from bicm_diffusion.adapters.preconditioning import Scalings, precondition


class ConsistencyDenoiser:
    """`denoise(model, x_t, sigmas, **model_kwargs)`, as consistency models define it.

    model(c_in·x_t, 1000·ln(σ + 1e-44)/4, **model_kwargs) returns F like x_t; sigmas: 0-d, (B,) or with more dimensions
    where levels differ within a sample. Returns (F, denoised), the second in the dtype to which x_t, sigmas and F
    promote: c_skip·x_t + c_out·F, with distillation the boundary condition at sigma_min (consistency models, appendix
    C), without it EDM's.

    >>> ConsistencyDenoiser().denoise(lambda x, t: x, torch.ones(1, 2), torch.ones(1))[1].shape
    torch.Size([1, 2])
    """

    def __init__(self, sigma_data: float = 0.5, sigma_min: float = 0.002, distillation: bool = True) -> None:
        self.sigma_data, self.sigma_min, self.distillation = sigma_data, sigma_min, distillation

    def get_scalings(self, sigma: Tensor) -> Scalings:
        """Return EDM's c_skip, c_out and c_in at the levels sigma."""
        return self._scalings(sigma, 0.0)

    def get_scalings_for_boundary_condition(self, sigma: Tensor) -> Scalings:
        """Return c_skip, c_out and c_in of a consistency model, whose c_out is 0 at sigma_min."""
        return self._scalings(sigma, self.sigma_min)

    def _scalings(self, sigma: Tensor, end: float) -> Scalings:
        root, above = (sigma**2 + self.sigma_data**2) ** 0.5, sigma - end
        return self.sigma_data**2 / (above**2 + self.sigma_data**2), above * self.sigma_data / root, 1 / root

    def denoise(
        self, model: Callable[..., Tensor], x_t: Tensor, sigmas: Tensor, **model_kwargs: Any
    ) -> tuple[Any, Any]:
        """Return (F, denoised) at the levels sigmas."""
        name = "get_scalings_for_boundary_condition" if self.distillation else "get_scalings"
        return precondition(
            lambda scaled: model(scaled, 1000 * 0.25 * torch.log(sigmas + 1e-44), **model_kwargs),
            x_t,
            sigmas,
            getattr(self, name),
            fused=getattr(type(self), name) is getattr(ConsistencyDenoiser, name),
            sigma_data=self.sigma_data,
            sigma_min=self.sigma_min,
            parameterization="cm" if self.distillation else "edm",
        )


@torch.no_grad()
def sample_onestep(
    distiller: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    generator: Any = None,
    progress: bool = False,
    callback: Callable[[dict[str, Any]], object] | None = None,
) -> Tensor:
    """Return distiller(x, sigmas[0]·1): one evaluation, from x at the highest level.

    generator, progress and callback are accepted and ignored, as in the original function.

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

    distiller(x, t), t (B,) in the dtype of x, returns the denoised sample; ts: indices on the grid of `steps` levels
    from t_max to t_min, the last one the level that the last evaluation is renoised to. generator.randn_like(x) draws
    the noise, in every step. sigmas and progress are accepted and ignored, as in the original function; the
    callback, which the original ignores too, receives {"x", "i", "sigma", "denoised"} after each evaluation; writes
    to them have no effect.

    >>> from types import SimpleNamespace
    >>> noise = SimpleNamespace(randn_like=torch.randn_like)
    >>> stochastic_iterative_sampler(lambda x, t: 0 * x, torch.ones(1, 2), None, noise, ts=[0, 39]).shape
    torch.Size([1, 2])
    """
    high, low = t_max ** (1 / rho), t_min ** (1 / rho)
    levels = [(high + float(index) / (steps - 1) * (low - high)) ** rho for index in ts]
    ones = x.new_ones([x.shape[0]])
    for i, (level, below) in enumerate(pairwise(levels)):
        denoised = distiller(x, ones * level)
        fresh = generator.randn_like(x)
        below = min(max(below, t_min), t_max)
        moved = weighted_sum(promoted(denoised, fresh), [1.0, max(below**2 - t_min**2, 0.0) ** 0.5])
        if callback is not None:
            callback({"x": x, "i": i, "sigma": level, "denoised": denoised})
        x = moved
    return x
