"""Shared by all accelerated schedulers: tables on the host, the next evaluation's input, fallback to the original.

An accelerated scheduler is a subclass of the original diffusers class, with the same name, configuration and
state, and another `step`. Unsupported calls run the original step, on the same state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor

from bicm_diffusion.adapters.diffusers.arguments import check_plain, host_value
from bicm_diffusion.adapters.diffusers.drawing import Drawing, KeyedConfig, WrongKeyError, traced
from bicm_diffusion.adapters.diffusers.hooks import hooks, overridden
from bicm_diffusion.adapters.diffusers.tables import Tables, counting, noted, unreadable, version_of
from bicm_kernels.inputs import ALIKE, OTHER, READY, SINGLE, ready, unchanged

dynamo = torch.compiler.is_dynamo_compiling

#: An option that could not be read: nothing is equal to it.
_UNKNOWN = object()


def fused(attempt: Callable[..., Any]) -> Any:
    """Fall back to the original's method of the same name where the attempt returns None or raises.

    An attempt raises before it changes anything that the original will read.
    """

    name = attempt.__name__

    @wraps(attempt)
    def method(self: Accelerated, *args: Any, **kwargs: Any) -> Any:
        if traced():
            result = attempt(self, *args, **kwargs)
            return getattr(self._original, name)(self, *args, **kwargs) if result is None else result
        try:
            check_plain(args)
            if kwargs:
                check_plain(kwargs.values())
                result = attempt(self, *args, **kwargs)
            else:
                result = attempt(self, *args)
            if result is not None:
                return result
        except WrongKeyError:
            raise
        except Exception as error:
            # Where the original raises too, its error is raised, with this one as its context.
            return self._taken_by_original(name, args, kwargs, f" ({error})")
        return self._taken_by_original(name, args, kwargs)

    return method


#: What an attempt gets instead of `ready`'s answer while a graph is traced, and where Python looked at the arguments.
GRAPH, LOOKED_AT = 8, READY | OTHER
#: What `ready` answers for most steps whose timesteps are float32.
PLAIN = READY | SINGLE | ALIKE


def on_tables(attempt: Callable[..., Any]) -> Any:
    """Like `fused`, for an attempt whose first arguments are the tables, None where there are none, and what is known.

    One call finds out whether the tables still hold and what the arguments are, for the attempt to save its own
    questions: the answer of `bicm_kernels.inputs.ready`, or GRAPH.
    """

    name = attempt.__name__

    @wraps(attempt)
    def method(self: Accelerated, *args: Any, **kwargs: Any) -> Any:
        tables, known = None, 0
        if not dynamo():
            own = self.__dict__
            tables = own.get("_tables")
            known = 0 if tables is None else ready(tables.inputs, own, args, kwargs)
        if not known and traced():
            result = attempt(self, self._ready(graph=True), GRAPH, *args, **kwargs)
            return getattr(self._original, name)(self, *args, **kwargs) if result is None else result
        try:
            if not known:
                check_plain(args)
                check_plain(kwargs.values())
                tables, known = self._ready(graph=False), LOOKED_AT
            elif tables.reason is not None:  # type: ignore[union-attr]
                tables = None
            if kwargs:
                result = attempt(self, tables, known, *args, **kwargs)
            else:
                result = attempt(self, tables, known, *args)
            if result is not None:
                return result
        except WrongKeyError:
            raise
        except Exception as error:
            # Where the original raises too, its error is raised, with this one as its context.
            return self._taken_by_original(name, args, kwargs, f" ({error})")
        return self._taken_by_original(name, args, kwargs)

    # Callers see the original's arguments.
    shown = signature(attempt)
    own, _, _, *rest = shown.parameters.values()
    method.__signature__ = shown.replace(parameters=[own, *rest])  # type: ignore[attr-defined]
    return method


class Accelerated(Drawing):
    """A scheduler whose step is one fused launch; a mixin that `accelerate_scheduler` adds to a diffusers class."""

    _original: ClassVar[Any]
    _mixin: ClassVar[type[Accelerated]]
    #: The accelerated class of the original: the own one, unless a user derived from it.
    _accelerated: ClassVar[Any]
    #: The attributes, and the options of the configuration, that a step's weights depend on.
    _sources: ClassVar[tuple[str, ...]] = ("sigmas", "timesteps")
    _options: ClassVar[tuple[str, ...]] = ()
    _kind: ClassVar[type[Tables]] = Tables
    #: Whether steps find their numbers by the timestep; otherwise timesteps serve to find the first step alone.
    _looks_up: ClassVar[bool] = True
    _tables: Tables | None = None
    _pending: tuple[Any, ...] | None = None
    #: Whether the next evaluation's input may be precomputed, and whether this run uses it.
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
    def _current(self) -> Any:
        """The tables of the current schedule."""
        tables = self._tables
        return self._prepare() if tables is None or not unchanged(tables.inputs, self.__dict__) else tables

    def _prepare(self) -> Tables:
        own = self.__dict__
        # Timesteps are found by their addresses, which a copy has not.
        own.update(counting({name: own[name] for name in self._sources if name in own and name != "timesteps"}))
        called = hooks(self._original, self._accelerated)
        sources = tuple(
            (name, own.get(name), version_of(own.get(name)) if name != "timesteps" or self._looks_up else None)
            for name in self._sources
        )
        tables = self._kind()
        options: tuple[tuple[str, Any], ...] = tuple((name, _UNKNOWN) for name in self._options)
        try:
            configured = vars(own["_internal_dict"])
            options = tuple((name, configured[name]) for name in self._options)
            changed = overridden(called, self, self._accelerated)
            tables.reason = f"an own {changed}" if changed else unreadable(sources, options) or self._uncovered()
            if tables.reason is None:
                tables.read(self.timesteps, self._host_levels())
                self._fill(tables)
        except Exception as error:
            tables.reason = f"a schedule or configuration that cannot be read ({error})"
        sources = (*sources, *((name, own.get(name), None) for name in called))
        tables.inputs = noted(own, sources, options, tables.reason is None)
        if tables.reason is not None:
            self._say(tables.reason)
        self._tables = tables
        return tables

    def _uncovered(self) -> str | None:
        """Why no step of this configuration can be fused, if it cannot."""
        return None

    def _host_levels(self) -> list[float]:
        return self.sigmas.tolist()

    def _fill(self, tables: Any) -> None:
        """Make rows of weights, and the tensors of a graph, since none can be made while one is traced."""

    def _ready(self, graph: bool) -> Any:
        """The tables of the current schedule; None if the original has to run. graph: whether a graph is traced."""
        if graph:
            tables = self._tables
        else:
            # Attribute access is slow in a class with __getattr__: read them all at once.
            own = self.__dict__
            tables = own.get("_tables")
            if tables is None or not unchanged(tables.inputs, own):
                tables = self._prepare()
        return None if tables is None or tables.reason is not None else tables

    def reason_not_fused(self) -> str | None:
        """Return why the original step runs for this configuration and schedule; None where it does not."""
        reason: str | None = self._current().reason
        return reason

    def __repr__(self) -> str:
        reason = self.reason_not_fused()
        form = "accelerated" if reason is None else f"accelerated class, original step: {reason}"
        noise = ", keyed noise" if self._noise == "keyed" else ""
        name, _, configuration = self._original.__repr__(self).partition(" ")
        return f"{name} ({form}{noise}) {configuration}"

    def _taken_by_original(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        why: str = ", for its dtypes, arguments or level,",
    ) -> Any:
        """The original's result of a call that is not fused, with a warning that says why."""
        result = getattr(self._original, name)(self, *args, **kwargs)
        if self._ready(graph=False) is not None:  # an unreadable schedule was reported already
            self._say(f"a call that no kernel takes{why}")
        return result

    def _say(self, reason: str) -> None:
        noise = ", with torch's noise" if self._noise == "keyed" else ""
        self._warn_once(f"{type(self).__name__}: {reason} is not accelerated, the original step runs{noise}")

    # --- the index of a step ------------------------------------------------------------------------------------------
    def _index(self, timestep: Any) -> int:
        index = self._step_index
        if index is None:
            self._init_step_index(timestep)
            index = self._step_index
            assert index is not None
        return index

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
        """The index of a timestep among the scheduler's; None where the original has to search."""
        tables = self._current()
        if not self._looks_up and tables.reason is None and version_of(self.timesteps) != tables.timesteps.version:
            tables = self._prepare()
        value = host_value(timestep, tables.timesteps)
        if value is None or tables.reason is not None or value not in tables.timesteps.values:
            return None
        first: int = tables.timesteps.values.index(value)
        # diffusers starts at the second of equal timesteps, so that a loop that starts half-way skips no level.
        again = value in tables.timesteps.values[first + 1 :]
        return tables.timesteps.values.index(value, first + 1) if again else first

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
        if type(self) is self._accelerated:
            return _restore, (self._mixin, self._original), state
        return _blank, (type(self),), state  # a user's subclass, found by its name


@lru_cache
def derived(mixin: type[Accelerated], original: Any) -> type[Any]:
    """Return the accelerated subclass of a diffusers class, with its name and module."""

    # Pipelines inspect a scheduler's signatures.
    @wraps(original.set_timesteps)
    def set_timesteps(self: Accelerated, *args: Any, **kwargs: Any) -> None:
        mixin.set_timesteps(self, *args, **kwargs)

    namespace = {
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "_original": original,
        "_mixin": mixin,
        "set_timesteps": set_timesteps,
    }
    cls: Any = type(original.__name__, (mixin, original), namespace)
    cls._accelerated = cls
    return cls  # type: ignore[no-any-return]


def _restore(mixin: type[Accelerated], original: Any) -> Any:
    return _blank(derived(mixin, original))  # type: ignore[arg-type]


def _blank(cls: type[Any]) -> Any:
    return object.__new__(cls)
