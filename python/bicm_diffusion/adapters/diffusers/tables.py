"""A schedule's tables on the host: its levels, the weights made from them, and the inputs of both."""

from __future__ import annotations

import copy
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bicm_kernels.inputs import Source, note, place_in

Number = float | Tensor
Row = tuple[Number, ...]

#: The `__torch_function__` of tensor classes without overridden operations, such as parameters.
UNCHANGED = torch.nn.Parameter.__torch_function__


def noted(own: dict[str, Any], sources: tuple[Source, ...], options: tuple[tuple[str, Any], ...], used: bool) -> Any:
    """Note what tables were made from, for `bicm_kernels.inputs`.

    own: the scheduler's attributes. used: whether the tables give weights; otherwise gradients do not matter.
    """
    steps = "num_inference_steps"
    sources = (*sources, (steps, own.get(steps), None))
    present = tuple(source for source in sources if source[0] in own)
    absent = tuple(name for name, _, _ in sources if name not in own)
    return note(present, absent, "_internal_dict", options, used)


@dataclass
class Timesteps:
    """The host's copy of the timesteps, and the tensor."""

    values: list[float] = field(default_factory=list)
    #: An alias, which keeps the storage alive if the tensor gets another one, so that its addresses stay those of
    #: timesteps.
    memory: Tensor | None = None
    #: How often the tensor had been written to.
    version: int | None = None

    def at(self, timestep: Tensor) -> float | None:
        """The timestep in a 0-d tensor, identified by address, which avoids a device sync; None for other tensors."""
        place = None if self.memory is None else place_in(self.memory, timestep)
        return None if place is None else self.values[place]


@dataclass
class Tables:
    """The host's copy of a schedule, and the weights made from it so far; schedulers add fields."""

    #: What all of it was made from, see `noted`.
    inputs: Any = None
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
        self.timesteps = Timesteps(timesteps.tolist(), timesteps.detach(), version_of(timesteps))

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


def counting(sources: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of those that were made in inference mode, whose writes nothing counts; views of one another stay so."""
    uncounted = {name: x for name, x in sources.items() if type(x) is Tensor and x.is_inference()}
    if not uncounted:
        return {}
    with torch.inference_mode(False), torch.no_grad():
        return copy.deepcopy(uncounted)


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
