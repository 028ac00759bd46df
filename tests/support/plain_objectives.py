"""What the tests of objectives share: a one-time network, plain preconditioning, and Gaussian data in closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.plain_bct import T_MIN, Network, broadcast

S = 0.5  # sigma_data


class OneTime(nn.Module):
    """A network of one time, on one of two."""

    def __init__(self, inner: Network) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, scaled: Tensor, t: Tensor) -> Tensor:
        return self.inner(scaled, t, torch.full_like(t, 0.7))


def preconditioned(model: nn.Module, x: Tensor, t: Tensor, kind: str, *, dropout: int | None = None) -> Tensor:
    """f(x, t) of a parameterisation, as BCM eq. 17 and 20 print it; EDM's is BCM's that leads to 0."""
    if dropout is not None:
        torch.manual_seed(dropout)
    end = {"bcm": T_MIN, "cm": T_MIN, "edm": 0.0}[kind]
    s, t_ = S * S + broadcast(t * t), broadcast(t)
    times = (t, torch.full_like(t, T_MIN)) if kind == "bcm" else (t,)
    skip = S * S / (S * S + (t_ - end) ** 2) if kind == "cm" else (S * S + t_ * end) / s
    return skip * x + S * (t_ - end) / s.sqrt() * model(x / s.sqrt(), *times)


def exact_flow(kind: str) -> Any:
    """F of the exact flow of N(0, S²) to 0."""

    def answer(scaled: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        end = {"bcm": T_MIN, "cm": T_MIN, "edm": 0.0}[kind]
        t = t[:, None]
        s = S * S + t * t
        skip = S * S / (S * S + (t - end) ** 2) if kind == "cm" else (S * S + t * end) / s
        return (S / s.sqrt() - skip) * s.sqrt() / (S * (t - end)) * scaled * s.sqrt()

    return answer


def gaussian_expectation(low: float, high: float) -> float:
    """E|q(t')(x + t'z) - q(t)(x + tz)|, x ~ N(0, S²), z ~ N(0, 1), by the exact flow q = S/√(S² + t²) (GC eq. 90)."""
    q = [S / math.sqrt(S * S + t * t) for t in (low, high)]
    variance = S * S * (q[1] - q[0]) ** 2 + (q[1] * high - q[0] * low) ** 2
    return math.sqrt(2 * variance / math.pi)
