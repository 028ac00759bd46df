"""How samples 0 … N - 1 are divided into batches, and the file or folder of each batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_SHARD = re.compile(r"samples-\d+-\d+(?:\.safetensors)?")


@dataclass(frozen=True)
class Shard:
    """One batch to sample: the ids first … first + batch - 1, of which the first `kept` are kept."""

    first: int
    batch: int
    kept: int

    @property
    def stop(self) -> int:
        """The id after the last one that is kept."""
        return self.first + self.kept

    @property
    def sample_ids(self) -> Tensor:
        """The ids (batch,), int64: `sample_id` of every keyed op."""
        return torch.arange(self.first, self.first + self.batch)


def shards_of(count: int, batch: int) -> list[Shard]:
    """Divide `count` samples into batches, the last one padded."""
    return [Shard(first, batch, min(batch, count - first)) for first in range(0, count, batch)]


def shard_path(directory: Path, first: int, stop: int, suffix: str) -> Path:
    """Return the path of samples first … stop - 1."""
    return directory / f"samples-{first:08d}-{stop:08d}{suffix}"


def shards_in(directory: Path) -> list[Path]:
    """Return everything in a directory that is named as a shard of any run, sorted by name."""
    return sorted(path for path in directory.iterdir() if _SHARD.fullmatch(path.name))


def listed(paths: Sequence[Path]) -> str:
    """Return how many shards these are, with the names of the first three."""
    names = ", ".join(path.name for path in paths[:3]) + (", …" if len(paths) > 3 else "")
    return f"{len(paths)} {'shard' if len(paths) == 1 else 'shards'} ({names})"
