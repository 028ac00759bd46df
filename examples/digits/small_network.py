"""The networks of the comparison of objectives: a perceptron, and the digits' denoiser as a start for ECT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bicm_diffusion import vp_time
from bicm_diffusion.schedules.karras import T_MIN
from examples.digits.consistency_network import TwoTimeEmbedding
from examples.digits.data import SIDE
from examples.digits.network import NO_LABEL, Denoiser


@dataclass(frozen=True)
class SmallConfig:
    """Width of the hidden layers, how many residual blocks of two there are, width of the embedding."""

    width: int = 320
    blocks: int = 2
    embedding: int = 128


class SmallNetwork(nn.Module):
    """F of a consistency model or a denoiser: scaled (B, 1, 8, 8), level t (B,), and optionally u.

    >>> SmallNetwork()(torch.zeros(2, 1, 8, 8), torch.ones(2)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, config: SmallConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SmallConfig()
        self.embedding = TwoTimeEmbedding(config.embedding)
        self.first = nn.Linear(SIDE * SIDE, config.width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.blocks))
        self.last = nn.Linear(config.width, SIDE * SIDE)
        nn.init.zeros_(self.last.weight)

    def forward(self, scaled: Tensor, t: Tensor, u: Tensor | None = None) -> Tensor:
        labels = torch.full(t.shape, NO_LABEL, device=t.device)
        embedding = self.embedding(t, torch.full_like(t, T_MIN) if u is None else u, labels)
        h = self.first(scaled.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        output: Tensor = self.last(functional.silu(h))
        return output.reshape(scaled.shape)


class _Block(nn.Module):
    def __init__(self, config: SmallConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.first, self.second = nn.Linear(config.width, config.width), nn.Linear(config.width, config.width)
        self.shift = nn.Linear(config.embedding, config.width)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        inner = functional.silu(self.first(functional.silu(self.norm(h))) + self.shift(embedding))
        moved: Tensor = h + self.second(inner)
        return moved


class FromDenoiser(nn.Module):
    """F of "edm" from a noise predictor of the variance-preserving process: D(x, t) = x - t·ε(x/√(1 + t²), vp_time(t)).

    With c_in·x for x, F = (D - c_skip·x)/c_out is (t·c_in·x - √(σ_d² + t²)·ε)/σ_d: there is no division by t.

    >>> FromDenoiser(Denoiser())(torch.zeros(2, 1, 8, 8), torch.ones(2)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, denoiser: Denoiser, *, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.denoiser, self.sigma_data = denoiser, sigma_data

    def forward(self, scaled: Tensor, t: Tensor) -> Tensor:
        level = t[:, None, None, None]
        root = (self.sigma_data**2 + level * level).sqrt()
        labels = torch.full(t.shape, NO_LABEL, device=t.device)
        predicted: Tensor = self.denoiser(scaled * root / (1 + level * level).sqrt(), vp_time(t), labels)
        return (level * scaled - root * predicted) / self.sigma_data
