"""Pairs: the two states that determine a trajectory, in floating point or as integers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.samplers.prediction import Number
from bicm_diffusion.samplers.record import Record, hand_out
from bicm_diffusion.samplers.storage import pack, read, unpack, write
from bicm_diffusion.samplers.subsets import joined, taken, taker
from bicm_kernels import affine_step, fixed_point_decode

P = TypeVar("P", bound="Pair")

#: How to keep integers in range, apart from fewer steps, where a method's factors are below 1.
_REMEDIES = {
    "BDIA": "a gamma nearer to 1",
    "BDIADDIMScheduler": "a gamma nearer to 1",
    "BDIAFlowMatchScheduler": "a gamma nearer to 1",
    "EDICT": "a p nearer to 1",
    "O-BELM": "levels more nearly uniform in sigma/alpha",
}


@dataclass(frozen=True, eq=False, repr=False)
class Pair:
    """Base class of pairs: unpacking into two states, moving, splitting, joining, saving and copying with the `record`.

    pair[2:4], pair[[0, 3]] and pair[mask] are pairs of those samples, and retrace to the same bits. A pair pickles,
    copies and works with torch.save and torch.load(weights_only=True); `save_pair` writes safetensors.
    """

    record: Record | None = field(default=None, repr=False, kw_only=True)
    _kinds: ClassVar[dict[str, type[Pair]]] = {}

    def __init_subclass__(cls) -> None:
        Pair._kinds[cls.__name__] = cls

    def __iter__(self) -> Iterator[Tensor]:
        """Unpack into the two states."""
        raise NotImplementedError

    def __getitem__(self: P, index: Any) -> P:
        """Return the pair of some samples: a slice, a list or tensor of their numbers, or of booleans.

        Raises TypeError for another index, a single number too.

        >>> pair = StatePair(torch.eye(3), torch.zeros(3, 3))
        >>> pair[1:].z
        tensor([[0., 1., 0.],
                [0., 0., 1.]])
        """
        take = taker(index)
        record = self.record
        kept = {f.name: take(x) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor) and x.dim()}
        return replace(self, **kept, record=record if record is None else taken(record, take, len(self._first)))

    @staticmethod
    def cat(pairs: Sequence[P]) -> P:
        """Return the samples of several pairs as one, which retraces each of them to the same bits.

        Raises TypeError for other objects or pairs of several kinds, and ValueError for none, or where they were made
        with other settings, levels or dtypes.

        >>> pair = StatePair(torch.eye(3), torch.zeros(3, 3))
        >>> torch.equal(StatePair.cat([pair[:1], pair[1:]]).z, pair.z)
        True
        """
        kinds = {type(pair) for pair in pairs}
        if len(kinds) > 1 or not all(isinstance(pair, Pair) for pair in pairs):
            raise TypeError(f"pairs: expected pairs of one kind, got {described([*pairs])}")
        if not kinds:
            raise ValueError("pairs: expected at least one, got none")
        dtypes = {pair._dtype for pair in pairs}
        if len(dtypes) > 1:
            raise ValueError(f"pairs: expected one dtype, got {', '.join(sorted(map(str, dtypes)))}")
        first = pairs[0]
        names = [f.name for f in fields(first) if isinstance(x := getattr(first, f.name), Tensor) and x.dim()]
        tensors = {name: torch.cat([getattr(pair, name) for pair in pairs]) for name in names}
        record = joined([pair.record for pair in pairs], [len(pair._first) for pair in pairs])
        return replace(first, **tensors, record=record)

    def __repr__(self) -> str:
        x, made = self._first, self.record
        about = "no record" if made is None else f"{made.method}, {made.steps} steps, at index {made.index}"
        return f"{type(self).__name__}({about}; {tuple(x.shape)} {self._dtype} on {x.device})"

    @property
    def _first(self) -> Tensor:
        """The first of the tensors, (B, …)."""
        tensor: Tensor = getattr(self, fields(self)[1].name)
        return tensor

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of the states in floating point."""
        return self._first.dtype

    def to(self: P, *targets: Any, device: Any = None, dtype: torch.dtype | None = None) -> P:
        """Return the pair on another device, its states in another dtype: to(device), to(dtype) or both.

        The integers of an exact pair keep their bits for every dtype; floating-point states are rounded.
        Raises TypeError for a dtype that is not floating.

        >>> StatePair(torch.ones(1, 2), torch.ones(1, 2)).to(torch.float64).z.dtype
        torch.float64
        """
        for target in targets:
            device, dtype = (device, target) if isinstance(target, torch.dtype) else (target, dtype)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
        moved = self if device is None else self._mapped(lambda x: x.to(device))
        return moved if dtype is None else moved._cast(dtype)

    def detach(self: P) -> P:
        """Return the pair with its tensors detached."""
        return self._mapped(Tensor.detach)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that the pair holds as tensors by name, for safetensors, torch.save and others.

        Reads the device where conditions of the model are tensors on one.
        """
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        record = known.pop("record")
        tensors = {name: x for name, x in known.items() if isinstance(x, Tensor)}
        words = {name: x for name, x in known.items() if name not in tensors}
        return pack(type(self).__name__, tensors, words, record)

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor]) -> Any:
        """Return the pair, of whichever kind, that a `state_dict` was made of.

        Raises ValueError for another state_dict, and TypeError unless it is a dictionary.

        >>> pair = StatePair(torch.ones(1, 2), torch.zeros(1, 2))
        >>> StatePair.from_state_dict(pair.state_dict()).previous
        tensor([[0., 0.]])
        """
        kind, tensors, words, record = unpack(state)
        if kind not in Pair._kinds:
            raise ValueError(f"state: expected one of {', '.join(Pair._kinds)}, got {kind!r}")
        try:
            return Pair._kinds[kind]._made(tensors, words, record)
        except (TypeError, KeyError) as error:
            raise ValueError(f"state: expected the state_dict of an {kind}, got the names {[*state]}") from error

    @classmethod
    def _made(cls: type[P], tensors: Mapping[str, Tensor], _: Mapping[str, Any], record: Record | None) -> P:
        return cls(**tensors, record=record)

    def __reduce__(self) -> tuple[Any, ...]:
        return restored_pair, (self.state_dict(),)

    def _mapped(self: P, change: Callable[[Tensor], Tensor]) -> P:
        record = self.record
        tensors = {f.name: change(x) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, **tensors, record=record if record is None else record.mapped(change))

    def _cast(self: P, dtype: torch.dtype) -> P:
        return self._mapped(lambda x: x.to(dtype) if x.is_floating_point() else x)


@dataclass(frozen=True, eq=False, repr=False)
class StatePair(Pair):
    """Two neighbouring states of a trajectory: where it stands, and where it stood one index earlier.

    A trajectory of two states can be retraced only from both. record: what made the pair; without one nothing is
    checked.
    """

    z: Tensor
    previous: Tensor

    def __post_init__(self) -> None:
        hand_out(self.z, self.record)
        hand_out(self.previous, self.record, inner=True)

    def __iter__(self) -> Iterator[Tensor]:
        """Unpack into z and previous."""
        return iter((self.z, self.previous))


@dataclass(frozen=True, eq=False, repr=False)
class TwinPair(Pair):
    """EDICT's two states of one index, either of which is an image or its noise."""

    z: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        hand_out(self.z, self.record)
        hand_out(self.y, self.record)

    def __iter__(self) -> Iterator[Tensor]:
        """Unpack into z and y."""
        return iter((self.z, self.y))


@dataclass(frozen=True, eq=False, repr=False)
class ExactPair(Pair):
    """Two states of a trajectory as integers, from which every bit of it can be retraced.

    q, previous_q: (B, …) int64, states in units of unit and previous_unit (1, or alpha) on a grid of 2^-32.
    info: (B, …) int64, the buffer that keeps what divisions drop; all zeros at the end where the trajectory began.
    overflow: (B,) int64, 0 where all went well, else the number i of the step between the indices i - 1 and i.
    dtype: of z and previous, the states in floating point. record: what made the pair.
    """

    q: Tensor
    previous_q: Tensor
    info: Tensor
    overflow: Tensor
    unit: Number
    previous_unit: Number
    dtype: torch.dtype

    @property
    def z(self) -> Tensor:
        """The state where the trajectory stands, (B, …) in `dtype`."""
        return hand_out(decode(self.q, self.unit, torch.float64).to(self.dtype), self.record)

    @property
    def previous(self) -> Tensor:
        """The state at the adjacent index, (B, …) in `dtype`."""
        state = decode(self.previous_q, self.previous_unit, torch.float64).to(self.dtype)
        return hand_out(state, self.record, inner=True)

    def __iter__(self) -> Iterator[Tensor]:
        """Unpack into z and previous, as a pair of floats unpacks."""
        return iter((self.z, self.previous))

    def check(self) -> None:
        """Raise OverflowError where a sample left the range of its integers; reads the device."""
        steps = self.overflow.tolist()
        wrong = [b for b, step in enumerate(steps) if step]
        if not wrong:
            return
        raise OverflowError(
            f"sample {wrong[0]} left the range of its integers in the step between indices {steps[wrong[0]] - 1} and "
            f"{steps[wrong[0]]} ({len(wrong)} of {len(steps)} samples did): {self._remedy()}; a model that returns NaN "
            "or infinity, or a guide whose shift is too large, causes this too"
        )

    def _remedy(self) -> str:
        known = self.record
        gamma = None if known is None else known.settings.get("gamma")
        if gamma == (1, 1):
            return "states must stay below 2^31, so scale the data, or pass exact=False"
        remedy = _REMEDIES.get(known.method, "") if known is not None else ""
        choice = f"take fewer steps or {remedy}" if remedy else "take fewer steps"
        return f"a factor n/m costs log2(m/n) bits per step, so {choice}, or pass exact=False"

    @classmethod
    def _made(cls: type[P], tensors: Mapping[str, Tensor], words: Mapping[str, Any], record: Record | None) -> P:
        units = {name: words[name] for name in ("unit", "previous_unit") if name in words}
        return cls(**tensors, **units, dtype=getattr(torch, words["dtype"]), record=record)  # type: ignore[call-arg]

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that the pair holds as tensors by name, for safetensors, torch.save and others.

        Reads the device where conditions of the model are tensors on one.
        """
        tensors = {name: getattr(self, name) for name in ("q", "previous_q", "info", "overflow")}
        words: dict[str, Any] = {"unit": float(self.unit), "previous_unit": float(self.previous_unit)}
        words["dtype"] = str(self.dtype).removeprefix("torch.")
        return pack(type(self).__name__, tensors, words, self.record)

    @property
    def _dtype(self) -> torch.dtype:
        return self.dtype

    def _cast(self: P, dtype: torch.dtype) -> P:
        return replace(self, dtype=dtype)  # type: ignore[call-arg]


@dataclass(frozen=True, eq=False, repr=False)
class ExactTwins(ExactPair):
    """EDICT's two states as integers, in units of alpha; the second of the pair is y."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.z, self.y))

    @property
    def y(self) -> Tensor:
        """The second state, (B, …) in `dtype`."""
        return hand_out(self.previous, self.record)


def decode(q: Tensor, unit: Number, dtype: torch.dtype) -> Tensor:
    """Return unit·q in floating point."""
    if isinstance(unit, float) and unit == 1.0:
        return fixed_point_decode(q, dtype=dtype)
    # q alone may leave the range of float16, where alpha is small.
    wide = torch.float32 if dtype == torch.float16 else dtype
    return affine_step([fixed_point_decode(q, dtype=wide)], [unit]).to(dtype)


def save_pair(pair: Pair, path: str | os.PathLike[str]) -> None:
    """Write a pair to a safetensors file, from which `load_pair` returns it with every bit and its record.

    Raises ImportError where safetensors is missing, and TypeError for other objects.

    >>> import tempfile
    >>> pair = StatePair(torch.ones(1, 2), torch.zeros(1, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pair(pair, f"{folder}/pair.safetensors")
    ...     torch.equal(load_pair(f"{folder}/pair.safetensors").z, pair.z)
    True
    """
    if not isinstance(pair, Pair):
        raise TypeError(f"pair: expected a pair, got {described(pair)}")
    write(pair.state_dict(), path)


def load_pair(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Any:
    """Return the pair that `save_pair` wrote, of whichever kind, on a device.

    Raises ImportError where safetensors is missing, TypeError unless it is a path, and ValueError for
    other files.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pair(StatePair(torch.ones(1, 2), torch.zeros(1, 2)), f"{folder}/pair.safetensors")
    ...     load_pair(f"{folder}/pair.safetensors", "cpu")
    StatePair(no record; (1, 2) torch.float32 on cpu)
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected the path of a file that save_pair wrote, got {described(path)}")
    return Pair.from_state_dict(read(path, device))


def restored_pair(state: Mapping[str, Tensor]) -> Any:
    """Return an unpickled pair."""
    return Pair.from_state_dict(state)


# Allowed in torch.load(weights_only=True): it makes pairs of tensors and nothing else.
torch.serialization.add_safe_globals([restored_pair])
