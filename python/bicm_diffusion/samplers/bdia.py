"""BDIA in both directions: two adjacent states determine the trajectory from sample to noise and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from bicm_diffusion.samplers.checks import check_arguments
from bicm_diffusion.samplers.edm import Steps
from bicm_diffusion.samplers.factors import Factor, Ratio, check_factor, rational, rounded, value
from bicm_diffusion.samplers.guide import whole
from bicm_diffusion.samplers.loop import Loop, Model, Options, Output, Row, transfer
from bicm_diffusion.samplers.pairs import DOWN, UP, Method, State, first_tensor, run
from bicm_diffusion.samplers.prediction import Level, Number, Prediction, folded, read
from bicm_diffusion.samplers.rounding import warn_of_bdia
from bicm_diffusion.samplers.signature import sampler
from bicm_diffusion.samplers.states import ExactPair, StatePair
from bicm_diffusion.schedules import Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack

Increments = Literal["euler", "heun"]


@sampler(Loop)
def bdia_sample(
    model: Model,
    z: State,
    schedule: Schedule,
    *,
    gamma: Factor = 1.0,
    increments: Increments = "euler",
    exact: bool = True,
    **options: Unpack[Options],
) -> StatePair | ExactPair:
    """Return (z_0, z_1) by BDIA (BDIA eq. 23), from z_N or from the pair (z_N, z_{N-1}) of `bdia_invert`.

    z: (B, …), any floating dtype; from z_N alone the first step is DDIM's, or Heun's. gamma in [0, 1]: a float, (B,)
    floats, a Fraction or (n, m); 0 is DDIM, or Heun's method. increments: "euler" is BDIA-DDIM (eq. 24), and on a
    schedule with alpha = 1 BDIA on EDM's sampler, of order 2 at gamma = 1 and N evaluations of the model; "heun" is of
    order 2 for every gamma and takes three evaluations per step (Euler's increments at sigma_0 = 0).
    exact: integer states and gamma the nearest n/m with m up to 1024, an `ExactPair` from which `bdia_invert` returns
    z_N to the bit; False keeps floats, a `StatePair` whose inversion rounds.
    options: those of every sampler, see `Options`.
    Raises ValueError where an argument is out of range or the states of a pair do not fit together, and OverflowError
    where an exact state left its range.

    >>> from bicm_diffusion import vp_schedule
    >>> bdia_sample(lambda z, times: z, torch.ones(1, 2), vp_schedule(4)).z.shape
    torch.Size([1, 2])
    """
    return run(_method("bdia_sample", model, z, schedule, gamma, increments, exact, options), z, DOWN, exact)


@sampler(Loop)
def bdia_invert(
    model: Model,
    z: State,
    schedule: Schedule,
    *,
    gamma: Factor = 1.0,
    increments: Increments = "euler",
    exact: bool = True,
    start_index: Literal[0, 1] = 1,
    **options: Unpack[Options],
) -> StatePair | ExactPair:
    """Return (z_N, z_{N-1}) by BDIA's inversion (BDIA eq. 28), from z_0 or from `bdia_sample`'s (z_0, z_1).

    z: (B, …), any floating dtype; a real image z_0 alone gets its z_1 by DDIM inversion with eps(z_0, start_index):
    1 is DDIM inversion (eq. 8); 0 is Alg. 2's, for schedules with sigma_0 > 0.
    gamma in (0, 1], increments, exact and options: as for `bdia_sample`, whose pair this inverts, to the bit
    if exact; floats lose about N·eps·gamma^-N, with a warning where that would be visible.
    Raises ValueError where an argument is out of range or the states of a pair do not fit together, and OverflowError
    where an exact state left its range.

    >>> from bicm_diffusion import vp_schedule
    >>> bdia_invert(lambda z, times: z, torch.ones(1, 2), vp_schedule(4)).z.shape
    torch.Size([1, 2])
    """
    method = _method("bdia_invert", model, z, schedule, gamma, increments, exact, options)
    if start_index not in (0, 1) or start_index < schedule.lowest:
        expected = "1, or 0 where sigma_0 > 0" if schedule.clean or schedule.asked else "1, as no time is known for 0"
        raise ValueError(f"start_index: expected {expected}, got {start_index} (sigma_0 = {schedule.sigma[0]:.4g})")
    method.start_index = start_index
    if not exact:
        warn_of_bdia(method.loop.schedule, method.gamma, method.dtype, alone=isinstance(z, Tensor))
    return run(method, z, UP, exact)


@sampler(Loop)
def bdia_edit(
    model: Model,
    z: State,
    schedule: Schedule,
    *,
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    gamma: Factor = 1.0,
    increments: Increments = "euler",
    exact: bool = True,
    start_index: Literal[0, 1] = 1,
    **options: Unpack[Options],
) -> StatePair | ExactPair:
    """Return (z_0, z_1) of an edited image: inverted under one condition, sampled under another (BDIA Alg. 2).

    z: the image z_0, (B, …), or a pair. source, target: keyword arguments of the model during inversion and during
    sampling, in addition to extra_args; equal ones return the image itself, to the bit if exact. start_index:
    as for `bdia_invert`. The rest: as for `bdia_sample`; a smaller gamma keeps the result nearer to the image.
    Raises ValueError and OverflowError as `bdia_sample` does.

    >>> from bicm_diffusion import vp_schedule
    >>> def model(z, times, label): return label * z
    >>> image, schedule = torch.ones(1, 2), vp_schedule(4)
    >>> torch.equal(bdia_edit(model, image, schedule, source={"label": 1}, target={"label": 1}).z, image)
    True
    """
    shared = options.pop("extra_args", None) or {}
    for name, arguments in (("extra_args", shared), ("source", source), ("target", target)):
        check_arguments(name, arguments)
    up_options: Options = {**options, "extra_args": {**shared, **source}}
    down_options: Options = {**options, "extra_args": {**shared, **target}}
    step: dict[str, Any] = {"gamma": gamma, "increments": increments, "exact": exact}
    latent = bdia_invert(model, z, schedule, start_index=start_index, **step, **up_options)
    return bdia_sample(model, latent, schedule, **step, **down_options)


def _method(
    name: str,
    model: Model,
    z: State,
    schedule: Schedule,
    gamma: Factor,
    increments: Increments,
    exact: bool,
    options: Options,
) -> _Euler:
    first = first_tensor(z, exact)
    loop = Loop(name, model, first, schedule, **options)
    inverse = name == "bdia_invert"
    check_factor("gamma", gamma, lowest=None if inverse else 0.0, batch=len(first))
    if increments not in _METHODS:
        raise ValueError(f"increments: expected one of {', '.join(map(repr, _METHODS))}, got {increments!r}")
    if exact:
        return _METHODS[increments](loop, rational("gamma", gamma), first.dtype)
    # The inverse step multiplies by 1/gamma, which is rounded before the other weights are made from it.
    number = value(gamma)
    factor = 1.0 / rounded(1.0 / number, first.dtype) if inverse else rounded(number, first.dtype)
    return _METHODS[increments](loop, factor, first.dtype, number)


class _Euler(Method):
    """BDIA-DDIM: Euler's increments in DDIM's variables."""

    name = "BDIA"
    functions = ("bdia_sample", "bdia_invert")
    increments: ClassVar[Increments] = "euler"

    def __init__(self, loop: Loop, gamma: Factor, dtype: torch.dtype, given: Factor | None = None) -> None:
        super().__init__(loop)
        self.dtype, self.given = dtype, gamma if given is None else given
        self.gamma, self.fraction = value(gamma), gamma if isinstance(gamma, tuple) else (1, 1)
        self.rows = loop.rows(euler_weights, range(1, loop.schedule.steps), (-1, 0, 1), self.gamma)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"gamma": self.given, "increments": self.increments}

    def ratio(self, _: int) -> tuple[Number, Ratio]:
        return self.gamma, self.fraction

    def terms(self, i: int, z: Tensor, scaled: Tensor | None) -> tuple[list[Any], Row, Output]:
        output = self.loop.evaluate(i, z, scaled)
        return [output], self.rows[i], output


class _Heun(_Euler):
    """BDIA on EDM's sampler: Heun's increments on both sides, so that every gamma has order 2."""

    increments = "heun"

    def __init__(self, loop: Loop, gamma: Factor, dtype: torch.dtype, given: Factor | None = None) -> None:
        super().__init__(loop, gamma, dtype, given)
        self.lowest = loop.schedule.lowest + 1
        inner = range(self.lowest, loop.schedule.steps)
        self.predictor_rows = loop.rows(_predictors, inner, (-1, 0, 1))
        self.heun_rows = loop.rows(_heun, inner, (-1, 0, 1), self.gamma)

    def terms(self, i: int, z: Tensor, scaled: Tensor | None) -> tuple[list[Any], Row, Output]:
        if i < self.lowest:
            return super().terms(i, z, scaled)
        output = self.loop.evaluate(i, z, scaled)
        row, found = self.predictor_rows[i], []
        for there, weights in ((i - 1, row[:2]), (i + 1, row[2:])):
            predicted, scaled = self.loop.advance([z, output], weights, then=there)
            found.append(self.loop.evaluate(there, predicted, scaled))
        below, above = found
        # A step takes only one pair of outputs, and one changed by a guide.
        guidance = self.loop.guidance_scale
        return [whole(output, guidance), whole(below, guidance), above], self.heun_rows[i], output

    def first_down(self, z: Tensor) -> tuple[Tensor, Output]:
        top = self.loop.schedule.steps
        z, _, output = Steps(self.loop, True, (1.0,) * (top + 1), range(top, top + 1)).step(top, z)
        return z, output


_METHODS: dict[str, type[_Euler]] = {"euler": _Euler, "heun": _Heun}


def euler_weights(prediction: Prediction, below: Level, here: Level, above: Level, gamma: Number) -> Row:
    """Weights of z_i and of the output at z_i in z_{i-1} - gamma·z_{i+1}."""
    (a, b), (c, d) = transfer(here, below), transfer(here, above)
    return folded(read(prediction, here), a - gamma * c, b - gamma * d)


def _predictors(prediction: Prediction, below: Level, here: Level, above: Level) -> Row:
    reading = read(prediction, here)
    return *folded(reading, *transfer(here, below)), *folded(reading, *transfer(here, above))


def _heun(prediction: Prediction, below: Level, here: Level, above: Level, gamma: Number) -> Row:
    """Weights of z_i and of the outputs at z_i and at the two predicted states in z_{i-1} - gamma·z_{i+1}."""
    (z_down, eps_down, output_down), (z_up, eps_up, output_up) = (
        _trapezoid(prediction, here, there) for there in (below, above)
    )
    z, output = folded(read(prediction, here), z_down - gamma * z_up, eps_down - gamma * eps_up)
    return z, output, output_down, -gamma * output_up


def _trapezoid(prediction: Prediction, here: Level, there: Level) -> tuple[Number, Number, Number]:
    """Weights of z, eps and the output at the predicted state in Heun's step a·z + b·(eps + eps')/2."""
    a, b = transfer(here, there)
    reading, half = read(prediction, there), b / 2
    if reading.of_state is None:
        return a, half, half * reading.of_output
    seen = half * reading.of_state
    return a + seen * a, half + seen * b, half * reading.of_output
