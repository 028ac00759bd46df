"""The pairs that loops end in and begin with, and checks that a loop really retraces one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from bicm_diffusion.adapters.diffusers.drawing import traced
from bicm_diffusion.adapters.diffusers.integers import Integers
from bicm_diffusion.described import described
from bicm_diffusion.rational import nearest
from bicm_diffusion.samplers.record import Record, is_inner, notice_alone, report_remainder, same_values, take_back
from bicm_diffusion.samplers.states import ExactPair, Pair, StatePair


def check_pair(pair: object, exact: bool, method: str, settings: Mapping[str, Any]) -> None:
    """Raise unless a configuration can retrace a pair, as far as this can be checked before its next loop."""
    kind = ExactPair if exact else StatePair
    if type(pair) is not kind:
        raise TypeError(f"pair: expected a scheduler's {kind.__name__} with exact={exact}, got {described(pair)}")
    made = pair.record
    if made is None:
        raise ValueError(f"pair: expected one from {method}.pair, got one without a record of its settings")
    turned = replace(made, method=method, settings=settings, index=made.steps - made.index)
    turned.check(made, "turn_round", "", pair="pair")


def check_no_pair(name: str, value: object) -> None:
    """Raise TypeError for a pair given instead of a tensor."""
    if isinstance(value, Pair):
        raise TypeError(f"{name}: expected a tensor, got {described(value)}; turn_round(pair) takes a pair")


def check_start(sample: Tensor, last_sample: Tensor | None, inner: Tensor | None, run: Record) -> None:
    """Raise where a loop cannot start from this state of a pair; warn where it should start from another.

    last_sample: the other state, where a pair is retraced. inner: the state to start from, where it is known: a fixed
    point of the model has two equal states.
    """
    if not sample.numel():
        return  # all empty states are equal
    if last_sample is not None:
        if same_values(sample, last_sample) and (inner is None or not same_values(sample, inner)):
            raise ValueError("sample: expected the inner state of the pair, got the one that is its last_sample")
        return
    if is_inner(sample, run.method):  # by its values: pipelines copy what a loop starts from
        raise ValueError(
            "sample: got the inner state of a pair, from which no trajectory begins; turn_round(pair) before "
            "set_timesteps retraces the one that it comes from"
        )
    notice_alone(sample, run, "step", name="sample", advice="turn_round() before set_timesteps")


class Retraced:
    """The pair that a scheduler's loop ends in, and the reverse loop from it."""

    #: The state at the index before the one that the last step reached; with it a trajectory can be retraced.
    last_sample: Tensor | None = None
    #: The state that the last step reached.
    _reached: Tensor | None = None
    _integers: Integers | None = None
    #: The loop since `set_timesteps`, whether it began at its first step, and the run of the pair it retraces.
    _record: Record | None = None
    _whole = False
    _made: Record | None = None
    #: A pair that the next loop retraces, its inner state as `turn_round` returned it, its other one, and whether it
    #: was passed explicitly.
    _next: StatePair | ExactPair | None = None
    _inner: Tensor | None = None
    _outer: Tensor | None = None
    _turned = False
    #: The inner state that the present loop has to start from, until its first step.
    _start_from: Tensor | None = None
    _edit = False
    _at: int | None = None
    #: The indices of a loop's levels, in its order.
    _indices: Sequence[int] = ()
    config: Any

    @property
    def _exact(self) -> bool:
        return bool(self.config.exact and self.config.gamma)

    @property
    def pair(self) -> StatePair | ExactPair:
        """The final two states of the last loop: an `ExactPair` with exact=True, else a `StatePair`.

        It can be saved (`save_pair`, `torch.save`) and given to another scheduler's `turn_round`.
        Raises ValueError before the end of a loop, OverflowError where integer states left their range.
        """
        if self._next is not None:
            return self._next
        left = None if self._at is None else len(self._indices) - self._at
        if left != 0 or self._record is None or self._reached is None or self.last_sample is None:
            given = "no loop was run" if left is None else f"{left} steps are left"
            raise ValueError(f"pair: expected the end of a loop, {given}")
        if self._integers is None:
            return StatePair(self._reached, self.last_sample, record=self._record)
        origin = self._integers.origin if self._whole else None
        pair = self._integers.pair(replace(self._record, origin=origin))
        pair.check()
        return pair

    def turn_round(self, pair: StatePair | ExactPair | None = None, *, edit: bool = False) -> Tensor | None:
        """Reverse the direction of the next `set_timesteps`; return the state that its loop starts from.

        After a loop that is the state before the last one, (B, …), from which the trajectory is retraced in N - 1
        steps. Before any loop it is None: the next one goes from data to noise. pair: another scheduler's `pair`, of
        another process too, to continue from instead of this one's. edit: the reverse loop has other conditions, so
        that no warning is issued where it ends in another state. Raises ValueError in the middle of a loop or for a
        pair of another configuration, TypeError for another kind of pair, OverflowError where integer states left their
        range.

        >>> import torch
        >>> from bicm_diffusion.adapters.diffusers import BDIADDIMScheduler
        >>> scheduler, image = BDIADDIMScheduler(exact=True), torch.full((1, 2), 0.25)
        >>> def loop(x):
        ...     scheduler.set_timesteps(4)
        ...     for t in scheduler.timesteps:
        ...         x = scheduler.step(torch.tanh(x), t, x).prev_sample
        ...     return x
        >>> scheduler.turn_round()
        >>> noise = loop(image)
        >>> torch.equal(loop(scheduler.turn_round()), image)
        True
        """
        if pair is not None:
            check_pair(pair, self._exact, type(self).__name__, self._settings())
        elif self._at is not None and self._at < len(self._indices):
            raise ValueError(f"turn_round: expected the end of a loop, {len(self._indices) - self._at} steps are left")
        elif self._at is None and self._next is None:
            self._turned = True
            return None
        elif self._turned and self._next is not None:
            self._edit = edit
            return self._inner
        taken = self.pair if pair is None else pair
        self._edit = edit
        self._next, self._inner, self._outer, self._turned = taken, taken.previous, taken.z, True
        if not traced() and same_values(self._inner, self._outer):
            take_back(self._inner)  # at a fixed point of the model it tells nothing, and outlives the pair
        return self._inner

    def _settings(self) -> dict[str, Any]:
        """The settings that the states of a pair depend on, apart from its levels."""
        return {"gamma": nearest(self.config.gamma) if self._exact else float(self.config.gamma)}

    def _report(self, made: Record) -> None:
        """Warn where a pair was retraced and the final integers differ from the start of its trajectory."""
        integers = self._integers
        if integers is not None and integers.last_q is not None and self._record is not None:
            report_remainder(type(self).__name__, made, self._record, integers.q, integers.last_q)
