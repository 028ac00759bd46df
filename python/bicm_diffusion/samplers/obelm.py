"""O-BELM in both directions: the two-state method with the smallest local error, of order 2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from bicm_diffusion.samplers.factors import Ratio, value
from bicm_diffusion.samplers.loop import Loop, Model, Options, Output, Row, traced
from bicm_diffusion.samplers.pairs import DOWN, UP, Method, State, first_tensor, run
from bicm_diffusion.samplers.prediction import Level, Number, Prediction, Reading, folded, read
from bicm_diffusion.samplers.rounding import warn_of_obelm
from bicm_diffusion.samplers.signature import sampler
from bicm_diffusion.samplers.states import ExactPair, StatePair
from bicm_diffusion.schedules import Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: The range of factors of an exact step.
MAX_NUMERATOR = 2**20


@sampler(Loop)
def obelm_sample(
    model: Model, z: State, schedule: Schedule, *, exact: bool = True, **options: Unpack[Options]
) -> StatePair | ExactPair:
    """Return (z_0, z_1) by O-BELM (Wang et al. 2024), from z_N or from the pair (z_N, z_{N-1}) of `obelm_invert`.

    With s = sigma/alpha, h_i = s_i - s_{i-1} and A = (h_i/h_{i+1})², on y = z/alpha:
    y_{i-1} = A·y_{i+1} + (1 - A)·y_i - (h_i + A·h_{i+1})·eps(z_i, i); from z_N alone the first step is DDIM's.
    z: (B, …), any floating dtype. Takes N evaluations of the model. exact: integer states y and A the nearest n/m with
    m up to 1024, an `ExactPair` from which `obelm_invert` returns z_N to the bit; False keeps floats, a `StatePair`.
    options: those of every sampler, see `Options`.
    Raises ValueError where adjacent intervals differ too much for an exact A or the states of a pair do not fit
    together, and OverflowError where an exact state left its range.

    >>> import torch
    >>> from bicm_diffusion import vp_schedule
    >>> obelm_sample(lambda z, times: z, torch.ones(1, 2), vp_schedule(4)).z.shape
    torch.Size([1, 2])
    """
    return run(_Obelm(Loop("obelm_sample", model, first_tensor(z, exact), schedule, **options), exact), z, DOWN, exact)


@sampler(Loop)
def obelm_invert(
    model: Model, z: State, schedule: Schedule, *, exact: bool = True, **options: Unpack[Options]
) -> StatePair | ExactPair:
    """Return (z_N, z_{N-1}) by O-BELM's inversion, from z_0 or from `obelm_sample`'s (z_0, z_1).

    z: (B, …), any floating dtype; z_0 alone gets its z_1 by DDIM inversion with eps(z_0, 1). exact and options: as for
    `obelm_sample`, whose pair this inverts, to the bit where it is exact. Errors grow by 1/A in every step,
    (h_N/h_1)² in total: float inversions are usable only on grids nearly uniform in sigma/alpha, and warn elsewhere.
    Raises ValueError and OverflowError as `obelm_sample` does.

    >>> import torch
    >>> from bicm_diffusion import vp_schedule
    >>> obelm_invert(lambda z, times: z, torch.ones(1, 2), vp_schedule(4)).z.shape
    torch.Size([1, 2])
    """
    first = first_tensor(z, exact)
    method = _Obelm(Loop("obelm_invert", model, first, schedule, **options), exact)
    if not exact:
        warn_of_obelm(method.loop.schedule, first.dtype, alone=isinstance(z, Tensor))
    return run(method, z, UP, exact)


class _Obelm(Method):
    name = "O-BELM"
    functions = ("obelm_sample", "obelm_invert")

    def __init__(self, loop: Loop, exact: bool) -> None:
        super().__init__(loop)
        inner, everywhere = range(1, loop.schedule.steps), range(loop.schedule.steps + 1)
        self.fractions = _fractions(loop) if exact else [(1, 1)] * len(everywhere)
        if exact:
            self.rows = loop.rows(_near, inner, (-1, 0, 1), [value(fraction) for fraction in self.fractions])
        else:
            self.rows = loop.rows(_best, inner, (-1, 0, 1))
        self.units = loop.rows(_unit, everywhere, (0,))

    def unit(self, i: int) -> Number:
        return self.units[i][0]

    def ratio(self, i: int) -> tuple[Number, Ratio]:
        return self.rows[i][0], self.fractions[i]

    def terms(self, i: int, z: Tensor, scaled: Tensor | None) -> tuple[list[Any], Row, Output]:
        output = self.loop.evaluate(i, z, scaled)
        return [output], self.rows[i][1:], output


def _fractions(loop: Loop) -> list[Ratio]:
    """A at every index as a fraction: ints, or 0-d tensors in a traced loop."""
    schedule = loop.schedule
    if traced():
        numerators, denominators = schedule.ratios.to(loop.device)
        return list(zip(numerators.unbind(), denominators.unbind(), strict=True))
    pairs = list(zip(*schedule.ratios.tolist(), strict=True))
    for i, (n, _) in enumerate(pairs):
        if not 1 <= n <= MAX_NUMERATOR:
            raise ValueError(
                "schedule: exact O-BELM needs adjacent intervals of similar width in sigma/alpha, got "
                f"{schedule.width(i):.3g} and {schedule.width(i + 1):.3g} at index {i}; pass exact=False"
            )
    return pairs


def _best(prediction: Prediction, below: Level, here: Level, above: Level) -> Row:
    """A and the weights of y_i and of the output at z_i in y_{i-1}."""
    h, h_next = _widths(below, here, above)
    return _near(prediction, below, here, above, h * h / (h_next * h_next))


def _near(prediction: Prediction, below: Level, here: Level, above: Level, ratio: Number) -> Row:
    """The same for a rounded A: still consistent, and of order 2 up to the rounding."""
    h, h_next = _widths(below, here, above)
    of_state, of_output = read(prediction, here)
    reading = Reading(None if of_state is None else of_state * here.alpha, of_output)
    return ratio, *folded(reading, 1.0 - ratio, -(h + ratio * h_next))


def _widths(below: Level, here: Level, above: Level) -> tuple[Number, Number]:
    low, middle, high = (level.sigma / level.alpha for level in (below, here, above))
    return middle - low, high - middle


def _unit(_: Prediction, level: Level) -> Row:
    return (level.alpha,)
