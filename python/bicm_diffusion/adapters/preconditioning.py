"""Preconditioned networks, c_skip·x + c_out·F(c_in·x), with plain torch's shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.adapters.arithmetic import broadcast
from bicm_diffusion.described import described
from bicm_diffusion.samplers.checks import hint_for
from bicm_kernels import denoise, scale_input

Scalings = tuple[Tensor, Tensor, Tensor]


def column(sigma: Tensor, x: Tensor) -> Tensor:
    """Return sigma with as many dimensions as x, new ones last."""
    if sigma.dim() > x.dim():
        raise ValueError(f"sigma: expected at most {x.dim()} dimensions, as the sample has, got {sigma.dim()}")
    return sigma.reshape(*sigma.shape, *[1] * (x.dim() - sigma.dim()))


def per_sample(sigma: Tensor, x: Tensor, *others: Tensor) -> Tensor | None:
    """Return sigma as the ops take it, 0-d or (B,); None where it differs within a sample or adds samples.

    None, too, where one of the tensors is complex or integer, which the ops do not take.
    """
    if sigma.dim() > x.dim() or not all(tensor.is_floating_point() for tensor in (sigma, x, *others)):
        return None
    if sigma.numel() == 1:
        return sigma.reshape(())
    return sigma.reshape(-1) if sigma.shape[0] == x.shape[0] == sigma.numel() else None


def result_dtype(x: Tensor, *others: Tensor) -> torch.dtype:
    """Return the dtype of a product of tensors that all have dimensions; integer tensors count as floats."""
    dtype = x.dtype
    for other in others:
        if other.dtype is not dtype:
            floating = other.is_floating_point() or other.is_complex()
            dtype = torch.promote_types(dtype, other.dtype if floating else torch.get_default_dtype())
    return dtype


def precondition(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    sigma: Tensor,
    scalings: Callable[[Tensor], Scalings],
    *,
    fused: bool = True,
    sigma_data: float,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return F = network(c_in·x) and the denoised sample.

    options: those of `bicm_kernels.denoise`. scalings: c_skip, c_out and c_in at the levels sigma, which are used
    instead where fused is False, or where the ops do not take x and sigma.
    """
    level = per_sample(sigma, x) if fused else None
    if level is None:
        c_skip, c_out, c_in = (column(c, x) for c in scalings(sigma))
        output = network(c_in * x)
        return output, c_skip * x + c_out * output
    x = x.to(result_dtype(x, sigma))
    output = network(scale_input(x, level, sigma_data=sigma_data))
    if not isinstance(output, Tensor):
        raise TypeError(f"model: expected a tensor, got {described(output)}{hint_for(output)}")
    if not output.is_floating_point():
        c_skip, c_out, _ = (column(c, x) for c in scalings(sigma))
        return output, c_skip * x + c_out * output
    state, target = broadcast(x.to(result_dtype(x, output)), output)
    return output, denoise(state, target, level, sigma_data=sigma_data, **options)
