"""The batches of a run: a step's samples and their random draws are functions of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from bicm_diffusion.consistency.shared_draws import draws_alike
from bicm_diffusion.keys import AUGMENTATION, ORDER
from bicm_kernels import fold_in, uniform

Collate = Callable[[list[Any]], Any]
_END = object()
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Part:
    """Samples that are evaluated together, their ids (n,) int64, and their fraction of the whole batch."""

    batch: Any
    ids: Tensor
    share: float


def keyed_order(step: int, count: int, *, batch_size: int, seed: int) -> Tensor:
    """Return the samples of a step, int64: an epoch is a keyed permutation less its incomplete last batch.

    With fewer samples than a batch, every step takes all of them. Raises ValueError for a batch size below 1.

    >>> epoch = [keyed_order(step, 7, batch_size=2, seed=0) for step in range(3)]
    >>> len(torch.cat(epoch).unique())
    6
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    per_epoch = max(1, count // batch_size)
    first = step % per_epoch * batch_size
    return _permutation(count, seed, step // per_epoch)[first : first + batch_size].clone()  # it is kept for others


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    keys = uniform((count,), seed=fold_in(seed, ORDER), step=epoch, dtype=torch.float64)
    return torch.argsort(keys, stable=True)


class _Keyed(Dataset[Any]):
    """A dataset indexed by (step, index), whose random draws are a function of both, in any process."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, int(fold_in(seed, AUGMENTATION))

    def __getitem__(self, key: tuple[int, int]) -> Any:
        step, index = key
        with draws_alike(int(fold_in(fold_in(self.seed, step), index)), CPU)():
            return self.dataset[index]


@dataclass(frozen=True)
class Batches:
    """The batches of one process of a run, from any step on.

    order: the samples of a step, whose numbers are their ids; None for `keyed_order`. Of an `IterableDataset`, sample
    k is the k-th that it yields, restarted at its end; a process reads and skips the samples of others and, after a
    checkpoint, those of earlier steps.
    """

    dataset: Dataset[Any]
    batch_size: int
    micro_batch: int | None
    seed: int
    order: Callable[[int], Tensor] | None = None
    collate: Collate | None = None
    workers: int = 0
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.dataset, DataLoader):
            raise TypeError("dataset: expected a Dataset, got a DataLoader; pass its .dataset")
        if self.batch_size % self.processes:
            raise ValueError(
                f"batch_size: expected a multiple of the {self.processes} processes, got {self.batch_size}"
            )
        if isinstance(self.dataset, IterableDataset) and (self.workers or self.order):
            raise ValueError("dataset: expected one with indices for workers and an order of its own, got a stream")

    def of(self, step: int) -> list[Tensor]:
        """Return the ids of this process's micro-batches in a step."""
        if isinstance(self.dataset, IterableDataset):
            ids = torch.arange(step * self.batch_size, (step + 1) * self.batch_size) % 2**32
        elif self.order is not None:
            ids = self.order(step)
        else:
            ids = keyed_order(step, len(self.dataset), batch_size=self.batch_size, seed=self.seed)  # type: ignore[arg-type]
        if len(ids) % self.processes or not len(ids):
            raise ValueError(f"dataset: expected a multiple of {self.processes} samples in a step, got {len(ids)}")
        mine = ids.chunk(self.processes)[self.rank]
        return list(mine.split(self.micro_batch or len(mine)))

    def since(self, first: int, steps: int) -> Iterator[list[Part]]:
        """Yield the parts of steps first, …, steps - 1."""
        loaded = self._loaded(first, steps)
        for step in range(first, steps):
            ids = self.of(step)
            whole = self.processes * sum(len(part) for part in ids)
            yield [Part(next(loaded), part, len(part) / whole) for part in ids]

    def _loaded(self, first: int, steps: int) -> Iterator[Any]:
        parts = ((step, ids) for step in range(first, steps) for ids in self.of(step))
        if type(self.dataset) is TensorDataset and self.collate is None:
            tensors = self.dataset.tensors
            return (tuple(x[ids] for x in tensors) for _, ids in parts)
        collate = self.collate or default_collate
        if isinstance(self.dataset, IterableDataset):
            return self._streamed(first, parts, collate)
        loader: DataLoader[Any] = DataLoader(
            _Keyed(self.dataset, self.seed),
            batch_sampler=_Sampler(parts),  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # do not advance the caller's
        )
        return iter(loader)

    def _streamed(self, first: int, parts: Iterable[tuple[int, Tensor]], collate: Collate) -> Iterator[Any]:
        stream, at = _endless(self.dataset, int(fold_in(self.seed, AUGMENTATION))), first * self.batch_size
        next(islice(stream, at, at), None)
        for step, ids in parts:
            offset = int((ids[0] - step * self.batch_size) % 2**32)
            start = step * self.batch_size + offset
            next(islice(stream, start - at, start - at), None)
            at = start + len(ids)
            yield collate(list(islice(stream, len(ids))))


def _endless(dataset: Dataset[Any], seed: int) -> Iterator[Any]:
    """The items of a stream, again and again; what it draws for the k-th is a function of (seed, k)."""
    begun, count, items = -1, 0, iter(())
    while True:
        with draws_alike(int(fold_in(seed, count)), CPU)():
            item = next(items, _END)
            if item is _END:
                if count == begun:
                    raise ValueError("dataset: expected at least one sample, got none")
                begun, items = count, iter(dataset)
                continue
        count += 1
        yield item


class _Sampler:
    """The indices that a loader requests from the dataset, batch by batch."""

    def __init__(self, parts: Iterable[tuple[int, Tensor]]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[Sequence[tuple[int, int]]]:
        for step, ids in self.parts:
            yield [(step, index) for index in ids.tolist()]
