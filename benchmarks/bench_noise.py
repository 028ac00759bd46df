"""Keyed noise against the generator of PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import bicm_kernels as bk
from benchmarks.cases import SEED, Case, keyed_noise


def uniform(like: Tensor) -> Tensor:
    """Keyed uniform numbers in the shape of a tensor that is not read."""
    return bk.uniform(like.shape, seed=SEED, dtype=like.dtype, device=like.device)


def torch_normal(like: Tensor) -> Tensor:
    """``torch.randn`` in the shape of a tensor that is not read."""
    return torch.randn(like.shape, dtype=like.dtype, device=like.device)


def torch_uniform(like: Tensor) -> Tensor:
    """``torch.rand`` in the shape of a tensor that is not read."""
    return torch.rand(like.shape, dtype=like.dtype, device=like.device)


def add_noise(x: Tensor, *, sigma: float) -> Tensor:
    """``add_noise`` with the benchmark's seed."""
    return bk.add_noise(x, sigma, seed=SEED)


def torch_add_noise(x: Tensor, *, sigma: float, draw: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
    """Forward diffusion as usually written."""
    return x + sigma * draw(x)


CASES = (
    Case("normal", keyed_noise, torch_normal, tensors=1, reads=0, writes=1, noise="alone"),
    Case("uniform", uniform, torch_uniform, tensors=1, reads=0, writes=1, noise="alone"),
    Case(
        "add_noise",
        add_noise,
        torch_add_noise,
        tensors=1,
        reads=1,
        writes=1,
        coefficients={"sigma": 0.7},
        noise="added",
    ),
)
