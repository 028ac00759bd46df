"""EDICT both ways: two states that take turns, each advanced by the noise at the other, then mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bicm_diffusion.samplers.exact import ExactPair, Factor, Grid, Ratio, decode, rational, value, warn_of_loss
from bicm_diffusion.samplers.loop import Loop, Model, Options, Output, Row, transfer
from bicm_diffusion.samplers.prediction import Level, Number, Prediction, read
from bicm_diffusion.schedules import Schedule
from bicm_kernels import denoised_step

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TwinPair(NamedTuple):
    """EDICT's two states of one index, either of which is an image or its noise."""

    z: Tensor
    y: Tensor


@dataclass(frozen=True)
class ExactTwins(ExactPair):
    """EDICT's two states as integers, in units of alpha; the second of the pair is y."""

    @property
    def y(self) -> Tensor:
        """The second state, (B, …) in `dtype`."""
        return self.previous


State = Tensor | TwinPair | ExactTwins


@torch.no_grad()
def edict_sample(
    model: Model, z: State, schedule: Schedule, *, p: Factor = 0.93, exact: bool = True, **options: Unpack[Options]
) -> TwinPair | ExactTwins:
    """Return (z_0, y_0) by EDICT (BDIA eq. 9-12), from z_N = y_N or from the pair of `edict_invert`.

    z: (B, …), any floating dtype. p in (0, 1], the weight of a state in its own mix; 0.93 is the authors'. Takes 2N
    evaluations of the model. exact: integer states z/alpha and p the nearest n/m with m up to 1024, from which
    `edict_invert` returns z_N to the bit; False keeps floats, a `TwinPair` whose way back rounds.
    options: those of every sampler, see `Options`.
    Raises ValueError where p is out of range, and OverflowError where an exact state left its range.

    >>> from bicm_diffusion import vp_schedule
    >>> edict_sample(lambda z, times: z, torch.ones(1, 2), vp_schedule(4)).z.shape
    torch.Size([1, 2])
    """
    return _run(model, z, schedule, p, exact, False, options)


@torch.no_grad()
def edict_invert(
    model: Model, z: State, schedule: Schedule, *, p: Factor = 0.93, exact: bool = True, **options: Unpack[Options]
) -> TwinPair | ExactTwins:
    """Return (z_N, y_N) by EDICT's inversion (BDIA eq. 13-16), from z_0 = y_0 or from the pair of `edict_sample`.

    z: (B, …), any floating dtype. p, exact and options: as for `edict_sample`, of whose pair this is the inverse, to
    the bit where it is exact; in floats rounding grows like p^-2N, with a warning where that can be seen.
    Raises ValueError and OverflowError as `edict_sample` does.

    >>> from bicm_diffusion import vp_schedule
    >>> edict_invert(lambda z, times: z, torch.ones(1, 2), vp_schedule(4)).z.shape
    torch.Size([1, 2])
    """
    mix = value(p)
    if not exact and not isinstance(mix, Tensor) and mix > 0.0:
        first = z if isinstance(z, Tensor) else z.z
        warn_of_loss("EDICT", schedule.steps, mix ** (-2 * schedule.steps), first.dtype)
    return _run(model, z, schedule, p, exact, True, options)


def _run(
    model: Model, z: State, schedule: Schedule, p: Factor, exact: bool, inverse: bool, options: Options
) -> TwinPair | ExactTwins:
    mix = value(p)
    if not isinstance(mix, Tensor) and not 0.0 < mix <= 1.0:
        raise ValueError(f"p: expected a value in (0, 1], got {p}")
    states = TwinPair(z, z) if isinstance(z, Tensor) else z
    loop = Loop(model, states.z, schedule, **options)
    if not exact:
        walk = _invert_floats if inverse else _sample_floats
        return walk(loop, TwinPair(states.z, states.y), mix)
    return _run_integers(loop, states, rational("p", p), inverse)


def _sample_floats(loop: Loop, states: TwinPair, p: Number) -> TwinPair:
    """Two launches a step: z_inter from (z, y), then z_{i-1} and y_{i-1} from (z_inter, y)."""
    (z, y), scaled = states, None
    top = loop.schedule.steps
    inter_rows = loop.rows(down_weights, range(1, top + 1), (-1, 0))
    mix_rows = loop.rows(mixed_weights, range(1, top + 1), (-1, 0), p)
    for i in loop.steps(range(top, 0, -1)):
        output = loop.evaluate(i, y, scaled)
        z_inter, scaled = loop.advance(*_seen(loop, 1, [z, y, output], inter_rows[i]), then=i)
        output = loop.evaluate(i, z_inter, scaled)
        row = mix_rows[i]
        y, z, scaled = denoised_step(
            [z_inter, y, output],
            row[:3],
            row[3:6],
            x0_weight=row[6],
            next_scale=loop.input_scale(i - 1) if i > 1 else None,
            guidance_scale=loop.guidance_scale,
        )
        loop.report(i - 1, z, output)
    return TwinPair(z, y)


def _invert_floats(loop: Loop, states: TwinPair, p: Number) -> TwinPair:
    """Two launches a step: y_i from (z_{i-1}, y_{i-1}, z_inter), then z_i and the next z_inter from (z_inter, y_i)."""
    z, y = states
    top = loop.schedule.steps
    # z_inter = (z - (1 - p)·y_inter)/p with y_inter = (y - (1 - p)·z)/p
    of_z, of_y = 1.0 / p + (1.0 - p) * (1.0 - p) / (p * p), -(1.0 - p) / (p * p)
    z_inter, scaled = loop.advance([z, y], (of_z, of_y), then=1, guided=False)
    rows = loop.rows(_up, range(1, top + 1), (-1, 0))
    for i in loop.steps(range(1, top + 1)):
        of_y_inter, of_other, of_output = rows[i]
        output = loop.evaluate(i, z_inter, scaled)
        weights = (of_y_inter / p, -of_y_inter * (1.0 - p) / p, of_other, of_output)
        y, scaled = loop.advance(*_seen(loop, 2, [y, z, z_inter, output], weights), then=i)
        output = loop.evaluate(i, y, scaled)
        z_inter, z, scaled = denoised_step(
            [z_inter, y, output],
            (of_y_inter, of_other, of_output),
            (0.0, of_y, 0.0),
            x0_weight=of_z,
            next_scale=loop.input_scale(i + 1) if i < top else None,
            guidance_scale=loop.guidance_scale,
        )
        loop.report(i, z, output)
    return TwinPair(z, y)


def _seen(loop: Loop, other: int, tensors: list[Any], weights: Row) -> tuple[list[Any], Row]:
    """Leave the other state out where its weight is 0, because the model predicts the noise itself."""
    if loop.prediction != "noise":
        return tensors, weights
    return tensors[:other] + tensors[other + 1 :], weights[:other] + weights[other + 1 :]


def down_weights(prediction: Prediction, below: Level, here: Level) -> Row:
    """Weights of a state, of the other one, and of the output there in the state's step down."""
    a, b = transfer(here, below)
    of_state, of_output = read(prediction, here)
    return a, 0.0 if of_state is None else b * of_state, b * of_output


def mixed_weights(prediction: Prediction, below: Level, here: Level, p: Number) -> Row:
    """Weights of z_inter, y_i and the output at z_inter in z_{i-1} and in y_{i-1}, there beside that of z_{i-1}."""
    a, other, output = down_weights(prediction, below, here)
    rest = 1.0 - p
    return p + rest * other, rest * a, rest * output, p * other, p * a, p * output, rest


def _up(prediction: Prediction, below: Level, here: Level) -> Row:
    """Weights of a state, of the other one, and of the output there in the state's step back up."""
    a, other, output = down_weights(prediction, below, here)
    return 1.0 / a, -other / a, -output / a


def _run_integers(loop: Loop, states: TwinPair | ExactTwins, p: Ratio, inverse: bool) -> ExactTwins:
    top = loop.schedule.steps
    units = {i: unit for i, (unit,) in loop.rows(_unit, range(top + 1), (0,)).items()}
    start, end = (0, top) if inverse else (top, 0)
    if isinstance(states, ExactTwins):
        grid, z, y = Grid(loop, states.q, states), states.q, states.previous_q
    else:
        grid = Grid(loop, states.z)
        z, y = (grid.encode(x, units[start], max(start, 1)) for x in states)
    moves = _Moves(grid, units, loop.rows(_drift, range(1, top + 1), (-1, 0)), p, inverse)
    for i in loop.steps(range(1, top + 1) if inverse else range(top, 0, -1)):
        z, y, output = moves.undo(i, z, y) if inverse else moves.do(i, z, y)
        if loop.callback is not None:
            reached = i if inverse else i - 1
            loop.report(reached, decode(z, units[reached], grid.dtype), output)
    return ExactTwins(**vars(grid.pair(z, y, units[end], units[end])))


@dataclass(frozen=True)
class _Moves:
    """EDICT's step on integers, and the same four moves taken back in reverse."""

    grid: Grid
    units: dict[int, Number]
    rows: dict[int, Row]
    p: Ratio
    inverse: bool

    def do(self, i: int, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Output]:
        z_inter, _ = self._drift(i, z, y, self.units[i])
        y_inter, output = self._drift(i, y, z_inter, self.units[i - 1])
        z = self._blend(i, z_inter, y_inter)
        return z, self._blend(i, y_inter, z), output

    def undo(self, i: int, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Output]:
        y_inter = self._blend(i, y, z)
        z_inter = self._blend(i, z, y_inter)
        y, _ = self._drift(i, y_inter, z_inter, self.units[i - 1])
        z, output = self._drift(i, z_inter, y, self.units[i])
        return z, y, output

    def _drift(self, i: int, state: Tensor, other: Tensor, unit: Number) -> tuple[Tensor, Output]:
        """Add the noise at the other state, which stands in units of `unit`, to a state; or take it back."""
        _, output = self.grid.evaluate(i, other, unit)
        of_other, of_output = self.rows[i]
        tensors, weights = _seen(self.grid.loop, 0, [other, output], (of_other * unit, of_output))
        return self.grid.step(state, tensors, weights, inverse=self.inverse, mark=i), output

    def _blend(self, i: int, state: Tensor, other: Tensor) -> Tensor:
        rest = 1.0 - value(self.p)
        return self.grid.step(state, [other], (rest,), ratio=self.p, inverse=self.inverse, mark=i, guided=False)


def _drift(prediction: Prediction, below: Level, here: Level) -> Row:
    """Weights of the other state, in units of 1, and of the output there in the step of a state in units of alpha."""
    _, other, output = down_weights(prediction, below, here)
    return other / below.alpha, output / below.alpha


def _unit(_: Prediction, level: Level) -> Row:
    return (level.alpha,)
