"""EDM's samplers: Euler's and Heun's method, with optional churn, and their inversions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from bicm_diffusion.keys import CHURN
from bicm_diffusion.samplers.checks import check_number
from bicm_diffusion.samplers.ddim import down, up
from bicm_diffusion.samplers.loop import Loop, Model, Options, Output, Row, transfer
from bicm_diffusion.samplers.prediction import Level, Number, Prediction, folded, read
from bicm_diffusion.samplers.signature import sampler
from bicm_diffusion.schedules import Schedule
from bicm_kernels import affine_step, fold_in

if TYPE_CHECKING:
    from typing_extensions import Unpack

Integer = int | Tensor
Solver = Literal["euler", "heun"]

#: EDM never raises a noise level by more than this factor in one step.
MOST_CHURN = math.sqrt(2.0)


@sampler(Loop)
def edm_sample(
    model: Model,
    z: Tensor,
    schedule: Schedule,
    *,
    solver: Solver = "heun",
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
    seed: Integer | None = None,
    sample_id: Integer = 0,
    **options: Unpack[Options],
) -> Tensor:
    """Return z_0 from z = z_N by EDM's sampler (Karras 2022, Alg. 1 and 2).

    z: (B, …), any floating dtype; the result has its shape and dtype. solver: "heun" takes two evaluations of the model
    per step, one for a step to a level at which it cannot be called, such as sigma = 0; "euler" one. On a schedule with
    alpha ≠ 1 they work in DDIM's variables.
    churn: S_churn, in [0, inf): where sigma_i is in churn_range, sigma rises by the factor 1 + min(churn/N, √2 - 1)
    before the step, with noise of standard deviation churn_noise keyed by (seed, sample_id, i), apart from that of
    `bicm_kernels.normal` with the same seed; needs alpha = 1 and times that are the sigmas, as in `karras_schedule`.
    options: those of every sampler, see `Options`. Raises ValueError where an argument is out of range, or churn is
    used without a seed.

    >>> import torch
    >>> from bicm_diffusion import karras_schedule
    >>> edm_sample(lambda z, times: z, torch.ones(1, 2), karras_schedule(4, t_max=3.0)).shape
    torch.Size([1, 2])
    """
    loop, scaled = Loop("edm_sample", model, z, schedule, **options), None
    _check_solver(solver)
    lifts = _lifts(schedule, churn, churn_range)
    if churn > 0 and seed is None:
        raise ValueError("seed: expected an int or an int64 tensor where churn draws noise, got None")
    key = None if seed is None else fold_in(seed, CHURN)
    steps = Steps(loop, solver == "heun", lifts)
    noise_rows = loop.rows(_churned, range(1, schedule.steps + 1), (0,), lifts, churn_noise)
    for i in loop.steps(range(schedule.steps, 0, -1)):
        if lifts[i] > 1.0:
            z = affine_step([z], [1.0], noise_weight=noise_rows[i][0], seed=key, step=i, sample_id=sample_id)
            scaled = None
        z, scaled, output = steps.step(i, z, scaled)
        loop.report(i - 1, z, output)
    return z


@sampler(Loop)
def edm_invert(
    model: Model, z: Tensor, schedule: Schedule, *, solver: Solver = "heun", **options: Unpack[Options]
) -> Tensor:
    """Return approximately z_N from z = z_0 by EDM's sampler in reverse, BCM's baseline for inversion (figures 1, 10).

    z_i = z_{i-1} + (sigma_i - sigma_{i-1})·(eps_{i-1} + eps_i)/2 where alpha is 1, in DDIM's variables elsewhere.
    z: (B, …), any floating dtype; the result has its shape and dtype. solver: "heun" takes two evaluations of the model
    per step, "euler" one. From a level at which the model cannot be called, such as sigma = 0, the first step is DDIM
    inversion's, with eps(z_0, 1). options: those of every sampler, see `Options`.
    It is not exact: `edm_sample` from it returns Gaussian data of variance 1/4 on `karras_schedule(18)` with a mean
    squared error of 3e-5, and from `ddim_invert` of 0.13.
    Raises ValueError for an unknown solver or prediction, and TypeError for arguments of another kind.

    >>> import torch
    >>> from bicm_diffusion import karras_schedule
    >>> edm_invert(lambda z, times: z, torch.ones(1, 2), karras_schedule(4, t_max=3.0)).shape
    torch.Size([1, 2])
    """
    loop, scaled = Loop("edm_invert", model, z, schedule, **options), None
    _check_solver(solver)
    top, lowest = schedule.steps, schedule.lowest
    none, inner = (1.0,) * (top + 1), range(lowest, top)
    first_rows = loop.rows(up, range(1, lowest + 1), (-1, 0))
    euler_rows = loop.rows(_euler, inner, (1, 0), none)
    heun_rows = loop.rows(_heun, inner, (1, 0), none) if solver == "heun" else {}
    for i in loop.steps(range(top)):
        above = i + 1 if i + 1 < top else None
        output = loop.evaluate(max(i, lowest), z, scaled)
        if i not in heun_rows:
            row = euler_rows[i] if i in euler_rows else first_rows[i + 1]
            z, scaled = loop.advance([z, output], row, then=above)
        else:
            predicted, scaled = loop.advance([z, output], euler_rows[i], then=i + 1)
            output = loop.evaluate(i + 1, predicted, scaled)
            z, scaled = loop.advance([z, predicted, output], heun_rows[i], then=above)
        loop.report(i + 1, z, output)
    return z


class Steps:
    """The steps of a run: Euler's, and Heun's where the network can be called at the next level."""

    def __init__(self, loop: Loop, heun: bool, lifts: Sequence[float], indices: range | None = None) -> None:
        top = loop.schedule.steps
        indices = indices or range(1, top + 1)
        self.loop, self.lifts = loop, lifts
        self.lowest = loop.schedule.lowest + 1 if heun else top + 1
        self.euler_rows = loop.rows(_euler, indices, (-1, 0), lifts)
        self.heun_rows = loop.rows(_heun, range(max(indices.start, self.lowest), indices.stop), (-1, 0), lifts)

    def step(self, i: int, z: Tensor, scaled: Tensor | None = None) -> tuple[Tensor, Tensor | None, Output]:
        """Return z_{i-1}, the model's input there where one launch makes both, and the model's output at z_i."""
        loop = self.loop
        output = loop.evaluate(i, z, scaled, lift=self.lifts[i])
        following = None if i == 1 or self.lifts[i - 1] > 1.0 else i - 1
        if i < self.lowest:
            return *loop.advance([z, output], self.euler_rows[i], then=following), output
        predicted, scaled = loop.advance([z, output], self.euler_rows[i], then=i - 1)
        below = loop.evaluate(i - 1, predicted, scaled)
        return *loop.advance([z, predicted, below], self.heun_rows[i], then=following), output


def _check_solver(solver: object) -> None:
    if solver not in ("euler", "heun"):
        raise ValueError(f"solver: expected 'euler' or 'heun', got {solver!r}")


def _lifts(schedule: Schedule, churn: Any, churn_range: Any) -> tuple[float, ...]:
    """The factor by which each noise level rises before its step."""
    count = schedule.steps + 1
    check_number("churn", churn)
    if not churn >= 0.0:
        raise ValueError(f"churn: expected a value of at least 0, got {churn}")
    if churn == 0.0:
        return (1.0,) * count
    if schedule.alpha != (1.0,) * count or schedule.times != schedule.sigma:
        raise ValueError(
            "churn: expected a schedule with alpha = 1 whose times are its sigmas, as karras_schedule makes"
        )
    if not isinstance(churn_range, tuple | list) or len(churn_range) != 2:
        raise ValueError(f"churn_range: expected a pair of noise levels (low, high), got {churn_range!r}")
    low, high = churn_range
    lift = min(1.0 + churn / schedule.steps, MOST_CHURN)
    return tuple(lift if low <= sigma <= high else 1.0 for sigma in schedule.sigma)


def _euler(prediction: Prediction, below: Level, here: Level, lift: Number) -> Row:
    """Weights of z_i and the output there in Euler's step to another level, usually the next one."""
    return down(prediction, below, _lifted(here, lift))


def _heun(prediction: Prediction, below: Level, here: Level, lift: Number) -> Row:
    """Weights of z_i, Euler's state at the other level and the output there in Heun's a·z + b·(eps + eps')/2."""
    a, b = transfer(_lifted(here, lift), below)
    # b·eps/2 is half of what Euler's step added, so that the output at z_i is not read again.
    predicted, output = folded(read(prediction, below), 0.5, b / 2)
    return a / 2, predicted, output


def _churned(_: Prediction, level: Level, lift: Number, churn_noise: Number) -> Row:
    """The standard deviation of the noise that raises a level by its lift."""
    return (churn_noise * level.sigma * (lift * lift - 1.0) ** 0.5,)


def _lifted(level: Level, lift: Number) -> Level:
    return Level(level.time * lift, level.alpha, level.sigma * lift)
