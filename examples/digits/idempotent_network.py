"""An idempotent network for digits: a perceptron from an image to an image, without a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from examples.digits.data import SIDE


@dataclass(frozen=True)
class IdempotentConfig:
    """Width of the hidden layers, and how many residual blocks of two there are."""

    width: int = 384
    blocks: int = 2


class IdempotentNetwork(nn.Module):
    """f: images or noise (B, 1, 8, 8) -> images (B, 1, 8, 8).

    >>> import torch
    >>> IdempotentNetwork()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, config: IdempotentConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or IdempotentConfig()
        self.first = nn.Linear(SIDE * SIDE, config.width)
        self.blocks = nn.ModuleList(_Block(config.width) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)
        self.last = nn.Linear(config.width, SIDE * SIDE)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h)
        output: Tensor = self.last(functional.silu(self.norm(h)))
        return output.reshape(x.shape)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        moved: Tensor = h + self.second(functional.silu(self.first(functional.silu(self.norm(h)))))
        return moved
