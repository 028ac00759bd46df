"""Which process makes which samples, in which batches, and what happens after a kill.

Samples 0 … N - 1 are cut into batches of one size, the last one padded with samples that are not kept. A batch holds
the same samples whatever the world size, so even a network whose result depends on its batch makes the same bits;
whoever makes it, it is written at once, and a restarted run makes only those batches that are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from bicm_diffusion.distributed.formats import FORMATS
from bicm_diffusion.distributed.store import Manifest, clear_partial, write_shard, written


@dataclass(frozen=True)
class Shard:
    """One batch to sample: the ids first … first + batch - 1, of which the first `kept` are wanted."""

    first: int
    batch: int
    kept: int

    @property
    def sample_ids(self) -> Tensor:
        """The ids (batch,), int64: `sample_id` of every keyed op."""
        return torch.arange(self.first, self.first + self.batch)


def sample_shards(
    sample: Callable[[Shard], Tensor],
    count: int,
    directory: Path | str,
    *,
    batch: int,
    settings: Mapping[str, Any],
    save_as: Literal["safetensors", "png"] = "safetensors",
    progress: bool = True,
) -> None:
    """Make samples 0 … count - 1 with all processes of the group and write them to a directory that all of them see.

    sample(shard) returns samples (batch, …) that depend on nothing but the shard: draw noise with
    `normal(shape, seed=seed, sample_id=shard.first)`. batch: samples per call, the same on every process. settings:
    whatever else decides the samples (seed, steps, weights, torch and device type), as JSON; a run is continued only
    where count, batch, save_as and settings are those that it began with. Runs under torchrun or accelerate once the
    default process group is there (gloo, nccl or any other: what is said goes by gloo), and alone without one.
    save_as: each batch is one safetensors file, or with "png" one folder of images named by their ids (needs pillow),
    from samples (batch, C, H, W) with C = 1, 3 or 4, uint8 or floats in [-1, 1]. Either is complete or absent; a
    restart repeats none and loses none. progress: a bar on rank 0 (needs tqdm).
    Raises ValueError where count, batch or save_as is out of range, the directory holds another run, a result has not
    `batch` samples, or it cannot be written as images.

    >>> import tempfile
    >>> from bicm_diffusion.distributed import read_samples
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     make = lambda shard: shard.sample_ids.float().unsqueeze(1)
    ...     sample_shards(make, 3, directory, batch=2, settings={}, progress=False)
    ...     read_samples(directory).flatten()
    tensor([0., 1., 2.])
    """
    if count < 1 or batch < 1:
        raise ValueError(f"count, batch: expected integers of at least 1, got {count} and {batch}")
    if save_as not in FORMATS:
        raise ValueError(f"save_as: expected one of {', '.join(map(repr, FORMATS))}, got {save_as!r}")
    directory = Path(directory)
    rank, world = (dist.get_rank(), dist.get_world_size()) if _grouped() else (0, 1)
    with _hosts() as hosts:
        missing = _agree(Manifest(count, batch, dict(settings), save_as), directory, rank, hosts)
        mine = missing[rank::world]
        with _bar(len(missing), len(mine), batch, shown=progress and rank == 0) as tell:
            for shard in mine:
                samples = sample(shard)
                if len(samples) != shard.batch:
                    raise ValueError(f"sample: expected {shard.batch} samples, got {len(samples)}")
                write_shard(directory, shard.first, samples[: shard.kept], save_as)
                tell()
        if hosts is not None:
            dist.barrier(hosts)


def shards_of(count: int, batch: int) -> list[Shard]:
    """Cut `count` samples into batches, the last one padded."""
    return [Shard(first, batch, min(batch, count - first)) for first in range(0, count, batch)]


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _hosts() -> Iterator[dist.ProcessGroup | None]:
    """All processes, talking from host to host; None where there is one alone.

    A group of GPUs alone would carry what is said here through whichever GPU is current, and give up on a process that
    waits for the last batch.
    """
    hosts = dist.new_group(backend="gloo") if _grouped() else None
    try:
        yield hosts
    finally:
        if hosts is not None:
            dist.destroy_process_group(hosts)


def _agree(manifest: Manifest, directory: Path, rank: int, hosts: dist.ProcessGroup | None) -> list[Shard]:
    """What is missing, as rank 0 sees it before anybody writes; its refusal is everybody's."""
    decided: list[Any] = [None]
    if rank == 0:
        try:
            manifest.claim(directory)
            clear_partial(directory)
            done = written(directory)
            shards = shards_of(manifest.count, manifest.batch)
            decided = [[shard for shard in shards if (shard.first, shard.first + shard.kept) not in done]]
        except ValueError as error:
            decided = [str(error)]
    if hosts is not None:
        dist.broadcast_object_list(decided, src=0, group=hosts)
    if isinstance(decided[0], str):
        raise ValueError(decided[0])
    missing: list[Shard] = decided[0]
    return missing


class _bar:  # noqa: N801
    """A progress bar in samples, or nothing."""

    def __init__(self, missing: int, mine: int, batch: int, *, shown: bool) -> None:
        self.total, self.batch, self.shown = missing * batch, batch, shown
        self.share = missing / mine if mine else 0.0

    def __enter__(self) -> Callable[[], object]:
        if not self.shown:
            return lambda: None
        from tqdm import tqdm  # an optional dependency: sampling without a bar needs only torch

        self.bar = tqdm(total=self.total, unit="sample")
        return lambda: self.bar.update(round(self.share * self.batch))

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self.bar.close()
