"""Shards on disk and the manifest beside them: what a run was asked for, and which samples it has written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.distributed.formats import FORMATS

MANIFEST = "manifest.json"
_SHARD = re.compile(r"samples-(\d+)-(\d+)(?:\.safetensors)?")


@dataclass(frozen=True)
class Manifest:
    """What decides the samples: their number, the batch in which each is made, the files, the caller's settings."""

    count: int
    batch: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    save_as: str = "safetensors"
    version: int = 1

    def claim(self, directory: Path) -> None:
        """Write the manifest, or make sure that the one that is there asks for the same samples.

        Raises ValueError naming what differs; a run of other settings is never continued.
        """
        path = directory / MANIFEST
        mine = json.loads(json.dumps(asdict(self)))
        if not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            _write(path, json.dumps(mine, indent=1) + "\n")
            return
        theirs = json.loads(path.read_text())
        differing = sorted(k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k))
        if differing:
            told = "; ".join(f"{k}={mine.get(k)!r} where the run began with {theirs.get(k)!r}" for k in differing)
            raise ValueError(f"{path} belongs to another run: {told}")


def shard_path(directory: Path, first: int, stop: int, save_as: str) -> Path:
    """Where samples first … stop - 1 belong."""
    return directory / f"samples-{first:08d}-{stop:08d}{FORMATS[save_as].suffix}"


def write_shard(directory: Path, first: int, samples: Tensor, save_as: str = "safetensors") -> None:
    """Write the samples from `first` on, whole or not at all: a reader never sees half a file, or half a folder."""
    path = shard_path(directory, first, first + len(samples), save_as)
    partial = _partial(path)
    FORMATS[save_as].write(partial, first, samples)
    for written_file in [*partial.glob("*"), partial]:
        _sync(written_file)
    partial.replace(path)


def clear_partial(directory: Path) -> None:
    """Remove what a killed run had begun to write."""
    for path in directory.glob("samples-*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def written(directory: Path) -> set[tuple[int, int]]:
    """The ranges [first, stop) of samples that are on disk."""
    matches = (_SHARD.fullmatch(path.name) for path in directory.iterdir())
    return {(int(m[1]), int(m[2])) for m in matches if m is not None}


def read_samples(directory: Path | str) -> Tensor:
    """Return the samples of a finished run in order, (N, …); images as (N, C, H, W) uint8.

    Raises ValueError where some are missing, with the first of them.

    >>> read_samples("/nowhere")
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    directory = Path(directory)
    manifest = Manifest(**json.loads((directory / MANIFEST).read_text()))
    count, save_as = manifest.count, manifest.save_as
    parts, reached = [], 0
    for first, stop in sorted(written(directory)):
        if first != reached:
            break
        parts.append(FORMATS[save_as].read(shard_path(directory, first, stop, save_as)))
        reached = stop
    if reached != count:
        raise ValueError(f"{directory}: sample {reached} of {count} has not been written")
    return torch.cat(parts) if parts else torch.empty(0)


def _write(path: Path, text: str) -> None:
    partial = _partial(path)
    partial.write_text(text)
    _sync(partial)
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_suffix(f".{os.getpid()}.partial")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
