"""A class-conditional U-Net with two times: the image's level, and the target level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.digits.data import CLASSES
from examples.digits.network import Attention, ResidualBlock, zeroed


@dataclass(frozen=True)
class ConsistencyConfig:
    """Channels at 8×8 and at 4×4, width of the embedding, residual blocks per resolution, dropout of channels."""

    fine_channels: int = 32
    coarse_channels: int = 96
    embedding: int = 128
    fine_blocks: int = 1
    coarse_blocks: int = 2
    groups: int = 8
    dropout: float = 0.1


class TwoTimeEmbedding(nn.Module):
    """Both times' waves, concatenated, plus a class embedding: (B,), (B,), (B,) -> (B, width)."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        # Radians per unit of ln t. Low ones only: adjacent levels of a fine grid must have similar embeddings.
        exponents = torch.linspace(0.0, 1.0, 16, dtype=torch.float64)
        self.register_buffer("frequencies", 0.1 * 30.0**exponents, persistent=False)
        self.times = nn.Sequential(nn.Linear(4 * 16, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(CLASSES + 1, width)

    def forward(self, t: Tensor, u: Tensor, labels: Tensor) -> Tensor:
        angles = torch.stack([t, u], dim=1).double().log()[:, :, None] * self.frequencies.double()
        waves = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1).to(self.label.weight.dtype)
        return functional.silu(self.times(waves) + self.label(labels))


class ConsistencyNetwork(nn.Module):
    """F of a bidirectional consistency model: scaled (B, 1, 8, 8), levels t and u (B,), labels (B,) -> (B, 1, 8, 8).

    Label 10 (`NO_LABEL`) means no label. Computes in and returns the parameters' dtype, for any dtype of the image.

    >>> network, level = ConsistencyNetwork(), torch.ones(2)
    >>> network(torch.zeros(2, 1, 8, 8), level, level / 2, labels=torch.tensor([3, 10])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, config: ConsistencyConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ConsistencyConfig()
        fine, coarse = config.fine_channels, config.coarse_channels
        self.embedding = TwoTimeEmbedding(config.embedding)
        self.stem = nn.Conv2d(1, fine, 3, padding=1)
        self.fine_down = nn.ModuleList(_block(fine, fine, config) for _ in range(config.fine_blocks))
        self.down = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList(_block(coarse, coarse, config) for _ in range(config.coarse_blocks))
        self.attention = Attention(coarse, config)
        self.up = nn.Conv2d(coarse, fine, 1)
        self.fine_up = nn.ModuleList(_block(2 * fine, fine, config) for _ in range(config.fine_blocks))
        self.norm = nn.GroupNorm(config.groups, fine)
        self.head = zeroed(nn.Conv2d(fine, 1, 3, padding=1))

    def forward(self, scaled: Tensor, t: Tensor, u: Tensor, labels: Tensor) -> Tensor:
        embedding = self.embedding(t, u, labels)
        h = self.stem(scaled.to(self.stem.weight.dtype))
        skips = []
        for block in self.fine_down:
            h = block(h, embedding)
            skips.append(h)
        h = self.down(h)
        for i, block in enumerate(self.coarse):
            h = block(h, embedding)
            if i == 0:
                h = self.attention(h)
        h = functional.interpolate(self.up(h), scale_factor=2.0, mode="nearest")
        for block in self.fine_up:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.head(functional.silu(self.norm(h)))


def _block(inputs: int, outputs: int, config: ConsistencyConfig) -> ResidualBlock:
    # Whole channels are dropped: one draw per channel is cheap, one per pixel costs as much as a convolution.
    return ResidualBlock(inputs, outputs, config, dropout=nn.Dropout2d)
