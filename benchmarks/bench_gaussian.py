"""A stochastic step with its log-probability, and that of a recorded state with its gradient, as trainers do it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import bicm_kernels as bk
from benchmarks.cases import SEED, Case

# A step of Flow-GRPO at sigma = 0.6, of ten.
NUMBERS = {"of_state": 0.94, "of_output": -0.12, "std": 0.24}


def mean_log_density(residual: Tensor, std: float) -> Tensor:
    """Flow-GRPO's sum of three terms, and its mean over a sample."""
    s = torch.tensor(std)
    constant = torch.log(torch.sqrt(torch.tensor(2 * math.pi)))
    terms = -(residual**2) / (2 * s**2) - torch.log(s) - constant
    return terms.mean(dim=tuple(range(1, terms.dim())))


def rollout(
    x: Tensor,
    v: Tensor,
    *,
    of_state: float,
    of_output: float,
    std: float,
    draw: Callable[[Tensor], Tensor] = torch.randn_like,
) -> tuple[Tensor, Tensor]:
    """The mean in float32, noise, the state in its dtype again, and the log-probability of that."""
    mean = of_state * x.float() + of_output * v.float()
    state = (mean + std * draw(mean)).to(x.dtype)
    return state, mean_log_density(state.float() - mean, std)


def ours_rollout(x: Tensor, v: Tensor, *, of_state: float, of_output: float, std: float) -> tuple[Tensor, Tensor]:
    """``gaussian_step``."""
    return bk.gaussian_step([x, v], [of_state, of_output], std=std, seed=SEED)


def training(v: Tensor, x: Tensor, state: Tensor, *, of_state: float, of_output: float, std: float) -> Tensor:
    """The log-probability of a recorded state, with its gradient in the network's output."""
    mean = of_state * x.float() + of_output * v.float()
    return mean_log_density(state.float() - mean, std).sum()


def ours_training(
    v: Tensor, x: Tensor, state: Tensor, *, of_state: float, of_output: float, std: float, gradient: str = "backward"
) -> Tensor:
    """``gaussian_log_prob``."""
    return bk.gaussian_log_prob(state, [x, v], [of_state, of_output], std=std, gradient=gradient).sum()


def divergence(v: Tensor, x: Tensor, reference: Tensor, *, of_state: float, of_output: float, std: float) -> Tensor:
    """The divergence from a reference's step, as a difference of means."""
    mean = of_state * x.float() + of_output * v.float()
    other = of_state * x.float() + of_output * reference.float()
    return ((mean - other) ** 2 / (2 * torch.tensor(std) ** 2)).mean()


def ours_divergence(
    v: Tensor, x: Tensor, reference: Tensor, *, of_state: float, of_output: float, std: float
) -> Tensor:
    """``gaussian_kl`` of the outputs only: the state cancels in the difference."""
    return bk.gaussian_kl([v], [reference], [of_output], std=std).mean()


kept: Any = partial(ours_training, gradient="auto")
CASES = (
    Case("gaussian_step", ours_rollout, rollout, tensors=2, reads=2, writes=1, coefficients=NUMBERS, noise="added"),
    Case("gaussian_log_prob", ours_training, training, tensors=3, reads=6, writes=1, coefficients=NUMBERS, trains=True),
    Case("gaussian_log_prob_kept", kept, training, tensors=3, reads=3, writes=1, coefficients=NUMBERS, trains=True),
    Case("gaussian_kl", ours_divergence, divergence, tensors=3, reads=4, writes=1, coefficients=NUMBERS, trains=True),
)
