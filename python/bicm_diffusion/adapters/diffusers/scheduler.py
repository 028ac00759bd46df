"""What every accelerated scheduler shares: tables made on the host, keys of noise, and the way back to the original.

An accelerated scheduler is a subclass of the diffusers class that it stands for, with the same name, configuration and
state, and another `step`. Whatever its step does not cover goes to the original step, on the same state.
"""

from __future__ import annotations

import struct
import warnings
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from bicm_diffusion.keys import SCHEDULER
from bicm_kernels import fold_in, generator_normal

Number = float | Tensor
Integer = int | Tensor
Row = tuple[Number, ...]
Generators = Generator | list[Generator] | None
Noise = Literal["generator", "keyed"]

traced = torch.compiler.is_compiling


@dataclass
class Tables:
    """What a schedule comes to: the host's copy of its levels, and the rows of weights made from them so far."""

    sources: tuple[Any, ...]
    version: int
    reason: str | None
    timesteps: list[float]
    levels: list[float]
    #: Where the first timestep lies in memory, and how many bytes further the next.
    address: int
    spacing: int
    #: Whether PyTorch counts how often the first source was written to.
    counts: bool
    rows: dict[Any, Row | None] = field(default_factory=dict)
    #: The same rows or levels as float64 tensors, for graphs, and at which steps the original has to run.
    traced: dict[Any, Tensor] = field(default_factory=dict)
    holes: dict[Any, list[int]] = field(default_factory=dict)
    #: The scale of the model's input at each level.
    scales: list[float] = field(default_factory=list)
    #: Where x0 is clipped, if it is.
    clip: float | None = None
    #: Whether x0 is what the model predicts.
    gives_output: bool = False
    #: How many steps, from the first, predict x0 as a small difference of large terms.
    cancelling: int = 0

    def row(self, name: Any, index: int, device: torch.device) -> Any:
        """A step's weights for a graph, or None. A look-up among rows would bind the graph to the step."""
        rows = self.traced[name]
        if index >= len(rows) or any(index == hole for hole in self.holes.get(name, [])):
            return None
        return rows[index].to(device).unbind()


class Accelerated:
    """A scheduler whose step is one fused launch; mixed into a diffusers class by `accelerate_scheduler`."""

    _original: ClassVar[Any]
    _tables: Tables | None = None
    _pending: tuple[Any, ...] | None = None
    _foresees = True
    _noise: Noise = "generator"
    _seed: Integer = 0
    _sample_id: Integer = 0
    _seeds: tuple[Any, ...] = ()
    _told: tuple[str, ...] = ()

    config: Any
    _internal_dict: Any
    timesteps: Tensor
    sigmas: Tensor
    begin_index: int | None
    _step_index: int | None
    _begin_index: int | None

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self._original.set_timesteps(self, *args, **kwargs)
        self._pending, self._foresees = None, True
        self._prepare()

    def _sources(self) -> tuple[Any, ...]:
        """What the tables are made from: other objects, or other contents, make them anew."""
        return self.sigmas, self.timesteps, self._internal_dict

    def _stale(self, tables: Tables) -> bool:
        levels, timesteps, config = tables.sources
        return (
            levels is not self.sigmas
            or timesteps is not self.timesteps
            or config is not self._internal_dict
            or (tables.counts and levels._version != tables.version)
        )

    def _uncovered(self) -> str | None:
        """Why no step of this configuration can be fused, if it cannot."""
        return None

    def _host_levels(self) -> list[float]:
        return self.sigmas.tolist()

    def _fill(self, tables: Tables) -> None:
        """Make what a graph will need, since nothing can be made while one is traced."""

    def _prepare(self) -> Tables:
        sources, reason = self._sources(), self._uncovered()
        times = self.timesteps
        tables = Tables(
            sources,
            version_of(sources[0]),
            reason,
            times.tolist(),
            self._host_levels(),
            address=times.data_ptr(),
            spacing=times.stride(0) * times.element_size(),
            counts=not sources[0].is_inference(),
        )
        if reason is None:
            self._fill(tables)
        else:
            self._say(reason)
        self._tables = tables
        return tables

    def _ready(self, model_output: Tensor, sample: Tensor, graph: bool) -> Tables | None:
        """The tables of the schedule as it is now; None sends a step to the original. graph: whether one is traced."""
        tables = self._tables
        if graph:
            return None if tables is None or tables.reason is not None else tables
        if tables is None or self._stale(tables):
            tables = self._prepare()
        if tables.reason is not None:
            return None
        shape = sample.shape if isinstance(sample, Tensor) else ()
        if not shape or (sample is not model_output and shape != model_output.shape):
            self._say("a sample and a model output of different shapes")
            return None
        return tables

    def _say(self, reason: str) -> None:
        if reason not in self._told:
            self._told = (*self._told, reason)
            warnings.warn(
                f"{type(self).__name__}: {reason} is not accelerated, the original step runs", UserWarning, stacklevel=3
            )

    # --- noise --------------------------------------------------------------------------------------------------------
    def _drawn(self, like: Tensor, generator: Generators, dtype: torch.dtype | None = None) -> Tensor:
        """The noise that the original would draw."""
        shape, dtype = like.shape, dtype or like.dtype
        several = isinstance(generator, list) and len(generator) > 1
        missing = several and len(generator) < shape[0]  # type: ignore[arg-type]
        if traced() or not like.is_cpu or not all_on_host(generator) or missing:
            return randn_tensor(shape, generator=generator, device=like.device, dtype=dtype)
        if isinstance(generator, list):
            generator = generator[: shape[0]] if several else generator[0]
        return generator_normal(shape, generator=generator, dtype=dtype)

    def _key(self, generator: Generators, device: torch.device) -> tuple[Integer, Integer]:
        """The seed and sample id of keyed noise: those given, or the generators' own seeds without a draw."""
        if generator is None:
            return fold_in(self._seed, SCHEDULER), self._sample_id
        if isinstance(generator, Generator):
            return fold_in(generator.initial_seed(), SCHEDULER), self._sample_id
        if len(generator) == 1:
            return self._key(generator[0], device)
        given = (*(g.initial_seed() for g in generator), device)
        if not self._seeds or self._seeds[0] != given:
            seeds = [fold_in(g.initial_seed(), SCHEDULER) for g in generator]
            self._seeds = given, torch.tensor(seeds, dtype=torch.int64, device=device)
        return self._seeds[1], 0

    # --- the index of a step ------------------------------------------------------------------------------------------
    def _index(self, timestep: Any) -> int:
        if self._step_index is None:
            self._init_step_index(timestep)
        assert self._step_index is not None
        return self._step_index

    def _init_step_index(self, timestep: Any) -> None:
        if self.begin_index is not None:
            self._step_index = self._begin_index
        elif traced() and isinstance(timestep, Tensor):
            # A graph cannot search for a value. Loops start at the first timestep or call set_begin_index.
            torch._assert_async(timestep == self.timesteps[0], "set_begin_index before a graph that starts elsewhere")
            self._step_index = 0
        else:
            self._step_index = self._position(timestep)

    def _position(self, timestep: Any) -> int:
        tables = self._tables
        if tables is None or tables.sources[1] is not self.timesteps:
            tables = self._prepare()
        value = self._host_value(timestep, tables)
        first = tables.timesteps.index(value) if value in tables.timesteps else None
        if first is None:
            return self._original.index_for_timestep(self, timestep)
        # diffusers starts at the second of equal timesteps, so that a loop that starts half-way skips no level.
        again = value in tables.timesteps[first + 1 :]
        return tables.timesteps.index(value, first + 1) if again else first

    def _host_value(self, timestep: Any, tables: Tables) -> float:
        """A timestep as a number; an element of `timesteps` is told by where it lies, without asking its device."""
        if not isinstance(timestep, Tensor):
            return timestep
        if tables.spacing and timestep.dtype is tables.sources[1].dtype and timestep.dim() == 0:
            # The tables keep the timesteps alive, so whatever lies at such an address is one of them.
            position, rest = divmod(timestep.data_ptr() - tables.address, tables.spacing)
            if rest == 0 and 0 <= position < len(tables.timesteps):
                return tables.timesteps[position]
        return timestep.item()

    # --- the next evaluation's input ----------------------------------------------------------------------------------
    def _foreseen(self, sample: Tensor) -> Tensor | None:
        """The scaled sample, where the last step made it already."""
        pending, tables = self._pending, self._tables
        if pending is None or traced():
            return None
        self._pending = None
        made_for, version, at, scaled = pending
        unchanged = made_for() is sample and at == self._step_index and sample._version == version
        if unchanged and tables is not None and not self._stale(tables):
            return scaled
        self._foresees = False  # a caller who changes the sample first has no use for it
        return None

    def _foresee(self, sample: Tensor, index: int, scaled: Tensor) -> None:
        self._pending = weakref.ref(sample), sample._version, index, scaled

    def _may_foresee(self, sample: Tensor) -> bool:
        # Inference tensors do not tell whether they were written to.
        return self._foresees and not (sample.requires_grad or torch.is_inference_mode_enabled())

    # --- copies -------------------------------------------------------------------------------------------------------
    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_tables", "_pending", "_seeds")}
        return _restore, (self._original,), state


def _restore(original: Any) -> Any:
    from bicm_diffusion.adapters.diffusers.accelerate import accelerated_class

    cls = accelerated_class(original)
    return object.__new__(cls)


def as_output(graph: bool, cls: Any, previous: Tensor, name: str = "", x0: Tensor | None = None) -> Any:
    """Make a scheduler's output without the dataclass's own steps, which take as long as a small kernel."""
    if graph:
        return cls(**({"prev_sample": previous, name: x0} if name else {"prev_sample": previous}))
    result = cls.__new__(cls)
    attributes = result.__dict__
    attributes["prev_sample"] = previous
    _set_item(result, "prev_sample", previous)
    if name:
        attributes[name] = x0
        _set_item(result, name, x0)
    return result


_set_item = OrderedDict.__setitem__


def all_on_host(generator: Generators) -> bool:
    if isinstance(generator, list):
        return all(g.device.type == "cpu" for g in generator) and bool(generator)
    return generator is None or generator.device.type == "cpu"


def version_of(levels: Tensor) -> int:
    """How often a tensor was written to, where PyTorch counts that."""
    return 0 if levels.is_inference() else levels._version


def single(x: Number) -> Number:
    """A number rounded to float32, so that weights made from it fit what the kernel will round it to."""
    return x.float().double() if isinstance(x, Tensor) else struct.unpack("f", struct.pack("f", x))[0]


def root(x: Number) -> Number:
    return x.sqrt() if isinstance(x, Tensor) else sqrt(x)


def is_double(*tensors: Tensor) -> bool:
    return any(x.dtype == torch.float64 for x in tensors)


def as_state(sample: Tensor, model_output: Tensor) -> Tensor:
    """The sample in the dtype that PyTorch's promotion gives the original's result."""
    if sample.dtype is model_output.dtype:
        return sample
    return sample.to(torch.promote_types(sample.dtype, model_output.dtype))
