"""Coefficients of stochastic steps: the mean as weights of state and output, and the standard deviation, per index.

All are float64 and rounded once, by the step that uses them. A step without noise is the sampler's
deterministic step, with a standard deviation of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeAlias

from bicm_diffusion.described import described
from bicm_diffusion.samplers.ancestral import ancestral_row
from bicm_diffusion.samplers.checks import check_number, check_schedule
from bicm_diffusion.samplers.prediction import Level, Prediction, denoised_weights, known_prediction
from bicm_diffusion.schedules import Schedule

#: Weights of the state and of the model's output in the mean, and the standard deviation.
Row: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True)
class PolicyTable:
    """The steps of a stochastic sampler on a schedule: z_{i-1} = of_state[i]·z_i + of_output[i]·output + std[i]·n.

    name: of the sampler; schedule: its times are passed to the model; prediction: the model's prediction type.
    of_state, of_output and std hold N + 1 floats; no step starts at index 0, so that the first of each is NaN. Where
    std is 0 the step is deterministic.
    """

    name: str
    schedule: Schedule
    prediction: Prediction
    of_state: tuple[float, ...]
    of_output: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def stochastic(self) -> tuple[int, ...]:
        """The indices whose steps draw noise, in the order in which a sampler takes them: from N down."""
        return tuple(i for i in range(self.schedule.steps, 0, -1) if self.std[i] > 0.0)

    def weights(self, i: int) -> tuple[float, float]:
        """Return the weights of z_i and of the output there in the mean of z_{i-1}."""
        return self.of_state[i], self.of_output[i]


def flow_grpo_table(
    schedule: Schedule,
    *,
    noise_level: float = 0.7,
    stochastic: Collection[int] | None = None,
    prediction: Prediction = "flow",
) -> PolicyTable:
    """Return the steps of Flow-GRPO, an SDE with the marginals of a flow's ODE.

    With σ' = σ_{i-1}, Δ = σ' - σ and σ_t = noise_level·√(σ/(1 - σ)), where σ = 1 with the second level in the root:
    mean z·(1 + σ_t²Δ/(2σ)) + v·(1 + σ_t²(1 - σ)/(2σ))·Δ, standard deviation σ_t·√(-Δ).

    schedule: of a flow, alpha + sigma = 1, as `flow_schedule` makes it. noise_level >= 0. stochastic: the indices i
    whose steps, from i to i - 1, draw noise; None for all, fewer for a window (MixGRPO). prediction: what the model
    predicts; where alpha_N is 0, "flow" or "x0".
    Raises TypeError, ValueError for an argument of another type or range.

    >>> from bicm_diffusion import flow_schedule
    >>> flow_grpo_table(flow_schedule(2), noise_level=1.0).std[1:]
    (0.7071067811865476, 1.0)
    """
    check_schedule(schedule)
    second = schedule.sigma[schedule.steps - 1]

    def row(velocity: tuple[float, float], here: Level, below: Level, noise: float) -> Row:
        sigma, step = float(here.sigma), float(below.sigma) - float(here.sigma)
        spread = noise * noise * sigma / (1.0 - (second if sigma == 1.0 else sigma))
        of_state = 1.0 + spread * step / (2.0 * sigma)
        of_velocity = (1.0 + spread * (1.0 - sigma) / (2.0 * sigma)) * step
        return of_state + of_velocity * velocity[0], of_velocity * velocity[1], math.sqrt(spread * -step)

    return _flow_table("flow_grpo", schedule, noise_level, stochastic, prediction, row)


def cps_table(
    schedule: Schedule,
    *,
    noise_level: float = 0.7,
    stochastic: Collection[int] | None = None,
    prediction: Prediction = "flow",
) -> PolicyTable:
    """Return the steps of coefficient-preserving sampling (CPS): every state has exactly the noise of its level.

    With x0 = z - σ·v, x1 = z + (1 - σ)·v and s = σ'·sin(noise_level·π/2): mean (1 - σ')·x0 + √(σ'² - s²)·x1, standard
    deviation s. The step to σ' = 0 is deterministic.

    schedule, stochastic, prediction: as for `flow_grpo_table`; noise_level in [0, 1].
    Raises TypeError, ValueError for an argument of another type or range.

    >>> from bicm_diffusion import flow_schedule
    >>> cps_table(flow_schedule(2), noise_level=1.0).std[1:]
    (0.0, 0.5)
    """
    check_number("noise_level", noise_level)
    if not noise_level <= 1.0:
        raise ValueError(f"noise_level: expected a value in [0, 1], got {noise_level}")

    def row(velocity: tuple[float, float], here: Level, below: Level, noise: float) -> Row:
        sigma, lower = float(here.sigma), float(below.sigma)
        kept, std = lower * math.cos(noise * math.pi / 2.0), lower * math.sin(noise * math.pi / 2.0)
        of_velocity = (1.0 - sigma) * kept - sigma * (1.0 - lower)
        return (1.0 - lower) + kept + of_velocity * velocity[0], of_velocity * velocity[1], std

    return _flow_table("cps", schedule, noise_level, stochastic, prediction, row)


def ddim_table(
    schedule: Schedule,
    *,
    eta: float = 1.0,
    stochastic: Collection[int] | None = None,
    prediction: Prediction = "noise",
) -> PolicyTable:
    """Return the steps of DDIM with η, as DDPO takes them; those of `ancestral_sample`.

    Mean and standard deviation are those of DDIM eq. 12 and 16: s = η·√((1 - ᾱ')/(1 - ᾱ))·√(1 - ᾱ/ᾱ') on VP schedules.
    The step to clean data is deterministic.

    schedule: any, alpha > 0. eta: η in [0, 1]. stochastic: as for `flow_grpo_table`. prediction: what the model
    predicts.
    Raises TypeError, ValueError for an argument of another type or range.

    >>> from bicm_diffusion import vp_schedule
    >>> ddim_table(vp_schedule(4), eta=0.0).stochastic
    ()
    """
    check_schedule(schedule)
    check_number("eta", eta)
    prediction = known_prediction(prediction)
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta: expected a value in [0, 1], got {eta}")
    if not schedule.alpha[-1]:
        raise ValueError(f"schedule: expected alpha > 0, got alpha = 0 at index {schedule.steps}")

    def row(i: int, noise: float) -> Row:
        here, below = _level(schedule, i), _level(schedule, i - 1)
        of_state, of_output, std = ancestral_row(prediction, below, here, noise)
        return float(of_state), float(of_output), float(std)

    return _table("ddim", schedule, eta, stochastic, prediction, row)


def _level(schedule: Schedule, i: int) -> Level:
    return Level(schedule.times[i], schedule.alpha[i], schedule.sigma[i])


def _table(
    name: str,
    schedule: Schedule,
    noise: float,
    stochastic: Collection[int] | None,
    prediction: Prediction,
    row: Callable[[int, float], Row],
) -> PolicyTable:
    """The table of row(i, noise), with no noise at indices that are not stochastic."""
    indices = range(1, schedule.steps + 1)
    chosen = indices if stochastic is None else stochastic
    try:
        wrong = [i for i in chosen if i not in indices]
    except TypeError:
        raise TypeError(f"stochastic: expected indices of steps, got {described(stochastic)}") from None
    if wrong:
        raise ValueError(f"stochastic: expected indices in [1, {schedule.steps}], got {wrong[0]!r}")
    rows = [(math.nan,) * 3, *(row(i, noise if i in chosen else 0.0) for i in indices)]
    of_state, of_output, std = zip(*rows, strict=True)
    return PolicyTable(name, schedule, prediction, of_state, of_output, std)


def _flow_table(
    name: str,
    schedule: Schedule,
    noise_level: float,
    stochastic: Collection[int] | None,
    prediction: Prediction,
    formula: Callable[[tuple[float, float], Level, Level, float], Row],
) -> PolicyTable:
    """The table of a formula in the velocity of a flow, whose weights of state and output it is given."""
    check_schedule(schedule)
    check_number("noise_level", noise_level)
    prediction = known_prediction(prediction)
    if not 0.0 <= noise_level < math.inf:
        raise ValueError(f"noise_level: expected a value of at least 0, got {noise_level}")
    if not schedule.flow:
        raise ValueError("schedule: expected one of a flow, alpha + sigma = 1, such as flow_schedule(N)")
    if prediction not in ("flow", "x0") and not schedule.alpha[-1]:
        raise ValueError(
            f"schedule: expected alpha > 0 for prediction={prediction!r}, got alpha = 0 at index {schedule.steps}; "
            "only prediction='flow' and 'x0' are defined there"
        )

    def row(i: int, noise: float) -> Row:
        here, below = _level(schedule, i), _level(schedule, i - 1)
        if prediction == "flow":
            velocity = 0.0, 1.0
        else:
            of_state, of_output = denoised_weights(prediction, here)
            sigma = float(here.sigma)
            velocity = (1.0 - float(of_state)) / sigma, -float(of_output) / sigma
        return formula(velocity, here, below, noise)

    return _table(name, schedule, noise_level, stochastic, prediction, row)
