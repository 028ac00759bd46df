"""Methods with two adjacent states: z_{i-1} = r_i·z_{i+1} + Σ w_k·x_k, and their inversion.

x_0 is z_i and the others come from the model at z_i, so that z_{i-1} and z_i determine z_{i+1}: by a division in
floating point, or exactly, by subtracting the same integer. A method's states are in units of 1 or alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bicm_diffusion.samplers.checks import check_state
from bicm_diffusion.samplers.ddim import down, up, up_from
from bicm_diffusion.samplers.exact import Grid
from bicm_diffusion.samplers.factors import Ratio
from bicm_diffusion.samplers.loop import Loop, Output, Row, traced
from bicm_diffusion.samplers.prediction import Number
from bicm_diffusion.samplers.record import Conditions, Record, notice_alone
from bicm_diffusion.samplers.states import ExactPair, Pair, StatePair, decode

State = Tensor | StatePair | ExactPair


class Method:
    """The definition of a method; its first step, from one state alone, is DDIM's."""

    #: Its name in the record of a pair.
    name: ClassVar[str]
    #: The function that starts from noise, and the one that starts from data.
    functions: ClassVar[tuple[str, str]]
    #: The index whose time the model gets at z_0 alone.
    start_index = 1

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that a retrace must share with a pair's run, besides the schedule and the prediction."""
        return {}

    def unit(self, _: int) -> Number:
        """The unit of a state at index i."""
        return 1.0

    def ratio(self, i: int) -> tuple[Number, Ratio]:
        """The factor of z_{i+1} in z_{i-1}, as a number and as a fraction."""
        raise NotImplementedError

    def terms(self, i: int, z: Tensor, scaled: Tensor | None) -> tuple[list[Any], Row, Output]:
        """x_1 …, the weights of x_0 = z_i and of these, and the model's output at z_i."""
        raise NotImplementedError

    def first_down(self, z: Tensor) -> tuple[Tensor, Output]:
        """z_{N-1} from z_N alone, and the model's output there."""
        top = self.loop.schedule.steps
        return self._first(top, z, down, top)

    def first_up(self, z: Tensor) -> tuple[Tensor, Output]:
        """z_1 from z_0 alone, and the model's output there."""
        return self._first(1, z, up if self.start_index == 1 else up_from, self.start_index)

    def _first(self, i: int, z: Tensor, formula: Callable[..., Row], told: int) -> tuple[Tensor, Output]:
        output = self.loop.evaluate(told, z)
        row = self.loop.rows(formula, range(i, i + 1), (-1, 0))[i]
        return self.loop.advance([z, output], row)[0], output


@dataclass(frozen=True)
class Direction:
    """The direction, to data or to noise: the order of the indices, and that of the step."""

    inverse: bool
    ends: Callable[[int], tuple[int, int]]
    walk: Callable[[int], range]
    ahead: int

    def first(self, method: Method, z: Tensor) -> tuple[Tensor, Output]:
        """The second state, from the first alone."""
        return method.first_up(z) if self.inverse else method.first_down(z)


DOWN = Direction(False, lambda top: (top, top - 1), lambda top: range(top - 1, 0, -1), -1)
UP = Direction(True, lambda top: (0, 1), lambda top: range(1, top), 1)


def run(method: Method, z: State, direction: Direction, exact: bool) -> StatePair | ExactPair:
    """Run a method to the other end of its schedule, from one state or from a pair at this end."""
    record = recorded(method.loop, method.name, method.functions, method.settings, z, direction.inverse)
    if exact:
        return _run_integers(method, z, direction, record)
    assert not isinstance(z, ExactPair)
    return _run_floats(method, z, direction, record)


def recorded(
    loop: Loop, method: str, functions: tuple[str, str], settings: Mapping[str, Any], start: object, inverse: bool
) -> Record:
    """Return the record of a run; raise ValueError where it starts from a pair that it does not retrace.

    functions: those that start from noise and from data.
    """
    conditions = None if traced() else Conditions(loop.guidance_scale, loop.extra_args, loop.guide)
    settings = {"prediction": loop.prediction, **settings}
    record = Record(method, loop.schedule, settings, loop.schedule.steps if inverse else 0, None, conditions)
    if isinstance(start, Tensor):
        notice_alone(start, record, loop.name)
    elif isinstance(start, Pair) and start.record is not None:
        record.check(start.record, loop.name, functions[0 if inverse else 1])
    return record


def first_tensor(z: Any, exact: bool, floats: type[Pair] = StatePair, integers: type[ExactPair] = ExactPair) -> Tensor:
    """Return a tensor with the dtype, device and batch of the states; raise where a pair does not fit together.

    exact: whether the run is one of integers. floats, integers: the kinds of pairs that the sampler takes.
    """
    if type(z) is integers:
        if not exact:
            raise TypeError(
                f"z: exact=False takes a tensor or a {floats.__name__}, got an {integers.__name__}: pass exact=True, "
                f"as it was made, or {floats.__name__}(*z), whose inversion rounds"
            )
        return z.q.new_empty((len(z.q), 0), dtype=z.dtype)
    if exact and isinstance(z, floats) and z.record is not None:
        raise TypeError(
            f"z: exact=True, the default, takes a tensor or an {integers.__name__}, got a {floats.__name__}: pass "
            f"exact=False, as it was made, or {floats.__name__}(*z), which starts a new trajectory"
        )
    if not isinstance(z, floats):
        made = f" (made of two tensors by {floats.__name__}(*z))" if isinstance(z, tuple | list) and len(z) == 2 else ""
        check_state("z", z, f"a tensor (B, …), a {floats.__name__}{made} or an {integers.__name__}")
        return z
    first, second = z
    check_state("z", first)
    check_state("z", second)
    if first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
        given = " and ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (first, second))
        raise ValueError(f"z: expected a pair of one shape and dtype on one device, got {given}")
    return first


def _started(method: Method, z: Tensor | StatePair, direction: Direction) -> StatePair:
    if isinstance(z, StatePair):
        return z
    second, output = direction.first(method, z)
    method.loop.report(direction.ends(method.loop.schedule.steps)[1], second, output)
    return StatePair(z, second)


def _run_floats(method: Method, z: Tensor | StatePair, direction: Direction, record: Record) -> StatePair:
    loop, scaled = method.loop, None
    last, current = _started(method, z, direction)
    walk = direction.walk(loop.schedule.steps)
    for i in loop.steps(walk):
        tensors, weights, output = method.terms(i, current, scaled)
        row = _in_floats(method, i, weights, direction.inverse)
        reached = i + direction.ahead
        then = reached if reached in walk else None
        following, scaled = loop.advance([last, current, *tensors], row, then=then)
        last, current = current, following
        loop.report(reached, current, output)
    return StatePair(current, last, record=record)


def _in_floats(method: Method, i: int, weights: Row, inverse: bool) -> Row:
    """The weights of z_{i+1}, z_i, … in z_{i-1}, or of z_{i-1}, z_i, … in z_{i+1}, all in units of 1."""
    ratio, _ = method.ratio(i)
    below, here, above = method.unit(i - 1), method.unit(i), method.unit(i + 1)
    weights = (weights[0] * (1.0 / here), *weights[1:])
    if inverse:
        return above / (ratio * below), *[-w * above / ratio for w in weights]
    return ratio * below / above, *[w * below for w in weights]


def _run_integers(method: Method, z: State, direction: Direction, record: Record) -> ExactPair:
    loop = method.loop
    top = loop.schedule.steps
    if isinstance(z, ExactPair):
        grid, last, current = Grid(loop, z.q, record, z), z.q, z.previous_q
    else:
        states = _started(method, z, direction)
        grid, marks = Grid(loop, states.z, record), direction.ends(top)
        last, current = (
            grid.encode(x, method.unit(i), max(marks)) for x, i in zip(states, direction.ends(top), strict=True)
        )
    grid.begin(last, current)
    reached = direction.ends(top)[1]
    for i in loop.steps(direction.walk(top)):
        here = decode(current, method.unit(i), grid.dtype)
        tensors, weights, output = method.terms(i, here, None)
        reached = i + direction.ahead
        following = grid.step(
            last,
            [current, *tensors],
            weights,
            ratio=method.ratio(i)[1],
            inverse=direction.inverse,
            mark=max(i, reached),
        )
        last, current = current, following
        if loop.callback is not None:
            loop.report(reached, decode(current, method.unit(reached), grid.dtype), output)
    return grid.pair(ExactPair, current, last, method.unit(reached), method.unit(reached - direction.ahead))
