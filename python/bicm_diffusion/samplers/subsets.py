"""Selecting samples of a pair and joining pairs, with their tensors and records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.samplers.record import Conditions, Record

Taken: TypeAlias = Callable[[Tensor], Tensor]


def taker(index: object) -> Taken:
    """Return a function that selects the samples of an index, a slice, a list or a tensor, from a (B, …) tensor.

    Raises TypeError for another index, including a single number, because a pair unpacks into two states.
    """
    if isinstance(index, slice):
        return lambda x: x[index]
    if isinstance(index, int):
        raise TypeError(
            f"index: expected a slice, a list or a tensor, got {index}: pair[{index}:{index + 1}] is a pair of one "
            "sample, pair.z the state of all"
        )
    try:
        samples = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"index: expected a slice, a list or a tensor, got {described(index)}") from None
    if not len(samples):
        samples = samples.long()
    if samples.dim() != 1 or samples.dtype not in (torch.bool, torch.int64, torch.int32):
        raise TypeError(f"index: expected integers or booleans, (n,), got {described(samples)}")
    return lambda x: x[samples.to(x.device)]


def taken(record: Record, take: Taken, batch: int) -> Record:
    """Return the record of some samples of a pair of `batch`."""

    def some(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(some, value))
        return take(value) if isinstance(value, Tensor) and value.dim() and len(value) == batch else value

    conditions = record.conditions
    if isinstance(conditions, Conditions):
        arguments = {name: some(value) for name, value in conditions.extra_args.items()}
        conditions = Conditions(some(conditions.guidance_scale), arguments, conditions.guide)
    settings = {name: some(value) for name, value in record.settings.items()}
    origin = None if record.origin is None else take(record.origin)
    return replace(record, settings=settings, origin=origin, conditions=conditions)


def joined(records: Sequence[Record | None], batches: Sequence[int]) -> Record | None:
    """Return the record of several pairs as one; raises ValueError unless their settings and index agree.

    batches: how many samples each has.
    """
    known = [record for record in records if record is not None]
    if not known:
        return None
    if len(known) < len(records):
        raise ValueError("pairs: expected all with a record or all without, got some of each")
    first = known[0]
    for other in known[1:]:
        for name in ("method", "steps", "index"):
            _check_same(name, getattr(first, name), getattr(other, name))
        if first.levels is not other.levels and first.table() != other.table():
            raise ValueError("pairs: expected one schedule, got several")
    settings = {name: _across(name, [record.settings[name] for record in known], batches) for name in first.settings}
    origins = [record.origin for record in known if record.origin is not None]
    origin = torch.cat(origins) if len(origins) == len(known) else None
    # Where conditions differ they are dropped: a different result may be intended.
    conditions = first.conditions if len({record.digest() for record in known}) == 1 else "several"
    return replace(first, settings=settings, origin=origin, conditions=conditions)


def _across(name: str, values: Sequence[Any], batches: Sequence[int]) -> Any:
    """A setting of all samples: the common one, or per sample where it is per sample in a pair."""
    if all(isinstance(value, tuple) for value in values):
        return tuple(_across(name, parts, batches) for parts in zip(*values, strict=True))
    like = next((value for value in values if isinstance(value, Tensor)), None)
    if like is None:
        for value in values[1:]:
            _check_same(name, values[0], value)
        return values[0]
    each = [torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in values]
    return torch.cat([value.expand(batch) for value, batch in zip(each, batches, strict=True)])


def _check_same(name: str, one: Any, other: Any) -> None:
    if one != other:
        raise ValueError(f"pairs: expected one {name}, got {one!r} and {other!r}")
