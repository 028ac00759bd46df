"""What every accelerated scheduler shares: tables made on the host, the next evaluation's input, the way back.

An accelerated scheduler is a subclass of the diffusers class that it stands for, with the same name, configuration and
state, and another `step`. Whatever its step does not cover goes to the original step, on the same state.
"""

from __future__ import annotations

import struct
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from math import sqrt
from numbers import Integral, Real
from operator import itemgetter
from typing import Any, ClassVar

import torch
from numpy import float32
from torch import Tensor

from bicm_diffusion.adapters.diffusers.drawing import Drawing, KeyedConfig, WrongKeyError, traced
from bicm_diffusion.adapters.diffusers.tables import Number, Tables, overrides, unreadable, version_of

#: Dtypes that the originals index or compute with otherwise than with the number that they hold.
NARROW = frozenset((torch.bool, torch.uint8, torch.int8, torch.int16))


def fused(attempt: Callable[..., Any]) -> Any:
    """Let the original's method of the same name do what an attempt does not cover: there it returns None or raises.

    An attempt raises before it changes anything that the original will read.
    """

    name = attempt.__name__

    @wraps(attempt)
    def method(self: Accelerated, *args: Any, **kwargs: Any) -> Any:
        if traced():
            result = attempt(self, *args, **kwargs)
        else:
            try:
                if not all(map(plain, args)) or not all(map(plain, kwargs.values())):
                    raise TypeError("a tensor of a subclass, or one on the meta device")
                result = attempt(self, *args, **kwargs)
            except WrongKeyError:
                raise
            except Exception as error:
                # Where the original raises, its error is the one that counts, and this one its context.
                result = getattr(self._original, name)(self, *args, **kwargs)
                if self._ready(graph=False) is not None:  # a schedule that cannot be read is told of already
                    self._say(f"a call that no kernel takes ({error})")
        return getattr(self._original, name)(self, *args, **kwargs) if result is None else result

    return method


class Accelerated(Drawing):
    """A scheduler whose step is one fused launch; mixed into a diffusers class by `accelerate_scheduler`."""

    _original: ClassVar[Any]
    #: The attributes, and the options of the configuration, that a step's numbers come from.
    _sources: ClassVar[tuple[str, ...]] = ("sigmas", "timesteps")
    _options: ClassVar[tuple[str, ...]] = ()
    _chosen: ClassVar[itemgetter[Any]]
    _tables: Tables | None = None
    _pending: tuple[Any, ...] | None = None
    #: Whether the next evaluation's input may be made ahead, and whether there is a use for it in this run.
    _foresight = True
    _foresees = True

    config: Any
    _internal_dict: Any
    timesteps: Tensor
    sigmas: Tensor
    num_inference_steps: int | None
    begin_index: int | None
    _step_index: int | None
    _begin_index: int | None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls._options:
            cls._chosen = itemgetter(*cls._options)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        if torch.is_inference_mode_enabled():
            # PyTorch does not count writes to inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                self._original.set_timesteps(self, *args, **kwargs)
        else:
            self._original.set_timesteps(self, *args, **kwargs)
        self._pending, self._foresees = None, self._foresight
        self._new_run()
        self._prepare()

    # --- tables -------------------------------------------------------------------------------------------------------
    def _stale(self, tables: Tables) -> bool:
        """Whether anything that the tables were made from is another object now, or was written to."""
        own = self.__dict__
        for name, source, version in tables.sources:
            if own.get(name) is not source or (version is not None and source._version != version):  # type: ignore[union-attr]
                return True
        # Recording or not is a matter of gradients alone: without them the tables serve as they are.
        if torch.is_grad_enabled() and tables.reason is None and any(_requires_grad(s) for _, s, _ in tables.sources):
            return True
        try:
            # The originals read attributes of the configuration, which may differ from its items.
            options = self._chosen(own["_internal_dict"].__dict__)
            return bool(options != tables.options) or own.get("num_inference_steps") is not tables.steps
        except Exception:  # an option that was deleted, or that is no number
            return True

    def _prepare(self) -> Tables:
        own = self.__dict__
        sources = tuple((name, own.get(name), version_of(own.get(name))) for name in self._sources)
        tables = Tables(sources, (), own.get("num_inference_steps"))
        try:
            options = vars(own["_internal_dict"])
            tables.options = self._chosen(options)
            named = tuple((name, options[name]) for name in self._options)
            tables.reason = unreadable(sources, named) or self._uncovered()
            if tables.reason is None:
                tables.read(self.timesteps, self._host_levels())
                self._fill(tables)
        except Exception as error:
            tables.reason = f"a schedule or configuration that cannot be read ({error})"
        if tables.reason is not None:
            self._say(tables.reason)
        self._tables = tables
        return tables

    def _uncovered(self) -> str | None:
        """Why no step of this configuration can be fused, if it cannot."""
        return None

    def _host_levels(self) -> list[float]:
        return self.sigmas.tolist()

    def _fill(self, tables: Tables) -> None:
        """Make rows of weights, and what a graph will need, since nothing can be made while one is traced."""

    def _ready(self, graph: bool) -> Tables | None:
        """The tables of the schedule as it is now; None sends a step to the original. graph: whether one is traced."""
        tables = self._tables
        if not graph and (tables is None or self._stale(tables)):
            tables = self._prepare()
        return None if tables is None or tables.reason is not None else tables

    def reason_not_fused(self) -> str | None:
        """Return why the original step runs for this configuration and schedule; None where it does not."""
        tables = self._tables
        if tables is None or self._stale(tables):
            tables = self._prepare()
        return tables.reason

    def __repr__(self) -> str:
        reason = self.reason_not_fused()
        form = "accelerated" if reason is None else f"accelerated class, original step: {reason}"
        noise = ", keyed noise" if self._noise == "keyed" else ""
        name, _, configuration = self._original.__repr__(self).partition(" ")
        return f"{name} ({form}{noise}) {configuration}"

    def _say(self, reason: str) -> None:
        noise = ", with torch's noise" if self._noise == "keyed" else ""
        self._warn_once(f"{type(self).__name__}: {reason} is not accelerated, the original step runs{noise}")

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
            position = self._position(timestep)
            if position is None:
                self._original._init_step_index(self, timestep)
            else:
                self._step_index = position

    def _position(self, timestep: Any) -> int | None:
        """Where a timestep is found among the scheduler's; None where the original has to search."""
        tables = self._tables
        if tables is None or self._stale(tables):
            tables = self._prepare()
        value = self._host_value(timestep, tables)
        if value is None or tables.reason is not None or value not in tables.timesteps:
            return None
        first = tables.timesteps.index(value)
        # diffusers starts at the second of equal timesteps, so that a loop that starts half-way skips no level.
        again = value in tables.timesteps[first + 1 :]
        return tables.timesteps.index(value, first + 1) if again else first

    def _host_value(self, timestep: Any, tables: Tables) -> Any:
        """A timestep as a number, None if it is no plain one."""
        if not isinstance(timestep, Tensor):
            if not isinstance(timestep, Real) or timestep is True or timestep is False or timestep != timestep:
                return None
            # NumPy's narrow floats compare with numbers in their own precision.
            return timestep if isinstance(timestep, Integral) else float(timestep)
        if timestep.dim():
            return None
        value = tables.at(timestep)
        if value is None:
            if timestep.dtype in NARROW or overrides(timestep):
                return None
            try:
                value = timestep.item()
            except RuntimeError:  # one of many in a transform, or one without a value
                return None
        return value if value == value else None  # NaN equals nothing, least of all itself

    # --- the next evaluation's input ----------------------------------------------------------------------------------
    def _foreseen(self, sample: Tensor) -> Tensor | None:
        """The scaled sample, where the last step made it already."""
        pending, tables = self._pending, self._tables
        if pending is None or traced():
            return None
        self._pending = None
        made_for, version, at, scaled = pending
        unchanged = made_for() is sample and at == self._step_index and sample._version == version
        # What was made ahead is no function of the sample that autograd knows.
        recorded = torch.is_grad_enabled() and sample.requires_grad
        if unchanged and not recorded and tables is not None and not self._stale(tables):
            return scaled
        self._foresees = False  # a caller who changes the sample first has no use for it
        return None

    def _foresee(self, sample: Tensor, index: int, scaled: Tensor) -> None:
        self._pending = weakref.ref(sample), sample._version, index, scaled

    def _may_foresee(self, sample: Tensor, model_output: Tensor) -> bool:
        if not self._foresees:
            return False
        if torch.is_grad_enabled():
            return not (sample.requires_grad or model_output.requires_grad)
        # Inference tensors do not tell whether they were written to.
        return not torch.is_inference_mode_enabled()

    # --- configurations and copies ------------------------------------------------------------------------------------
    def register_to_config(self, **kwargs: Any) -> None:
        self._original.register_to_config(self, **kwargs)
        if self._noise == "keyed":
            self._internal_dict = KeyedConfig(self._internal_dict)

    def save_config(self, *args: Any, **kwargs: Any) -> None:
        if self._noise == "keyed":
            self._warn_once(f"{type(self).__name__}: {KeyedConfig.lost('the file holds')}")
        self._original.save_config(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_tables", "_pending", "_seeds")}
        return _restore, (self._original,), state


def plain(argument: Any) -> bool:
    """Whether an argument, if it is a tensor, has values that a kernel reads as the original would.

    Subclasses may mean something else by an operation, and tensors without values have no number to give.
    """
    if not isinstance(argument, Tensor):
        return True
    return not (argument.is_meta or overrides(argument))


def numbers(**arguments: Any) -> None:
    """Raise TypeError unless every argument is a number of Python's or NumPy's, and not NaN."""
    for name, value in arguments.items():
        kind: type[Any] = type(value)
        if kind is not float and (kind is float32 or not issubclass(kind, Real)):
            raise TypeError(f"{name} as {kind.__name__}")
        if value != value:
            raise TypeError(f"{name} that is not a number")


def constant(noise: Tensor) -> None:
    """Raise TypeError for noise that requires a gradient: a launch would make x0 a function of it."""
    if noise.requires_grad and torch.is_grad_enabled():
        raise TypeError("noise that requires a gradient")


def _requires_grad(source: Any) -> bool:
    return isinstance(source, Tensor) and source.requires_grad


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
