"""Pairs of noise and the teacher's image from it: images in shards, and the noise from its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bicm_diffusion.distributed.formats import FORMATS, unreadable
from bicm_diffusion.distributed.manifest import load_manifest
from bicm_diffusion.distributed.sampling import sample_shards
from bicm_diffusion.distributed.shards import Shard, shard_path, shards_of
from bicm_diffusion.samplers.checks import check_number
from bicm_kernels import normal

KEYS = ("pair_seed", "pair_std", "pair_shape")


def sample_pairs(
    sample: Callable[[Tensor], Tensor],
    count: int,
    directory: Path | str,
    *,
    shape: Sequence[int],
    batch: int,
    seed: int,
    latent_std: float | Tensor = 1.0,
    settings: Mapping[str, Any],
    device: torch.device | str | None = None,
    progress: bool = True,
) -> None:
    """Make pairs 0 … count - 1 of noise and sample(noise), and write the images to a directory as `sample_shards` does.

    The noise of pair k is latent_std·normal(shape, seed=seed, sample_id=k); the manifest records these arguments.
    latent_std: a number, or a 0-d tensor.
    sample: noise (batch, *shape) float32 on `device` -> images (batch, *shape), which depend only on the noise.
    settings: the other settings that determine the images (steps, weights), not named pair_seed, pair_std, pair_shape.
    Other arguments and errors: see `sample_shards`; ValueError also for images of another shape, on one process.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     sample_pairs(torch.sign, 3, directory, shape=(2,), batch=2, seed=0, settings={}, progress=False)
    ...     noise, image = PairDataset(directory)[2]
    >>> torch.equal(image, noise.sign())
    True
    """
    if not (isinstance(latent_std, Tensor) and latent_std.dim() == 0):
        check_number("latent_std", latent_std)
    taken = [name for name in KEYS if name in settings]
    if taken:
        raise ValueError(f"settings: expected other names than {taken[0]!r}, which is recorded here already")
    made = {"pair_seed": seed, "pair_std": float(latent_std), "pair_shape": list(shape)}

    def images(shard: Shard) -> Tensor:
        noise = _noise(shard.sample_ids, made, device)
        found = sample(noise)
        if isinstance(found, Tensor) and found.shape != noise.shape:
            raise ValueError(f"sample: expected images {tuple(noise.shape)}, as its noise is, got {tuple(found.shape)}")
        return found

    sample_shards(images, count, directory, batch=batch, settings={**settings, **made}, progress=progress)


def _noise(ids: Tensor, made: Mapping[str, Any], device: torch.device | str | None = None) -> Tensor:
    ids = ids.to(device) if device is not None else ids
    shape = (len(ids), *made["pair_shape"])
    return normal(shape, seed=made["pair_seed"], sample_id=ids, device=ids.device) * made["pair_std"]


class PairDataset(Dataset[tuple[Tensor, Tensor]]):
    """The pairs of a directory that `sample_pairs` has filled: item k is (noise, image), each of a sample's shape.

    Files are opened on first access, separately in every worker, and items are read one by one; `tensors` reads
    all pairs at once.
    Raises FileNotFoundError where there is no run, ValueError where it is not a run of pairs; where a shard is missing
    or damaged, reading it raises ValueError with its name.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.manifest = load_manifest(self.directory)
        if lacking := [name for name in KEYS if name not in self.manifest.settings]:
            raise ValueError(f"directory: expected pairs, as sample_pairs writes, got a run without {lacking}")
        self.shards = shards_of(self.manifest.count, self.manifest.batch)
        self._files: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.manifest.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected one in [0, {len(self)}), got {index}")
        place, offset = divmod(index, self.manifest.batch)
        if place not in self._files:
            self._files[place] = self._opened(place)
        image = self._files[place].get_slice("samples")[offset : offset + 1]
        return _noise(torch.tensor([index]), self.manifest.settings)[0], image[0]

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay with the process that opened them."""
        return self.__dict__ | {"_files": {}}

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return all pairs: noise and images, each (count, …)."""
        read = FORMATS["safetensors"].read
        images = [read(self._path(k), shard.first, shard.stop) for k, shard in enumerate(self.shards)]
        return _noise(torch.arange(len(self)), self.manifest.settings), torch.cat(images)

    def _opened(self, place: int) -> Any:
        path, shard, tensors = self._path(place), self.shards[place], FORMATS["safetensors"]
        if fault := tensors.fault(path, shard.first, shard.stop):
            raise ValueError(unreadable(path, fault))
        return tensors.library().safe_open(path, framework="pt")

    def _path(self, place: int) -> Path:
        shard = self.shards[place]
        path = shard_path(self.directory, shard.first, shard.stop, FORMATS["safetensors"].suffix)
        if not path.exists():
            raise ValueError(f"{self.directory}: pair {shard.first} of {len(self)} has not been written")
        return path
