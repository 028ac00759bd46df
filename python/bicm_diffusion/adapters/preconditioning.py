"""Preconditioned networks, c_skip·x + c_out·F(c_in·x), with the shapes and dtypes that plain torch gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bicm_kernels import denoise, scale_input

Scalings = tuple[Tensor, Tensor, Tensor]


def column(sigma: Tensor, x: Tensor) -> Tensor:
    """Return sigma with as many dimensions as x, new ones last."""
    if sigma.dim() > x.dim():
        raise ValueError(f"sigma: expected at most {x.dim()} dimensions, as the sample has, got {sigma.dim()}")
    return sigma.reshape(*sigma.shape, *[1] * (x.dim() - sigma.dim()))


def per_sample(sigma: Tensor, x: Tensor) -> Tensor | None:
    """Return sigma as the ops take it, 0-d or (B,); None where it differs within a sample or adds samples."""
    if sigma.shape == x.shape[:1] and sigma.is_floating_point() and x.is_floating_point():
        return sigma
    if sigma.dim() > x.dim() or x.is_complex():
        return None
    if not sigma.is_floating_point():
        sigma = sigma.to(torch.get_default_dtype())
    if sigma.numel() == 1:
        return sigma.reshape(())
    return sigma.reshape(-1) if sigma.shape[0] == x.shape[0] == sigma.numel() else None


def promoted(x: Tensor, *others: Tensor) -> Tensor:
    """Return x in the dtype of its product with others that have dimensions, as floats where they are whole numbers."""
    dtype = x.dtype
    for other in others:
        if other.dtype is not dtype:
            floating = other.is_floating_point() or other.is_complex()
            dtype = torch.promote_types(dtype, other.dtype if floating else torch.get_default_dtype())
    return x if dtype is x.dtype else x.to(dtype)


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

    options: those of `bicm_kernels.denoise`. scalings: c_skip, c_out and c_in at the levels sigma, which are used in
    their place where fused is False, or where the ops do not take x and sigma.
    """
    level = per_sample(sigma, x) if fused else None
    if level is None:
        c_skip, c_out, c_in = (column(c, x) for c in scalings(sigma))
        output = network(c_in * x)
        return output, c_skip * x + c_out * output
    x = promoted(x, sigma)
    output = network(scale_input(x, level, sigma_data=sigma_data))
    if output.shape != x.shape:
        x, target = torch.broadcast_tensors(x, output)
    else:
        target = output
    return output, denoise(promoted(x, output), target, level, sigma_data=sigma_data, **options)
