"""A schedule's tables on the host: its levels, the weights made from them, and the inputs of both."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

Number = float | Tensor
Row = tuple[Number, ...]

#: A scheduler's attribute by its name, as it was read, and its version counter.
Source = tuple[str, Any, int | None]

#: The `__torch_function__` of tensor classes without overridden operations, such as parameters.
UNCHANGED = torch.nn.Parameter.__torch_function__


@dataclass
class Reading:
    """The inputs of tables."""

    sources: tuple[Source, ...]
    #: The scheduler's number of steps.
    steps: int | None
    #: The values of the options that a step reads, and what takes them from a configuration's attributes.
    options: Any = ()

    chosen: Callable[[Any], Any] = tuple
    #: Whether the tables give weights.
    used: bool = True

    def stale(self, own: dict[str, Any]) -> bool:
        """Whether any of it is another object now, or was written to. own: the scheduler's attributes."""
        try:
            for name, source, version in self.sources:
                if own.get(name) is not source or (version is not None and source._version != version):  # type: ignore[union-attr]
                    return True
            # Recording or not is a matter of gradients alone: without them the tables serve as they are.
            if torch.is_grad_enabled() and self.used and any(_requires_grad(source) for _, source, _ in self.sources):
                return True
            # The originals read attributes of the configuration, which may differ from its items.
            if self.chosen(own["_internal_dict"].__dict__) != self.options:
                return True
            return own.get("num_inference_steps") is not self.steps
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
        if isinstance(source, Tensor) and source.is_floating_point() and source.dtype.itemsize < 4:
            return f"{name} of {source.dtype}"  # in which the original computes
        if isinstance(source, Tensor) and source.requires_grad:
            return f"{name} that requires a gradient"
    for name, option in options:
        if not (option is None or isinstance(option, str | Real)):
            return f"{name} as {type(option).__name__}"
    return None


def _requires_grad(source: Any) -> bool:
    return isinstance(source, Tensor) and source.requires_grad


def single(x: Number) -> Number:
    """A number rounded to float32, so that weights made from it match the kernel's rounded value."""
    return x.float().double() if isinstance(x, Tensor) else struct.unpack("f", struct.pack("f", x))[0]


def root(x: Number) -> Number:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def is_double(*tensors: Tensor) -> bool:
    return any(x.dtype == torch.float64 for x in tensors)
