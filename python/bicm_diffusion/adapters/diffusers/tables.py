"""A schedule's tables on the host: its levels, the weights made from them, and the inputs of both."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

Number = float | Tensor
Row = tuple[Number, ...]

#: A scheduler's attribute by its name, as it was read, and its version counter.
Source = tuple[str, Any, int | None]

#: The `__torch_function__` of tensor classes without overridden operations, such as parameters.
UNCHANGED = torch.nn.Parameter.__torch_function__


class Reading:
    """The inputs of tables. Every step asks whether they are the same, so C functions compare them where possible."""

    def __init__(self, own: dict[str, Any], sources: tuple[Source, ...], chosen: Callable[[Any], Any]) -> None:
        """Note the inputs. own: the scheduler's attributes. chosen: takes the options from those of a configuration."""
        names = [*(name for name, _, _ in sources), "num_inference_steps"]
        present = [name for name in names if name in own]
        # The first one twice: with a single name, the getter would return no tuple.
        self._get = itemgetter(present[0], *present)
        self._seen = self._get(own)
        self._absent = frozenset(names).difference(present)
        self._counted = tuple((source, version) for _, source, version in sources if version is not None)
        self._tensors = tuple(source for _, source, _ in sources if isinstance(source, Tensor))
        self._chosen = chosen
        #: The values of the options that a step reads.
        self.options: Any = ()
        #: Whether the tables give weights.
        self.used = True

    def stale(self, own: dict[str, Any]) -> bool:
        """Whether any of it is another object now, or was written to. own: the scheduler's attributes."""
        try:
            # Tuples compare by identity first. The comparison of two tensors raises, or is true of equal numbers.
            if self._get(own) != self._seen:
                return True
            for source, version in self._counted:
                if source._version != version:  # type: ignore[union-attr]
                    return True
            # Recording or not is a matter of gradients alone: without them the tables serve as they are.
            if torch.is_grad_enabled() and self.used:
                for source in self._tensors:
                    if source.requires_grad:
                        return True
            # The originals read attributes of the configuration, which may differ from its items.
            if self._chosen(own["_internal_dict"].__dict__) != self.options:
                return True
            return bool(self._absent) and not self._absent.isdisjoint(own)
        except Exception:  # an option that was deleted, or that is no number
            return True


@dataclass
class Timesteps:
    """The host's copy of the timesteps, and their addresses."""

    values: list[float] = field(default_factory=list)
    #: The storage, the first timestep's offset in it, and the stride in bytes.
    memory: Tensor | None = None
    address: int = 0
    spacing: int = 0
    #: How often the tensor had been written to.
    version: int | None = None

    def at(self, timestep: Tensor) -> float | None:
        """The timestep in a 0-d tensor, identified by address, which avoids a device sync; None for other tensors."""
        if self.memory is None or not self.spacing or timestep.dtype is not self.memory.dtype:
            return None
        try:
            position, rest = divmod(timestep.data_ptr() - self.address, self.spacing)
        except RuntimeError:  # a transform's tensor has no address
            return None
        return self.values[position] if rest == 0 and 0 <= position < len(self.values) else None


@dataclass
class Tables:
    """The host's copy of a schedule, and the weights made from it so far; schedulers add fields."""

    reading: Reading
    #: Why no step can be fused, if none can.
    reason: str | None = None
    timesteps: Timesteps = field(default_factory=Timesteps)
    levels: list[float] = field(default_factory=list)
    #: None where the original has to run.
    rows: dict[Any, Row | None] = field(default_factory=dict)
    #: The same rows as float64 tensors, for graphs, and at which steps there is none.
    traced: dict[Any, Tensor] = field(default_factory=dict)
    holes: dict[Any, list[int]] = field(default_factory=dict)

    def read(self, timesteps: Tensor | None, levels: list[float]) -> None:
        """Copy a schedule to the host. PNDM has no timesteps before they are set."""
        self.levels = levels
        if timesteps is None:
            return
        # The alias keeps the storage alive if the tensor gets another one, so that its addresses stay those of
        # timesteps.
        spacing = timesteps.stride(0) * timesteps.element_size()
        address, version = timesteps.data_ptr(), version_of(timesteps)
        self.timesteps = Timesteps(timesteps.tolist(), timesteps.detach(), address, spacing, version)

    def put(self, name: Any, make: Callable[[int], Row], count: int) -> None:
        """Make a row for each step; for one that cannot be made, or that is not finite, the original step runs."""
        rows = []
        for index in range(count):
            try:
                row: Row | None = make(index)
            except (ZeroDivisionError, ValueError, OverflowError):
                row = None
            rows.append(row if row is not None and all(map(math.isfinite, row)) else None)
        self.rows.update(((name, index), row) for index, row in enumerate(rows))
        width = max((len(row) for row in rows if row is not None), default=0)
        self.traced[name] = torch.tensor([row or (math.nan,) * width for row in rows], dtype=torch.float64)
        self.holes[name] = [index for index, row in enumerate(rows) if row is None]

    def row(self, name: Any, index: int, device: torch.device | None = None) -> Any:
        """A step's weights, or None; as 0-d tensors on a device for a graph, where an index would be a constant."""
        if device is None:
            return self.rows.get((name, index))
        rows = self.traced[name]
        if index >= len(rows) or any(index == hole for hole in self.holes[name]):
            return None
        return rows[index].to(device).unbind()


def version_of(source: Any) -> int | None:
    """A tensor's version counter, where it has one."""
    return source._version if isinstance(source, Tensor) and not source.is_inference() else None


def overrides(x: Any) -> bool:
    """Whether a tensor's class overrides operations. Modes, such as a default device, are not considered."""
    kind = type(x)
    return kind is not Tensor and getattr(kind, "__torch_function__", UNCHANGED) is not UNCHANGED


def unreadable(sources: tuple[Source, ...], options: tuple[tuple[str, Any], ...]) -> str | None:
    """Why weights cannot be made once, on the host, from a schedule and options: their dtype, or a gradient."""
    for name, source, _ in sources:
        if source is None and name == "timesteps":
            continue  # not set yet
        if not isinstance(source, Tensor | Real) or overrides(source):
            return f"{name} as {type(source).__name__}"
        if isinstance(source, Tensor) and (source.is_complex() or _is_narrow(source)):
            return f"{name} of {source.dtype}"  # in which the original computes
        if isinstance(source, Tensor) and source.requires_grad:
            return f"{name} that requires a gradient"
    for name, option in options:
        if not (option is None or isinstance(option, str | Real)):
            return f"{name} as {type(option).__name__}"
    return None


def _is_narrow(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype.itemsize < 4


def single(x: Number) -> Number:
    """A number rounded to float32, so that weights made from it match the kernel's rounded value."""
    return x.float().double() if isinstance(x, Tensor) else struct.unpack("f", struct.pack("f", x))[0]


def root(x: Number) -> Number:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def is_double(*tensors: Tensor) -> bool:
    return any(x.dtype == torch.float64 for x in tensors)
