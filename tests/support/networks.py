"""Networks of blocks that are wrapped, checkpointed or registered twice, and a step's inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from bicm_diffusion import Levels, LevelTable, draw_levels, karras_levels

SIZE = 12
Wrap = Callable[..., Any]


def problem(batch: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Levels]:
    x = torch.randn((batch, SIZE), generator=torch.Generator().manual_seed(7)).to(dtype)
    return x, draw_levels(LevelTable(karras_levels(21)), batch, seed=7, step=3)


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, 16), nn.Linear(16, SIZE)
        self.norm, self.dropout = nn.LayerNorm(SIZE), nn.Dropout(dropout)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        return x + self.second(self.dropout(self.first(self.norm(x + times)).tanh()))


class Network(nn.Module):
    """Blocks that a wrapper is called with, as gradient checkpointing is."""

    def __init__(self, *, dropout: float = 0.0, wrap: Wrap | None = None, blocks: int = 3) -> None:
        super().__init__()
        self.times = nn.Linear(2, SIZE)
        self.blocks = nn.ModuleList([Block(dropout) for _ in range(blocks)])
        self.wrap = wrap

    def forward(self, scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        times, x = self.times(torch.stack([t, u], dim=1).log().to(scaled.dtype)), scaled
        for block in self.blocks:
            x = self.wrap(block, x, times) if self.wrap else block(x, times)
        return x


class TwiceRegistered(Network):
    """One block under two names, and again in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.blocks[0]
        self.blocks.append(self.blocks[1])


def build(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make().to(dtype)


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for k, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"{k}: they differ by {(a - b).abs().max()}"


def nested(function: Wrap, *args: Tensor) -> Tensor:
    inner = partial(checkpoint, function, use_reentrant=False)
    return checkpoint(inner, *args, use_reentrant=False)


def in_sequence(block: nn.Module, x: Tensor, times: Tensor) -> Tensor:
    parts = nn.Sequential(block.norm, block.first, nn.Tanh(), block.dropout, block.second)
    return x + checkpoint_sequential(parts, 2, x + times, use_reentrant=False)


CHECKPOINTS: dict[str, Wrap] = {
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "nested": nested,
    "in sequence": in_sequence,
    "without early stop": partial(checkpoint, use_reentrant=False, early_stop=False),
}


class Images(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.times = nn.Linear(2, 1)
        self.unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            attention_head_dim=8,
            dropout=dropout,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        shift = self.times(torch.stack([t, u], dim=1).log().to(scaled.dtype))[:, :, None, None]
        return self.unet(scaled + shift, t, return_dict=False)[0]
