"""EDICT in both directions: two states, each advanced in turn by the noise predicted at the other, then mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bicm_diffusion.samplers.exact import Grid
from bicm_diffusion.samplers.factors import Factor, Ratio, check_factor, rational, value
from bicm_diffusion.samplers.guide import opened
from bicm_diffusion.samplers.loop import Loop, Model, Options, Output, Row, transfer
from bicm_diffusion.samplers.pairs import first_tensor, recorded
from bicm_diffusion.samplers.prediction import Level, Number, Prediction, read
from bicm_diffusion.samplers.record import Record
from bicm_diffusion.samplers.rounding import warn_of_edict
from bicm_diffusion.samplers.signature import sampler
from bicm_diffusion.samplers.states import ExactTwins, TwinPair, decode
from bicm_diffusion.schedules import Schedule
from bicm_kernels import denoised_step

if TYPE_CHECKING:
    from typing_extensions import Unpack

State = Tensor | TwinPair | ExactTwins


@sampler(Loop)
def edict_sample(
    model: Model,
    z: State,
    schedule: Schedule,
    *,
    p: Factor = 0.93,
    leapfrog: bool = False,
    exact: bool = True,
    **options: Unpack[Options],
) -> TwinPair | ExactTwins:
    """Return (z_0, y_0) by EDICT (BDIA eq. 9-12), from z_N = y_N or from the pair of `edict_invert`.

    z: (B, …), any floating dtype. p in (0, 1], the weight of a state in its own mix; 0.93 is the authors'. leapfrog:
    the states alternate in going first, z in step N, y in step N - 1 and so on, as in the authors' code; in the
    equations z always goes first. Takes 2N evaluations of the model. exact: integer states z/alpha and p the nearest
    n/m with m up to 1024, from which `edict_invert` returns z_N to the bit; False keeps floats, a `TwinPair` whose
    inversion rounds. options: those of every sampler, see `Options`.
    Raises ValueError where p is out of range or a pair was made with something else, TypeError for arguments of
    another kind, and OverflowError where an exact state left its range.

    >>> import torch
    >>> from bicm_diffusion import vp_schedule
    >>> edict_sample(lambda z, times: z, torch.ones(1, 2), vp_schedule(4)).z.shape
    torch.Size([1, 2])
    """
    return _run("edict_sample", model, z, schedule, p, leapfrog, exact, options)


@sampler(Loop)
def edict_invert(
    model: Model,
    z: State,
    schedule: Schedule,
    *,
    p: Factor = 0.93,
    leapfrog: bool = False,
    exact: bool = True,
    **options: Unpack[Options],
) -> TwinPair | ExactTwins:
    """Return (z_N, y_N) by EDICT's inversion (BDIA eq. 13-16), from z_0 = y_0 or from the pair of `edict_sample`.

    z: (B, …), any floating dtype. p, leapfrog, exact and options: as for `edict_sample`, of whose pair this is the
    inverse, to the bit if exact; in floats rounding grows by up to p^-2 per step, with a warning where the loss
    would be visible.
    Raises ValueError, TypeError and OverflowError as `edict_sample` does.

    >>> import torch
    >>> from bicm_diffusion import vp_schedule
    >>> edict_invert(lambda z, times: z, torch.ones(1, 2), vp_schedule(4)).z.shape
    torch.Size([1, 2])
    """
    return _run("edict_invert", model, z, schedule, p, leapfrog, exact, options)


def _run(
    name: str, model: Model, z: State, schedule: Schedule, p: Factor, leapfrog: bool, exact: bool, options: Options
) -> TwinPair | ExactTwins:
    first = first_tensor(z, exact, TwinPair, ExactTwins)
    loop = Loop(name, model, first, schedule, **options)
    check_factor("p", p, lowest=None, batch=len(first))
    inverse, mix = name == "edict_invert", value(p)
    ratio = rational("p", p) if exact else (1, 1)
    settings = {"p": ratio if exact else mix, "leapfrog": bool(leapfrog)}
    record = recorded(loop, "EDICT", ("edict_sample", "edict_invert"), settings, z, inverse)
    if exact:
        return _run_integers(loop, TwinPair(z, z) if isinstance(z, Tensor) else z, ratio, leapfrog, inverse, record)
    states = TwinPair(z, z) if isinstance(z, Tensor) else TwinPair(z.z, z.y)
    if inverse:
        warn_of_edict(loop.schedule, mix, first.dtype, alone=isinstance(z, Tensor))
    ends = (_invert_floats if inverse else _sample_floats)(loop, states, mix, leapfrog)
    return TwinPair(*ends, record=record)


def y_first(top: int, i: int, leapfrog: bool) -> bool:
    """Whether y goes first in the step between the indices i - 1 and i, and z second."""
    return leapfrog and (top - i) % 2 == 1


def _sample_floats(loop: Loop, states: TwinPair, p: Number, leapfrog: bool) -> tuple[Tensor, Tensor]:
    """Two launches a step: the first state's intermediate one, then both mixed from it and the second."""
    (z, y), scaled = states, None
    top = loop.schedule.steps
    inter_rows = loop.rows(down_weights, range(1, top + 1), (-1, 0))
    mix_rows = {
        order: loop.rows(formula, range(1, top + 1), (-1, 0), p)
        for order, formula in (_MIXES if leapfrog else {(False, False): mixed_weights}).items()
    }
    for i in loop.steps(range(top, 0, -1)):
        swapped, swaps_next = y_first(top, i, leapfrog), y_first(top, i - 1, leapfrog)
        first, second = (y, z) if swapped else (z, y)
        output = loop.evaluate(i, second, scaled)
        inter, scaled = loop.advance(*_seen(loop, 1, [first, second, output], inter_rows[i]), then=i)
        output = loop.evaluate(i, inter, scaled)
        row = mix_rows[swapped, swaps_next][i]
        # The state that the model is evaluated at next comes last, so that the op also returns its scaled copy.
        tensors, (first_row, second_row), guidance = opened(
            [inter, second, output], [row[:3], row[3:6]], loop.guidance_scale
        )
        asked, other, scaled = denoised_step(
            tensors,
            first_row,
            second_row,
            x0_weight=row[6],
            next_scale=loop.input_scale(i - 1) if i > 1 else None,
            guidance_scale=guidance,
        )
        z, y = (asked, other) if swaps_next else (other, asked)
        loop.report(i - 1, z, output)
    return z, y


def _invert_floats(loop: Loop, states: TwinPair, p: Number, leapfrog: bool) -> tuple[Tensor, Tensor]:
    """Two launches a step: the second state from the first one's intermediate one, then the first and the next such."""
    z, y = states
    top = loop.schedule.steps
    # z_inter = (z - (1 - p)·y_inter)/p with y_inter = (y - (1 - p)·z)/p
    of_z, of_y = 1.0 / p + (1.0 - p) * (1.0 - p) / (p * p), -(1.0 - p) / (p * p)
    own, rest = 1.0 / p, -(1.0 - p) / p
    # Weights of the state that went first and of the other one in what the next step is taken back from, by whether y
    # went first in this step and in the next.
    carried = {(False, False): (of_z, of_y), (False, True): (rest, own), (True, False): (of_y, of_z)}
    swapped = y_first(top, 1, leapfrog)
    inter, scaled = loop.advance([z, y], (rest, own) if swapped else (of_z, of_y), then=1, guided=False)
    rows = loop.rows(_up, range(1, top + 1), (-1, 0))
    for i in loop.steps(range(1, top + 1)):
        of_inter, of_other, of_output = rows[i]
        swaps_next = y_first(top, i + 1, leapfrog)
        output = loop.evaluate(i, inter, scaled)
        if swapped:
            # z_inter = (z - (1 - p)·y_inter)/p, then z_i from it and the noise at y_inter
            back = (of_inter / p, of_inter * rest + of_other, of_output)
            second, scaled = loop.advance([z, inter, output], back, then=i)
        else:
            weights = (of_inter / p, -of_inter * (1.0 - p) / p, of_other, of_output)
            second, scaled = loop.advance(*_seen(loop, 2, [y, z, inter, output], weights), then=i)
        output = loop.evaluate(i, second, scaled)
        of_first, of_second = carried[swapped, swaps_next]
        tensors, (first_row, second_row), guidance = opened(
            [inter, second, output],
            [(of_inter, of_other, of_output), (0.0, of_second, 0.0)],
            loop.guidance_scale,
        )
        inter, first, scaled = denoised_step(
            tensors,
            first_row,
            second_row,
            x0_weight=of_first,
            next_scale=loop.input_scale(i + 1) if i < top else None,
            guidance_scale=guidance,
        )
        z, y = (second, first) if swapped else (first, second)
        swapped = swaps_next
        loop.report(i, z, output)
    return z, y


def _seen(loop: Loop, other: int, tensors: list[Any], weights: Row) -> tuple[list[Any], Row]:
    """Omit the other state where its weight is 0, because the model predicts the noise itself."""
    if loop.prediction != "noise":
        return tensors, weights
    return tensors[:other] + tensors[other + 1 :], weights[:other] + weights[other + 1 :]


def down_weights(prediction: Prediction, below: Level, here: Level) -> Row:
    """Weights of a state, of the other one, and of the output there in the state's step down."""
    a, b = transfer(here, below)
    of_state, of_output = read(prediction, here)
    return a, 0.0 if of_state is None else b * of_state, b * of_output


def mixed_weights(prediction: Prediction, below: Level, here: Level, p: Number) -> Row:
    """Weights of z_inter, y_i and the output at z_inter in z_{i-1} and in y_{i-1}, the latter with z_{i-1}."""
    a, other, output = down_weights(prediction, below, here)
    rest = 1.0 - p
    return p + rest * other, rest * a, rest * output, p * other, p * a, p * output, rest


def _mixed_to_z(prediction: Prediction, below: Level, here: Level, p: Number) -> Row:
    """The same in y_{i-1} and in z_{i-1}, where the model is evaluated next; y_{i-1} does not contribute."""
    z_inter, y, output, y_inter, y_y, y_output, rest = mixed_weights(prediction, below, here, p)
    return y_inter + rest * z_inter, y_y + rest * y, y_output + rest * output, z_inter, y, output, 0.0


def _swapped(prediction: Prediction, below: Level, here: Level, p: Number) -> Row:
    """Weights of y_inter, z_i and the output at y_inter in z_{i-1} and in y_{i-1}, the latter with z_{i-1}."""
    a, other, output = down_weights(prediction, below, here)
    rest = 1.0 - p
    return rest + p * other, p * a, p * output, p, 0.0, 0.0, rest


#: By whether y goes first in this step, and in the next.
_MIXES = {(False, True): _mixed_to_z, (True, False): _swapped}


def _up(prediction: Prediction, below: Level, here: Level) -> Row:
    """Weights of a state, of the other one, and of the output there in the state's step back up."""
    a, other, output = down_weights(prediction, below, here)
    return 1.0 / a, -other / a, -output / a


def _run_integers(
    loop: Loop, states: TwinPair | ExactTwins, p: Ratio, leapfrog: bool, inverse: bool, record: Record
) -> ExactTwins:
    top = loop.schedule.steps
    units = {i: unit for i, (unit,) in loop.rows(_unit, range(top + 1), (0,)).items()}
    start, end = (0, top) if inverse else (top, 0)
    if isinstance(states, ExactTwins):
        grid, z, y = Grid(loop, states.q, record, states), states.q, states.previous_q
    else:
        grid = Grid(loop, states.z, record)
        z, y = (grid.encode(x, units[start], max(start, 1)) for x in states)
    grid.begin(z, y)
    moves = _Moves(grid, units, loop.rows(_drift, range(1, top + 1), (-1, 0)), p, inverse)
    for i in loop.steps(range(1, top + 1) if inverse else range(top, 0, -1)):
        z, y, output = (moves.undo if inverse else moves.do)(i, z, y, y_first(top, i, leapfrog))
        if loop.callback is not None:
            reached = i if inverse else i - 1
            loop.report(reached, decode(z, units[reached], grid.dtype), output)
    return grid.pair(ExactTwins, z, y, units[end], units[end])


@dataclass(frozen=True)
class _Moves:
    """EDICT's step on integers, and its four operations undone in reverse order."""

    grid: Grid
    units: dict[int, Number]
    rows: dict[int, Row]
    p: Ratio
    inverse: bool

    def do(self, i: int, z: Tensor, y: Tensor, swapped: bool) -> tuple[Tensor, Tensor, Output]:
        first, second = (y, z) if swapped else (z, y)
        first, _ = self._drift(i, first, second, self.units[i])
        second, output = self._drift(i, second, first, self.units[i - 1])
        z_inter, y_inter = (second, first) if swapped else (first, second)
        z = self._blend(i, z_inter, y_inter)
        return z, self._blend(i, y_inter, z), output

    def undo(self, i: int, z: Tensor, y: Tensor, swapped: bool) -> tuple[Tensor, Tensor, Output]:
        y_inter = self._blend(i, y, z)
        z_inter = self._blend(i, z, y_inter)
        first, second = (y_inter, z_inter) if swapped else (z_inter, y_inter)
        second, _ = self._drift(i, second, first, self.units[i - 1])
        first, output = self._drift(i, first, second, self.units[i])
        return (second, first, output) if swapped else (first, second, output)

    def _drift(self, i: int, state: Tensor, other: Tensor, unit: Number) -> tuple[Tensor, Output]:
        """Add the noise at the other state, which is in units of `unit`, to a state; or subtract it."""
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
