"""What a schedule comes to on the host: its levels, the weights made from them, and what both were made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

Number = float | Tensor
Row = tuple[Number, ...]

#: A scheduler's attribute by its name, as it was read, and how often it had been written to.
Source = tuple[str, Any, int | None]

#: What stands for operations of its own in a class of tensors that has none, as parameters do.
UNCHANGED = torch.nn.Parameter.__torch_function__


@dataclass
class Tables:
    """The host's copy of a schedule, and the rows of weights made from it so far."""

    sources: tuple[Source, ...]
    options: Any
    #: The scheduler's number of steps.
    steps: int | None
    #: Why no step can be fused, if none can.
    reason: str | None = None
    timesteps: list[float] = field(default_factory=list)
    levels: list[float] = field(default_factory=list)
    #: The timesteps' memory, where the first of them lies in it, and how many bytes further the next.
    memory: Tensor | None = None
    address: int = 0
    spacing: int = 0
    rows: dict[Any, Row | None] = field(default_factory=dict)
    #: The same rows or levels as float64 tensors, for graphs, and at which steps the original has to run.
    traced: dict[Any, Tensor] = field(default_factory=dict)
    holes: dict[Any, list[int]] = field(default_factory=dict)
    #: The scale of the model's input at each level.
    scales: list[float] = field(default_factory=list)
    #: How many training timesteps lie between two steps.
    gap: int = 0
    #: Where x0 is clipped, if it is.
    clip: float | None = None
    #: Whether x0 is what the model predicts.
    gives_output: bool = False
    #: Whether the schedule is short enough for lower orders at its end, and whether its last step is of the first.
    short: bool = False
    ends_low: bool = False
    #: How many steps, from the first, predict x0 as a small difference of large terms.
    cancelling: int = 0

    def read(self, timesteps: Tensor, levels: list[float]) -> None:
        """Copy a schedule to the host."""
        self.timesteps, self.levels = timesteps.tolist(), levels
        # The alias keeps the memory when the tensor is given another: what lies at an address in it is a timestep.
        self.memory = timesteps.detach()
        self.address, self.spacing = timesteps.data_ptr(), timesteps.stride(0) * timesteps.element_size()

    def at(self, timestep: Tensor) -> float | None:
        """The timestep that a 0-d tensor is, told by where it lies, without asking its device; None for another one."""
        if self.memory is None or not self.spacing or timestep.dtype is not self.memory.dtype:
            return None
        try:
            position, rest = divmod(timestep.data_ptr() - self.address, self.spacing)
        except RuntimeError:  # a transform's tensor lies nowhere
            return None
        return self.timesteps[position] if rest == 0 and 0 <= position < len(self.timesteps) else None

    def row(self, name: Any, index: int, device: torch.device) -> Any:
        """A step's weights for a graph, or None. A look-up among rows would bind the graph to the step."""
        rows = self.traced[name]
        if index >= len(rows) or any(index == hole for hole in self.holes.get(name, [])):
            return None
        return rows[index].to(device).unbind()


def version_of(source: Any) -> int | None:
    """How often a tensor was written to, where PyTorch counts that."""
    return source._version if isinstance(source, Tensor) and not source.is_inference() else None


def overrides(x: Any) -> bool:
    """Whether a tensor's class has operations of its own. A mode, such as a default device, is not asked about."""
    kind = type(x)
    return kind is not Tensor and getattr(kind, "__torch_function__", UNCHANGED) is not UNCHANGED


def unreadable(sources: tuple[Source, ...], options: tuple[tuple[str, Any], ...]) -> str | None:
    """Why weights cannot be made once, on the host, from a schedule and options: what they are, or that they change."""
    for name, source, _ in sources:
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
