"""Distribution of samples over processes and batches, and restarts after a kill.

Samples 0 … N - 1 are divided into batches of one size, the last one padded with samples that are not kept. A batch has
the same samples for any world size, so even a network whose result depends on its batch makes the same bits;
each process writes its batches at once, and a restarted run makes only the missing batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.distributed.formats import FORMATS
from bicm_diffusion.distributed.manifest import Manifest, differences
from bicm_diffusion.distributed.shards import Shard
from bicm_diffusion.distributed.store import begin, write_shard
from bicm_diffusion.extras import extra

#: How long a finished process waits for the others; gloo's default of half an hour is less than a batch may take.
PATIENCE = timedelta(days=365)

#: The data sent to every process.
REFUSALS = (ValueError, TypeError, OSError, ImportError)


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
    """Make samples 0 … count - 1 with all processes of the group and write them to a directory shared by all of them.

    sample(shard) returns samples (batch, …) that depend only on the shard: draw noise with
    `normal(shape, seed=seed, sample_id=shard.first)`. batch: samples per call, the same on every process. settings:
    the other settings that determine the samples (seed, steps, weights, torch and device type), as for `Manifest`. A
    run is continued only where count, batch, save_as and settings are unchanged, and all processes must pass the same.
    Runs under torchrun or accelerate once the default process group exists (gloo, nccl or any other; control messages
    use gloo), and as a single process without one.
    save_as: each batch is one safetensors file, or with "png" one folder of images named by their ids (needs pillow),
    from samples (batch, C, H, W) with C = 1, 3 or 4, uint8 or floats in [-1, 1]. Each is complete or absent; a
    restart repeats none and loses none, and makes again, with a warning, those that a full disk or a failure has
    truncated. progress: a bar on rank 0 (needs tqdm).
    Raises TypeError or ValueError, on every process, where count, batch, save_as or settings are invalid or differ
    between processes, or the directory holds another run, or shards without a manifest, and ImportError where
    safetensors, pillow or tqdm is needed and missing; only on one process where a
    result has another number of samples or cannot be written as images.

    >>> import tempfile
    >>> from bicm_diffusion.distributed import read_samples
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     make = lambda shard: shard.sample_ids.float().unsqueeze(1)
    ...     sample_shards(make, 3, directory, batch=2, settings={}, progress=False)
    ...     read_samples(directory).flatten()
    tensor([0., 1., 2.])
    """
    directory = Path(directory)
    rank, world = (dist.get_rank(), dist.get_world_size()) if _grouped() else (0, 1)
    with _hosts() as hosts:
        asked = _attempt(lambda: _ready(Manifest(count, batch, settings, save_as), shown=progress and rank == 0))
        missing = _agree(asked, directory, rank, hosts)
    mine = missing[rank::world]
    with _hosts(PATIENCE) as hosts:
        with _bar(missing, len(mine), shown=progress and rank == 0) as tell:
            for shard in mine:
                samples = sample(shard)
                if not isinstance(samples, Tensor) or samples.dim() == 0:
                    raise TypeError(f"sample: expected a tensor ({shard.batch}, …), got {described(samples)}")
                if len(samples) != shard.batch:
                    raise ValueError(f"sample: expected {shard.batch} samples, got {len(samples)}")
                write_shard(directory, shard, samples, save_as)
                tell()
        if hosts is not None:
            dist.barrier(hosts)


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _hosts(timeout: timedelta | None = None) -> Iterator[dist.ProcessGroup | None]:
    """A gloo group of all processes; None where there is only one.

    NCCL would send these messages through the current GPU, and its watchdog would abort a process that
    waits for the last batch.
    """
    hosts = dist.new_group(backend="gloo", timeout=timeout) if _grouped() else None
    try:
        yield hosts
    finally:
        if hosts is not None:
            dist.destroy_process_group(hosts)


def _ready(asked: Manifest, *, shown: bool) -> Manifest:
    """Return the requested run after importing its dependencies, so that a missing one raises at once."""
    FORMATS[asked.save_as].library()
    if shown:
        _tqdm()
    return asked


def _agree(asked: Manifest | Exception, directory: Path, rank: int, hosts: dist.ProcessGroup | None) -> list[Shard]:
    """Return the missing shards, determined by rank 0 before any writes; its error is raised on all ranks."""
    everyone: list[Manifest | Exception] = [asked]
    if hosts is not None:
        everyone *= dist.get_world_size(hosts)
        dist.gather_object(asked, everyone if rank == 0 else None, dst=0, group=hosts)
    decided: list[Any] = [_attempt(lambda: begin(directory, _common(everyone))) if rank == 0 else None]
    if hosts is not None:
        dist.broadcast_object_list(decided, src=0, group=hosts)
    if isinstance(decided[0], Exception):
        raise decided[0]
    missing: list[Shard] = decided[0]
    return missing


def _common(everyone: list[Manifest | Exception]) -> Manifest:
    """Return the run requested by all ranks; raises where a rank's is invalid or differs from rank 0's."""
    for rank, asked in enumerate(everyone):
        if isinstance(asked, Exception):
            kind = next(kind for kind in REFUSALS if isinstance(asked, kind))
            raise asked if len(everyone) == 1 else kind(f"rank {rank}: {asked}")
    first, *others = (asked for asked in everyone if isinstance(asked, Manifest))
    told = [(rank, differences(asked, first, "rank 0 has")) for rank, asked in enumerate(others, 1)]
    if differing := [f"rank {rank}: {difference}" for rank, difference in told if difference]:
        raise ValueError(f"every rank must request the same samples; {'; '.join(differing)}")
    return first


def _attempt(function: Callable[[], Any]) -> Any:
    """Return the function's result, or its exception, which every process then raises so that none waits."""
    try:
        return function()
    except REFUSALS as error:
        return error


def _tqdm() -> Any:
    with extra("diffusion", "or pass progress=False"):
        from tqdm import tqdm
    return tqdm


class _bar:  # noqa: N801
    """A progress bar in samples, or nothing."""

    def __init__(self, missing: Sequence[Shard], mine: int, *, shown: bool) -> None:
        self.total, self.shown = sum(shard.batch for shard in missing), shown
        self.share = self.total / mine if mine else 0.0

    def __enter__(self) -> Callable[[], object]:
        if not self.shown:
            return lambda: None
        self.bar = _tqdm()(total=self.total, unit="sample")
        return lambda: self.bar.update(round(self.share))

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self.bar.close()
