"""Shared by BDIA's schedulers: loops in either direction, from one state or from a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bicm_diffusion.adapters.diffusers.drawing import traced
from bicm_diffusion.adapters.diffusers.integers import Integers
from bicm_diffusion.adapters.diffusers.outputs import as_state
from bicm_diffusion.adapters.diffusers.retrace import Retraced, check_no_pair, check_start
from bicm_diffusion.adapters.diffusers.tables import counting, version_of
from bicm_diffusion.described import described
from bicm_diffusion.rational import MAX_DENOMINATOR, nearest
from bicm_diffusion.samplers.notices import warn
from bicm_diffusion.samplers.record import Record, hand_out
from bicm_diffusion.samplers.states import ExactPair, StatePair
from bicm_kernels import affine_step, denoised_step


def check_gamma(gamma: float, exact: bool) -> None:
    """Raise ValueError for a gamma out of range, or too small for a fraction of an exact step."""
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma: expected a value in [0, 1], got {gamma}")
    if exact and gamma and not nearest(gamma)[0]:
        raise ValueError(f"gamma: with exact=True, expected 0 or at least 1/{MAX_DENOMINATOR}, got {gamma}")


class BdiaSteps(Retraced):
    """Mixin for a diffusers scheduler; a subclass defines its levels and the step between two of them."""

    #: Options of other schedulers that change samples or levels and that are ignored here.
    _ignored: ClassVar[tuple[str, ...]] = ()
    #: The attributes that weights are made of, in addition to the timesteps.
    _sources: ClassVar[tuple[str, ...]] = ()
    #: Whether a step's result holds x0 too.
    _gives_x0: ClassVar[bool] = True

    #: The tensors that `set_timesteps` made or read, with their versions.
    _given: tuple[tuple[str, Tensor, int | None], ...] = ()
    _configured: tuple[Any, ...] | None = None
    _begin_index: int | None = None
    _inverse = False
    _ratio: tuple[int, int] | None = None
    #: The levels by index, 0 the data and N the noisiest, as in the paper.
    _levels: Sequence[float] = ()
    _times: Sequence[float] = ()
    timesteps: Tensor

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy's tensors have other versions.
        self.__dict__.update(state)
        self._given = tuple((name, x, version_of(x)) for name, x, _ in self._given)

    # --- defined by subclasses ------------------------------------------------------------------------------------
    def _reading(self, level: float) -> tuple[float, float, float, float]:
        """Weights of sample and output in x0, then in the second term of `_transfer`."""
        raise NotImplementedError

    def _transfer(self, i: int, j: int) -> tuple[float, float]:
        """The step of first order from level i to level j: weights of the sample and of the second term."""
        raise NotImplementedError

    def _watched(self) -> tuple[Any, ...]:
        """The options that a loop's weights are made of."""
        raise NotImplementedError

    @classmethod
    def _refuse(cls, config: Mapping[str, Any]) -> None:
        """Raise ValueError for a configuration whose levels the method does not support."""

    # --- diffusers' own names -------------------------------------------------------------------------------------
    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a scheduler of another one's configuration, as diffusers' `from_config` does.

        Raises ValueError for levels that the method does not support, TypeError for a scheduler instead of its
        configuration. Warns of options that are on in another class's configuration and are ignored in a step that
        can be inverted, such as clipping and stochastic sampling.
        """
        if not (config is None or isinstance(config, Mapping)):
            hint = "; pass its .config" if hasattr(config, "config") else ""
            raise TypeError(f"config: expected a scheduler's configuration, got {described(config)}{hint}")
        known: Mapping[str, Any] = config or {}
        cls._refuse(known)
        ignored = [name for name in cls._ignored if {**known, **kwargs}.get(name)]
        if ignored and "gamma" not in known:  # its own keeps them for the class that they came from
            warn(f"{cls.__name__} ignores {', '.join(ignored)}, on in this configuration", UserWarning)
        return super().from_config(config, return_unused_kwargs, **kwargs)  # type: ignore[misc]

    @property
    def begin_index(self) -> int | None:
        """The step that the next loop starts at, if it was set."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The step that comes next, counted from the first of `timesteps`."""
        return self._at

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the step that the next loop starts at."""
        self._begin_index = begin_index

    # --- the beginning of a loop ----------------------------------------------------------------------------------
    def _direction(
        self, steps: int, inverse: bool | None, last_sample: Tensor | None
    ) -> tuple[bool, Tensor | None, StatePair | ExactPair | None, Record | None]:
        """Whether the next loop goes to the noise, the other state that it starts from, its pair, and the pair's run.

        Raises before changing anything.
        """
        check_no_pair("last_sample", last_sample)
        turned = self._turned and inverse is None and last_sample is None
        pair, made = self._next if turned else None, None
        if pair is not None:
            # One that was pickled by an earlier version has no outer state of its own.
            made, last_sample = pair.record, pair.z if self._outer is None else self._outer
        elif last_sample is not None and last_sample is self._reached:
            if self._at != len(self._indices):
                raise ValueError(
                    "last_sample: expected a state that a loop ended in, got one from the middle of a loop"
                )
            made = self._record
        if turned:
            inverse = made is None or made.index == 0
        if inverse and self.config.gamma == 0.0:
            raise ValueError("inverse: expected gamma > 0 in the configuration, got 0")
        if made is not None and made.steps != steps:
            raise ValueError(f"num_inference_steps: expected {made.steps}, as the pair was made in, got {steps}")
        return bool(inverse), last_sample, pair, made

    def _start(
        self,
        way: tuple[bool, Tensor | None, StatePair | ExactPair | None, Record | None],
        levels: dict[str, Sequence[float]],
        times: Sequence[float],
        device: str | torch.device | None,
    ) -> None:
        """Begin a loop. levels: by name, from the data to the noisiest; times: of all but the data, from the noisiest.

        Raises ValueError where they are not those of the pair that is retraced.
        """
        inverse, last_sample, pair, made = way
        count = len(times)
        self._levels = next(iter(levels.values()))
        if self._record is not None and self._reached is not None and self._at == len(self._indices):
            hand_out(self._reached, self._record)
        known = tuple(float(t) for t in reversed(times))
        recorded = {**{name: tuple(row) for name, row in levels.items()}, "timesteps": (known[0], *known)}
        self._record = Record(type(self).__name__, recorded, self._settings(), count if inverse else 0)
        if made is not None:
            self._record.check(made, "set_timesteps", "turn_round", pair="pair", levels="scheduler")
        self._ratio = nearest(self.config.gamma) if self._exact else None
        self._integers, self._made = None, None if self._edit else made
        if isinstance(pair, ExactPair) and self._ratio is not None and self._inner is not None:
            self._integers = Integers.turned(pair, self._ratio, self._inner)
        # Of a pair that was given by the tensor that this loop ended in, the inner state is the one before it.
        self._start_from = self._inner if pair is not None else None if made is None else self.last_sample
        self._turned, self._edit, self._inverse = False, False, inverse
        self._next, self._inner, self._outer = None, None, None
        self._begin_index, self._at, self.last_sample, self._reached = None, None, last_sample, None
        if inverse:
            self._indices = [*range(1 if last_sample is not None else 0, count)]
        else:
            self._indices = [*range(count - 1 if last_sample is not None else count, 0, -1)]
        # The data level has no timestep: the model is evaluated there at the first one above it.
        self._times = [times[count - max(i, 1)] for i in self._indices]
        self.timesteps = torch.tensor(self._times, dtype=self.timesteps.dtype).to(device)
        watched = ("timesteps", *self._sources)
        self.__dict__.update(counting({name: getattr(self, name) for name in watched}))
        self._given = tuple((name, x := getattr(self, name), version_of(x)) for name in watched)
        self._configured = self._watched()

    # --- a step ---------------------------------------------------------------------------------------------------
    def _advance(self, model_output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take one step of the loop: the next state, and x0 where the class gives it."""
        check_no_pair("sample", sample)
        if not self._indices:
            raise ValueError("timesteps: expected a call of set_timesteps before the first step")
        if not traced():
            self._check_given()
        if self._at is None:
            self._at = self._first(timestep)
            self._whole = self._at == 0
            if self._record is not None and not traced():
                check_start(sample, self.last_sample, self._start_from, self._record)
            self._start_from = None
        if self._at >= len(self._indices):
            raise ValueError(
                f"timesteps: expected at most {len(self._indices)} steps, got one more; set_timesteps first"
            )
        i = self._indices[self._at]
        x0_sample, x0_output, beside_sample, beside_output = self._reading(self._levels[max(i, 1)])
        last = self.last_sample
        of_last, of_sample, of_beside = self._weights(i, last is not None)
        weights = [of_sample + of_beside * beside_sample, of_beside * beside_output, of_last]
        x0_weights = [x0_sample, x0_output, 0.0] if self._gives_x0 else None
        state = as_state(sample, model_output)
        if self._ratio is not None:
            if self._integers is None:
                self._integers = Integers(state, last, self._ratio)
            mark = i + self._inverse
            out, x0 = self._integers.step(
                state, model_output, weights[:2], x0_weights=x0_weights, inverse=self._inverse, mark=mark
            )
        else:
            tensors = [state, model_output] if last is None else [state, model_output, last]
            count, x0 = len(tensors), None
            if x0_weights is None:
                out = affine_step(tensors, weights[:count])
            else:
                out, x0, _ = denoised_step(tensors, x0_weights[:count], weights[:count], x0_weight=0.0)
        self.last_sample, self._reached = sample, out
        self._at += 1
        if self._at == len(self._indices) and self._made is not None and not traced():
            self._report(self._made)
        return out, x0

    def _check_given(self) -> None:
        """Raise where the inputs of the loop's weights have changed since: a pair could not record its settings."""
        if self._record is not None and self._configured != self._watched():
            names = " and ".join(self._settings())
            raise ValueError(f"config: expected {names} as at set_timesteps, but they were changed since")
        for name, x, version in self._given:
            if getattr(self, name) is not x or version_of(x) != version:
                raise ValueError(f"{name}: expected what set_timesteps made or read, but it was changed since")

    def _first(self, timestep: Any) -> int:
        if self._begin_index is not None:
            return self._begin_index
        value = int(timestep) if isinstance(self._times[0], int) else float(timestep)
        if value not in self._times:
            raise ValueError(f"timestep: expected one of {self._times}, got {value}")
        return self._times.index(value)

    def _weights(self, i: int, paired: bool) -> tuple[float, float, float]:
        """Weights of the last state, of the current one at index i and of the second term.

        With integers, both directions add or subtract the same increment, with the weights of the sampling direction.
        """
        if not paired:
            return 0.0, *self._transfer(i, i + 1 if self._inverse else i - 1)
        gamma = self.config.gamma if self._ratio is None else self._ratio[0] / self._ratio[1]
        (down, down_beside), (up, up_beside) = self._transfer(i, i - 1), self._transfer(i, i + 1)
        if self._inverse and self._ratio is None:
            return 1.0 / gamma, up - down / gamma, up_beside - down_beside / gamma
        return gamma, down - gamma * up, down_beside - gamma * up_beside
