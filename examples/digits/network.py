"""A class-conditional U-Net that predicts the noise in an 8×8 image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.digits.data import CLASSES

NO_LABEL = CLASSES


class BlockConfig(Protocol):
    """The network's settings that a block needs."""

    @property
    def embedding(self) -> int:
        """Return the width of the embedding."""

    @property
    def groups(self) -> int:
        """Return the number of groups of a norm."""

    @property
    def dropout(self) -> float:
        """Return the dropout probability."""


@dataclass(frozen=True)
class NetworkConfig:
    """Channels at 8×8 and at 4×4, width of the embedding, residual blocks per resolution, dropout."""

    fine_channels: int = 48
    coarse_channels: int = 80
    embedding: int = 128
    blocks: int = 2
    groups: int = 8
    dropout: float = 0.15


class Embedding(nn.Module):
    """A time embedding plus a class embedding: times (B,) in [0, 1], labels (B,) -> (B, width)."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        exponents = torch.linspace(0.0, 1.0, 32, dtype=torch.float64)
        self.register_buffer("frequencies", math.pi / 2 * 200.0**exponents, persistent=False)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(CLASSES + 1, width)

    def forward(self, times: Tensor, labels: Tensor) -> Tensor:
        angles = times[:, None].double() * self.frequencies.double()
        waves = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.label.weight.dtype)
        return functional.silu(self.time(waves) + self.label(labels))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut; the embedding scales and shifts the second norm."""

    def __init__(
        self, inputs: int, outputs: int, config: BlockConfig, *, dropout: Callable[[float], nn.Module] = nn.Dropout
    ) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(config.groups, inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(config.embedding, 2 * outputs)
        self.norm_out = nn.GroupNorm(config.groups, outputs)
        self.dropout = dropout(config.dropout)
        self.conv_out = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_in(functional.silu(self.norm_in(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_out(self.dropout(functional.silu(self.norm_out(h) * (1 + scale) + shift)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Self-attention over the pixels of a small feature map, with a shortcut."""

    def __init__(self, channels: int, config: BlockConfig, *, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(config.groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, channels // self.heads, height * width)
        query, key, value = qkv.transpose(-1, -2).unbind(1)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return x + self.out(mixed.transpose(-1, -2).reshape(batch, channels, height, width))


class Denoiser(nn.Module):
    """Predict the noise of z: z (B, 1, 8, 8), times (B,) in [0, 1], labels (B,) in [0, 10] -> (B, 1, 8, 8).

    Label 10 (`NO_LABEL`) means no label. Computes in and returns the parameters' dtype, for any dtype of z.

    >>> Denoiser()(torch.zeros(2, 1, 8, 8), torch.ones(2), torch.tensor([3, NO_LABEL])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        config = config or NetworkConfig()
        fine, coarse, blocks = config.fine_channels, config.coarse_channels, config.blocks
        self.config = config
        self.embedding = Embedding(config.embedding)
        self.stem = nn.Conv2d(1, fine, 3, padding=1)
        self.fine_down = nn.ModuleList(ResidualBlock(fine, fine, config) for _ in range(blocks))
        self.down = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList(ResidualBlock(coarse, coarse, config) for _ in range(blocks))
        self.attention = Attention(coarse, config)
        self.up = nn.Conv2d(coarse, fine, 3, padding=1)
        self.fine_up = nn.ModuleList(ResidualBlock(2 * fine, fine, config) for _ in range(blocks))
        self.norm = nn.GroupNorm(config.groups, fine)
        self.head = zeroed(nn.Conv2d(fine, 1, 3, padding=1))

    def forward(self, z: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        embedding = self.embedding(times, labels)
        h = self.stem(z.to(self.stem.weight.dtype))
        skips = []
        for block in self.fine_down:
            h = block(h, embedding)
            skips.append(h)
        h = self.down(h)
        for i, block in enumerate(self.coarse):
            h = block(h, embedding)
            if i == 0:
                h = self.attention(h)
        h = self.up(functional.interpolate(h, scale_factor=2.0, mode="nearest"))
        for block in self.fine_up:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.head(functional.silu(self.norm(h)))


class GuidedModel:
    """A denoiser for guided samplers: (eps_uncond, eps_cond) from one evaluation of a doubled batch."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, z: Tensor, times: Tensor, /, *, labels: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([torch.full_like(labels, NO_LABEL), labels])
        without, with_label = self.network(z.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
        return without, with_label


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Return the layer with zero weights, so that its block is the identity, or zero, initially."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
