"""Shards on disk: written atomically, checked before a run continues, and read."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from bicm_diffusion.distributed.atomic import clear_partial, remove_whole, write_whole
from bicm_diffusion.distributed.formats import FORMATS
from bicm_diffusion.distributed.manifest import Manifest, load_manifest
from bicm_diffusion.distributed.shards import Shard, listed, shard_path, shards_in, shards_of


def write_shard(directory: Path, shard: Shard, samples: Tensor, save_as: str) -> None:
    """Write the kept samples of a shard atomically: a reader never finds an incomplete one."""
    kind = FORMATS[save_as]
    path = shard_path(directory, shard.first, shard.stop, kind.suffix)
    write_whole(path, lambda partial: kind.write(partial, shard.first, samples[: shard.kept]))


def begin(directory: Path, manifest: Manifest) -> list[Shard]:
    """Check the directory and return the missing shards; incomplete files of a killed run or a full disk are removed.

    Warns of shards that are made again, and of files that are named like shards but belong to no range of this run.
    Raises ValueError where the directory holds another run, or shards without a manifest.
    """
    manifest.claim(directory)
    clear_partial(directory)
    kind, missing, own = FORMATS[manifest.save_as], [], set()
    for shard in shards_of(manifest.count, manifest.batch):
        path = shard_path(directory, shard.first, shard.stop, kind.suffix)
        own.add(path)
        if not path.exists():
            missing.append(shard)
        elif fault := kind.fault(path, shard.first, shard.stop):
            warnings.warn(f"{path} is made again: {fault}", stacklevel=4)
            remove_whole(path)
            missing.append(shard)
    if foreign := [path for path in shards_in(directory) if path not in own]:
        text = f"{directory}: {listed(foreign)} of ranges that this run does not have; they are not changed"
        warnings.warn(text, stacklevel=4)
    return missing


def read_samples(directory: Path | str) -> Tensor:
    """Return the samples of a finished run in order, (N, …); images as (N, C, H, W) uint8.

    Raises FileNotFoundError where there is no manifest, and ValueError where samples are missing, with the first of
    them, or where a file cannot be read, with its name.

    >>> read_samples("/nowhere")
    Traceback (most recent call last):
    FileNotFoundError: /nowhere/manifest.json does not exist: /nowhere holds no run
    """
    directory = Path(directory)
    manifest = load_manifest(directory)
    kind, parts = FORMATS[manifest.save_as], list[Tensor]()
    for shard in shards_of(manifest.count, manifest.batch):
        path = shard_path(directory, shard.first, shard.stop, kind.suffix)
        if not path.exists():
            raise ValueError(f"{directory}: sample {shard.first} of {manifest.count} has not been written")
        part = kind.read(path, shard.first, shard.stop)
        if parts and (part.shape[1:], part.dtype) != (parts[0].shape[1:], parts[0].dtype):
            expected, got = (f"{p.dtype} {tuple(p.shape[1:])}" for p in (parts[0], part))
            raise ValueError(f"{path}: expected samples {expected} as in the first shard, got {got}")
        parts.append(part)
    return torch.cat(parts)
