"""Calls of the gaussian family, and its formulas written plainly: what its tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.tensors import BF16, F16, F32, F64, random

#: Dtypes of the state, and of the network's output.
DTYPES = [(F32, F32), (F32, BF16), (BF16, BF16), (F16, F16), (F64, F64), (F64, F32), (F16, F32)]
KEY = {"seed": 5, "step": 2, "sample_id": 3}
WEIGHTS = [0.93, -0.21, 0.4, 1.3, -0.7]

#: By name, what stands behind the weights: the tensors of a mean from states and a network's outputs.
FORMS: dict[str, Callable[[list[Tensor]], tuple[list[Any], dict[str, Any]]]] = {
    "one": lambda x: ([x[0]], {}),
    "two": lambda x: (x[:2], {}),
    "guided": lambda x: ([x[0], (x[1], x[2])], {"guidance_scale": 2.5}),
    "guided alone": lambda x: ([(x[1], x[2])], {"guidance_scale": -0.5}),
    "five": lambda x: (x[:5], {}),
}


def operands(shape: Sequence[int], state: torch.dtype = F32, network: torch.dtype = F32) -> list[Tensor]:
    return [random(*shape, dtype=network if k in (1, 2) else state, seed=k) for k in range(5)]


def form(name: str, x: list[Tensor]) -> tuple[list[Any], list[float], dict[str, Any]]:
    """The tensors of a call, as many weights, and its other arguments."""
    tensors, more = FORMS[name](x)
    return tensors, WEIGHTS[: len(tensors)], more


def opened(tensors: Sequence[Any]) -> list[Tensor]:
    """The tensors of a call, the pair's one by one."""
    return [y for x in tensors for y in (x if isinstance(x, tuple) else (x,))]


def mean_of(tensors: Sequence[Any], weights: Sequence[Any], guidance_scale: Any = None) -> Tensor:
    """The affine map, in float64."""

    def column(value: Any, like: Tensor) -> Any:
        return value.double().reshape(-1, *[1] * (like.dim() - 1)) if isinstance(value, Tensor) else value

    total: Any = 0.0
    for weight, x in zip(weights, tensors, strict=True):
        if isinstance(x, tuple):
            first, second = (y.double() for y in x)
            x = first + column(guidance_scale, first) * (second - first)
        total = total + column(weight, x) * x.double()
    assert isinstance(total, Tensor)
    return total


def log_density(after: Tensor, mean: Tensor, std: Any, reduction: str = "mean") -> Tensor:
    """torch's own normal log-density, in float64."""
    s = torch.as_tensor(std, dtype=F64)
    s = s.reshape(-1, *[1] * (mean.dim() - 1)) if s.dim() else s
    terms = torch.distributions.Normal(mean, s).log_prob(after.double()).flatten(1)
    return terms.mean(1) if reduction == "mean" else terms.sum(1)


def plain_step(x: Tensor, v: Tensor, a: float, b: float, std: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What trainers write: everything in float32, the state rounded at the end, the density of the rounded state."""
    mean = a * x.float() + b * v.float()
    after = (mean + std * noise.float()).to(x.dtype)
    return after, plain_log_prob(after, x, v, a, b, std)


def plain_log_prob(after: Tensor, x: Tensor, v: Tensor, a: float, b: float, std: float) -> Tensor:
    mean = a * x.float() + b * v.float()
    s = torch.tensor(std)
    terms = (
        -((after.float() - mean) ** 2) / (2 * s**2) - torch.log(s) - torch.log(torch.sqrt(torch.tensor(2 * torch.pi)))
    )
    return terms.mean(dim=tuple(range(1, terms.dim())))
