"""Sampling and inversion with a bidirectional consistency model: a few leaps along the trajectory.

Every function here converts its schedule to a list of leaps: one evaluation and one fused op per leap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypedDict

import torch
from torch import Tensor

from bicm_diffusion.consistency import frozen
from bicm_diffusion.consistency.schedules import PRESETS, ConsistencySchedule
from bicm_diffusion.described import described
from bicm_diffusion.extras import extra
from bicm_diffusion.keys import CONSISTENCY_INVERSION, CONSISTENCY_SAMPLING
from bicm_diffusion.samplers import checks
from bicm_diffusion.samplers.guide import Evaluation, Guide, Plain, Shift, asked, check_guide
from bicm_diffusion.samplers.prediction import Number
from bicm_diffusion.samplers.signature import sampler
from bicm_kernels import add_noise, denoise, denoised_step, fold_in, renoise, scale_input

if TYPE_CHECKING:
    from typing_extensions import Unpack

ConsistencyModel: TypeAlias = Callable[..., Tensor]


#: The noise added between leaps: new each time, the same every time, or the initial x/T.
Noise: TypeAlias = Literal["fresh", "fixed", "initial"]
NOISES = ("fresh", "fixed", "initial")

#: How the message ends for a network that takes no u.
_OF_ONE_TIME = "lambda x, t, u: network(x, t) ignores u"


class Leap(NamedTuple):
    """One evaluation, from level `start` to `stop`, then noise of level `noise`, which gives level `level`."""

    start: float
    stop: float
    noise: float
    level: float


@dataclass(frozen=True)
class LeapInfo:
    """The argument of a callback: the leap just made, the resulting state (with its noise), and the model's output."""

    leap: Leap
    x: Tensor
    F: Tensor


Callback: TypeAlias = Callable[[LeapInfo], object]


class LeapOptions(TypedDict, total=False):
    """The keyword arguments of every function here.

    seed, sample_id: key of the fresh noise, apart from that of `bicm_kernels.normal` with the same seed; 0 by default.
    extra_args: keyword arguments of the model.
    guide: called with an `Evaluation` for every evaluation of the model, with gradients enabled; it returns the
        replacement of the leap's result before noise is added, a `Shift` of it, or None for no change.
    callback: called with a `LeapInfo` after every evaluation.
    progress: True shows a progress bar (needs tqdm).
    """

    seed: int
    sample_id: int | Tensor
    extra_args: Mapping[str, Any] | None
    guide: Guide | None
    callback: Callback | None
    progress: bool


def _options(
    *,
    seed: int = 0,
    sample_id: int | Tensor = 0,
    extra_args: Mapping[str, Any] | None = None,
    guide: Guide | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> None:
    """The fields of `**options`, for signatures."""


@sampler(_options)
def consistency_sample(
    model: ConsistencyModel,
    x: Tensor,
    schedule: ConsistencySchedule,
    *,
    noise: Noise = "fresh",
    **options: Unpack[LeapOptions],
) -> Tensor:
    """Return samples at t_min: leaps through the levels (BCM Alg. 2), then the zigzags, if any (Alg. 3 and 4).

    A zigzag (ε, t) adds noise of level ε to the sample, amplifies it to t by the model, and leaps back to t_min.
    One level and no zigzag is 1-step sampling. Takes one evaluation per level and two per zigzag.

    model: a network of two times, called as model(c_in(t)·x, t, u, **extra_args) with t and u (B,), float64 for a
        float64 state and float32 otherwise. Returns F (B, …): c_skip·x + c_out·F is the state at u (BCM eq. 20,
        `bicm_kernels.denoise`). One of a single time samples by `consistency_multistep_sample`.
    x: (B, …), any floating dtype, at the schedule's first level T, such as T·n; the result has its shape and dtype.
    schedule: a `ConsistencySchedule` with the t_min and sigma_data of the training; `PRESETS` has the papers' by name.
    noise: of the zigzags, "fresh" for each one (the default), "fixed", the same in all of them, or "initial",
        x/T; the last two are the baselines of BCM fig. 3c.
    options: see `LeapOptions`.
    Raises TypeError for arguments of another kind and a model that takes others, and ValueError for an unknown noise.

    >>> from bicm_diffusion import ConsistencySchedule
    >>> consistency_sample(lambda x, t, u: x, 80 * torch.ones(1, 2), ConsistencySchedule((80.0, 1.2))).shape
    torch.Size([1, 2])
    """
    _check(model, x, schedule, noise)
    stops = [*schedule.levels[1:], schedule.t_min]
    leaps = [Leap(start, stop, 0.0, stop) for start, stop in zip(schedule.levels, stops, strict=True)]
    for amount, level in schedule.zigzags:
        leaps[-1] = leaps[-1]._replace(noise=amount, level=amount)
        leaps += [Leap(amount, level, 0.0, level), Leap(level, schedule.t_min, 0.0, schedule.t_min)]
    return _follow(model, x, leaps, schedule, CONSISTENCY_SAMPLING, noise, **options)


@sampler(_options)
def consistency_multistep_sample(
    model: ConsistencyModel,
    x: Tensor,
    schedule: ConsistencySchedule,
    *,
    noise: Noise = "fresh",
    **options: Unpack[LeapOptions],
) -> Tensor:
    """Return samples at t_min by CM's multistep sampling: x_τ = f(x, t, t_min) + √(τ² - t_min²)·n, level by level.

    Unlike a zigzag it replaces all of the noise, and with it the sample's content. The last leap adds none.

    model: as for `consistency_sample`; u is always t_min. So a network of a single time that was trained with
        parameterization="cm" is `lambda x, t, u: network(x, t)`: where c_in·x has unit size, a leap differs by at most
        t_min from `bicm_kernels.denoise(x, F, t, parameterization="cm")`.
    x: (B, …), any floating dtype, at the schedule's first level T, such as T·n; the result has its shape and dtype.
    schedule: a `ConsistencySchedule` without zigzags, with the t_min and sigma_data of the training.
    noise: as for `consistency_sample`; "initial" is the baseline of BCM fig. 3c.
    options: see `LeapOptions`.
    Raises TypeError for arguments of another kind and a model that takes others, and ValueError for an unknown noise or
    a schedule with zigzags.

    >>> from bicm_diffusion import ConsistencySchedule
    >>> consistency_multistep_sample(lambda x, t, u: x, 80 * torch.ones(1, 2), ConsistencySchedule((80.0, 1.2))).shape
    torch.Size([1, 2])
    """
    _check(model, x, schedule, noise)
    if schedule.zigzags:
        raise ValueError(f"schedule: multistep sampling makes no zigzags, got {schedule.zigzags}")
    end = schedule.t_min
    leaps = [
        Leap(level, end, math.sqrt(following**2 - end**2), following) for level, following in pairwise(schedule.levels)
    ]
    leaps.append(Leap(schedule.levels[-1], end, 0.0, end))
    return _follow(model, x, leaps, schedule, CONSISTENCY_SAMPLING, noise, **options)


@sampler(_options)
def consistency_invert(
    model: ConsistencyModel,
    x: Tensor,
    schedule: ConsistencySchedule,
    **options: Unpack[LeapOptions],
) -> Tensor:
    """Return the noise of clean samples x at the schedule's first level, its levels in reverse (BCM Alg. 5).

    Noise of the lowest level ε is added first, x_ε = x + ε·n; then every leap goes one level up. Takes one evaluation
    less than there are levels. Two images to interpolate between need different noise: another seed or sample_id.

    model: as for `consistency_sample`; here u > t.
    x: clean samples (B, …), any floating dtype; the result has its shape and dtype.
    schedule: a `ConsistencySchedule` of at least two levels, without zigzags.
    options: see `LeapOptions`.
    Raises TypeError for arguments of another kind and a model that takes others, and ValueError where the schedule has
    zigzags or fewer than two levels.

    >>> from bicm_diffusion import ConsistencySchedule
    >>> consistency_invert(lambda x, t, u: x, torch.ones(1, 2), ConsistencySchedule((80.0, 6.0, 0.07))).shape
    torch.Size([1, 2])
    """
    _check(model, x, schedule, "fresh")
    levels = schedule.levels[::-1]
    if schedule.zigzags or len(levels) < 2:
        raise ValueError(f"schedule: inversion needs at least two levels and no zigzags, got {schedule}")
    leaps = [Leap(low, high, 0.0, high) for low, high in pairwise(levels)]
    seed = fold_in(options.get("seed", 0), CONSISTENCY_INVERSION)
    x = add_noise(x, levels[0], seed=seed, sample_id=options.get("sample_id", 0))
    return _follow(model, x, leaps, schedule, CONSISTENCY_INVERSION, "fresh", **options)


def _check(model: object, x: object, schedule: object, noise: object) -> None:
    checks.check_model(model, "model(c_in(t)·x, t, u)")
    checks.check_state("x", x)
    if not isinstance(schedule, ConsistencySchedule):
        known = isinstance(schedule, str) and schedule in PRESETS
        made = f"PRESETS[{schedule!r}] is one" if known else "ConsistencySchedule(levels) makes one"
        raise TypeError(f"schedule: expected a ConsistencySchedule, got {described(schedule)}; {made}")
    if noise not in NOISES:
        raise ValueError(f"noise: expected one of {', '.join(map(repr, NOISES))}, got {noise!r}")


def _follow(
    model: ConsistencyModel,
    x: Tensor,
    leaps: Sequence[Leap],
    schedule: ConsistencySchedule,
    purpose: int,
    noise: Noise,
    *,
    seed: int = 0,
    sample_id: int | Tensor = 0,
    extra_args: Mapping[str, Any] | None = None,
    guide: Guide | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    checks.check_arguments("extra_args", extra_args)
    check_guide(guide)
    checks.check_callback(callback)
    network = _Network(model, extra_args or {}, schedule.sigma_data)
    key, data, initial = fold_in(seed, purpose), schedule.sigma_data, x
    # With fixed noise, all zigzags use the first one's.
    shared = next((step for step, leap in enumerate(leaps) if leap.noise), 0)
    scaled, change = scale_input(x, leaps[0].start, sigma_data=data), None
    for step, leap in enumerate(shown(leaps, progress)):
        if guide is None:
            output = network(x, scaled, leap)
        else:
            output, change = network.guided(guide, step, x, scaled, leap)
        fresh: dict[str, Any] = {"seed": key, "step": step if noise == "fresh" else shared, "sample_id": sample_id}
        if change is not None or (noise == "initial" and leap.noise):
            start = (initial, leap.noise / leaps[0].start) if noise == "initial" and leap.noise else None
            x, scaled = _summed(x, output, change, leap, data, start, fresh)
        elif step == len(leaps) - 1:
            x = denoise(x, output, leap.start, leap.stop, sigma_data=data)
        else:
            # The step adds the noise and computes the next evaluation's input; without noise, none is drawn.
            amount: dict[str, Any] = {"next_sigma": leap.level, "sigma_data": data, **fresh}
            x, scaled = renoise(x, output, leap.start, leap.stop, leap.noise, **amount)
        if callback is not None:
            callback(LeapInfo(leap, x, output))
    return x


@dataclass
class _Network:
    """A model as called in a run; its output is checked once."""

    model: ConsistencyModel
    extra_args: Mapping[str, Any]
    sigma_data: float
    answer: type | None = None

    def __call__(self, x: Tensor, scaled: Tensor, leap: Leap) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        t, u = (torch.full(x.shape[:1], level, dtype=dtype, device=x.device) for level in leap[:2])
        output = self._answer(scaled, t, u)
        if type(output) is not self.answer:
            checks.check_output(output, x)
            self.answer = type(output)
        return output

    def _answer(self, scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        try:
            return frozen.asked(self.model, (scaled, t, u), self.extra_args, name="model")
        except TypeError as error:
            if _OF_ONE_TIME not in str(error):
                raise
            # A lambda that ignores u is right where u is always t_min, and leads to wrong samples elsewhere.
            raise TypeError(f"{error}, which consistency_multistep_sample allows") from error

    def guided(
        self, guide: Guide, step: int, x: Tensor, scaled: Tensor, leap: Leap
    ) -> tuple[Tensor, Tensor | Shift | None]:
        """Return the output, and the guide's change of it."""

        def ask(z: Tensor, tracked: bool) -> Tensor:
            return self(z, scale_input(z, leap.start, sigma_data=self.sigma_data) if tracked else scaled, leap)

        def reached(z: Tensor, output: Tensor) -> Tensor:
            return denoise(z, output, leap.start, leap.stop, sigma_data=self.sigma_data)

        z = x.detach() if x.requires_grad else x
        at = Evaluation(step, leap.start, 1.0, leap.start, z, Plain(ask, reached))
        change = asked(guide, at)
        return at.output, change


def _summed(
    x: Tensor,
    output: Tensor,
    change: Tensor | Shift | None,
    leap: Leap,
    data: float,
    initial: tuple[Tensor, float] | None,
    fresh: Mapping[str, Any],
) -> tuple[Tensor, Any]:
    """The step of `renoise` with a guide's change, or with the initial noise instead of new noise."""
    t, u = leap.start, leap.stop
    total = data * data + t * t
    weights: list[Number]
    tensors, weights = [x, output], [(data * data + t * u) / total, data * (t - u) / math.sqrt(total)]
    if isinstance(change, Shift):
        tensors, weights = [*tensors, change.direction], [*weights, change.weight]
    elif change is not None:
        tensors, weights = [change.to(x.dtype)], [1.0]
    noise_weight = leap.noise
    if initial is not None:
        tensors, weights, noise_weight = [*tensors, initial[0]], [*weights, initial[1]], 0.0
    scale, nothing = 1.0 / math.sqrt(data * data + leap.level * leap.level), [0.0] * len(weights)
    if noise_weight:
        last: dict[str, Any] = {"x0_weight": 0.0, "next_scale": scale, "noise_weight": noise_weight, **fresh}
        x, _, given = denoised_step(tensors, nothing, weights, **last)
        return x, given
    # The sum is formed as x0, so that the op also returns the scaled input.
    given, x, _ = denoised_step(tensors, weights, nothing, x0_weight=scale)
    return x, given


def shown(leaps: Sequence[Leap], progress: bool) -> Iterable[Leap]:
    """Return the leaps, with an optional progress bar."""
    if not progress:
        return leaps
    with extra("diffusion", "or pass progress=False"):
        from tqdm import tqdm

    return tqdm(leaps, unit="leap")
