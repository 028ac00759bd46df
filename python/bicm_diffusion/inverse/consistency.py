"""Solvers with a consistency model, whose samples resemble data more than the posterior mean does (CM-DIS)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import torch
from torch import Tensor

from bicm_diffusion.consistency.schedules import ConsistencySchedule
from bicm_diffusion.inverse.ancestral import Run, SolverOptions
from bicm_diffusion.inverse.distances import Distance
from bicm_diffusion.inverse.problem import (
    Integer,
    Operator,
    Problem,
    check_count,
    check_radius,
    check_size,
    gradient,
    leaf,
    step_size,
)
from bicm_diffusion.keys import CM_INVERSION
from bicm_diffusion.samplers import checks
from bicm_diffusion.samplers.consistency import Callback, Leap, LeapInfo, shown
from bicm_diffusion.samplers.guide import Evaluation, Shift
from bicm_diffusion.samplers.loop import Model
from bicm_diffusion.samplers.prediction import Number
from bicm_diffusion.samplers.signature import sampler
from bicm_diffusion.schedules import Schedule
from bicm_kernels import add_noise, affine_step, denoise, fold_in, renoise, scale_input

if TYPE_CHECKING:
    from typing_extensions import Unpack

Parameterization: TypeAlias = Literal["bcm", "cm", "x0"]
_FORMS = ("bcm", "cm", "x0")


class CleanModel:
    """A consistency model f(x, t), called according to its parameterization."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        parameterization: Parameterization,
        sigma_data: float,
        t_min: float,
        extra_args: Mapping[str, Any] | None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"consistency_model: expected a function or module, got {checks.described(model)}")
        if parameterization not in _FORMS:
            raise ValueError(f"parameterization: expected one of {_FORMS}, got {parameterization!r}")
        checks.check_arguments("extra_args", extra_args)
        self.model, self.form, self.extra_args = model, parameterization, extra_args or {}
        self.sigma_data, self.t_min = sigma_data, t_min
        self.answer: type | None = None

    def ask(self, x: Tensor, t: float) -> Tensor:
        """Return the network's output at x at level t."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        levels = (t, self.t_min) if self.form == "bcm" else (t,)
        times = [torch.full(x.shape[:1], level, dtype=dtype, device=x.device) for level in levels]
        given = x if self.form == "x0" else scale_input(x, t, sigma_data=self.sigma_data)
        output = self.model(given, *times, **self.extra_args)
        if type(output) is not self.answer:
            checks.check_output(output, x)
            self.answer = type(output)
        return output

    def clean(self, x: Tensor, t: float, output: Tensor) -> Tensor:
        """Return f(x, t) in x's dtype from the network's output; differentiable by kernels."""
        if self.form == "x0":
            return output.to(x.dtype)
        numbers: Any = {"parameterization": self.form, "sigma_data": self.sigma_data, "sigma_min": self.t_min}
        return denoise(x, output, t, **numbers)

    def renoised(self, x: Tensor, t: float, output: Tensor, sigma: float, **key: Any) -> Tensor:
        """Return f(x, t) + sigma·n in one launch."""
        if self.form == "x0":
            return add_noise(output.to(x.dtype), sigma, **key)
        numbers: Any = {"parameterization": self.form, "sigma_data": self.sigma_data, "sigma_min": self.t_min}
        return renoise(x, output, t, None, sigma, **key, **numbers)[0]


@sampler(Run)
def cm_posterior_sample(
    model: Model,
    z: Tensor,
    schedule: Schedule,
    *,
    consistency_model: Callable[..., Tensor],
    tau: float = 0.0,
    parameterization: Parameterization = "bcm",
    sigma_data: float = 0.5,
    t_min: float = 0.002,
    consistency_args: Mapping[str, Any] | None = None,
    **options: Unpack[SolverOptions],
) -> Tensor:
    """Return samples with operator(x0) near y by DPS whose distance is measured at f(x, σ) + τ·n (CM-DIS, Alg. 2).

    The ancestral mean uses the denoised sample of `model`, without gradients. tau: τ ≥ 0, the standard
    deviation of the noise added to the consistency model's result.
    consistency_model: with parameterization "bcm" called as `consistency_model(c_in(t)·x, t, t_min, …)` and with "cm"
    as `consistency_model(c_in(t)·x, t, …)`, returning the raw output F; with "x0" as `consistency_model(x, t, …)`,
    returning f(x, t) itself; … are consistency_args. It may be the network that `model` calls. x is z/alpha and t is
    sigma/alpha. z, model, options and errors: as for `dps_sample`.

    >>> import torch
    >>> from bicm_diffusion import karras_schedule
    >>> half = dict(operator=lambda x0: x0[:, :1], y=torch.ones(1, 1), consistency_model=lambda x, t, u: x)
    >>> cm_posterior_sample(lambda z, t: z / (1 + t), torch.ones(1, 2), karras_schedule(4, t_max=3.0), **half).shape
    torch.Size([1, 2])
    """
    run = Run("cm_posterior_sample", model, z, schedule, **options)
    check_radius("tau", tau)
    clean = CleanModel(consistency_model, parameterization, sigma_data, t_min, consistency_args)

    def guide(at: Evaluation) -> Shift:
        i, state, t = at.index, leaf(at.z), run.level(at.index)
        x = state if schedule.alpha[i] == 1.0 else affine_step([state], [1.0 / schedule.alpha[i]])
        found = run.problem.measure(clean.clean(x, t, clean.ask(x, t)), tau, i, range(1))
        return run.moved(i, gradient(found, state))

    return run.solve(z, guide)


class InversionOptions(TypedDict, total=False):
    """The keyword arguments of `cm_inversion_sample` that it shares with the other solvers; see `SolverOptions`."""

    operator: Operator
    y: Tensor
    distance: Distance
    seed: Integer
    sample_id: Integer
    extra_args: Mapping[str, Any] | None
    callback: Callback | None
    progress: bool


def _options(
    *,
    operator: Operator | None = None,
    y: Tensor | None = None,
    distance: Distance = "norm",
    seed: Integer = 0,
    sample_id: Integer = 0,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> None:
    """The fields of `**options`, for signatures."""


@sampler(_options)
def cm_inversion_sample(
    consistency_model: Callable[..., Tensor],
    z: Tensor,
    schedule: ConsistencySchedule,
    *,
    iterations: int = 10,
    rate: Number | Callable[[float], Number] = 1.0,
    tau: float = 0.0,
    parameterization: Parameterization = "bcm",
    **options: Unpack[InversionOptions],
) -> Tensor:
    """Return samples with operator(x0) near y by inverting a consistency model at each level (CM-DIS, Alg. 4).

    At a level t: `iterations` times x ← x - η·∇_x ΣΔ(operator(f(x, t) + τ·n), y) with new n each time; then
    x ← f(x, t) + √(t'² - t_min²)·n at the next level t', and f(x, t) at the last one.
    z: (B, …) at the schedule's first level, any floating dtype; the result has its shape and dtype. rate: η, a number,
    a tensor (B,) or a function of t. tau: τ ≥ 0. consistency_model and parameterization: as for `cm_posterior_sample`,
    its keyword arguments being extra_args. callback: called with a `LeapInfo` after every level. The other options: see
    `SolverOptions`. Takes iterations + 1 evaluations a level.
    Raises TypeError for arguments of another kind, and ValueError for zigzags or shapes that do not fit.

    >>> from bicm_diffusion import ConsistencySchedule
    >>> half = dict(operator=lambda x0: x0[:, :1], y=torch.ones(1, 1))
    >>> cm_inversion_sample(lambda x, t, u: x, torch.ones(1, 2), ConsistencySchedule((80.0, 1.2)), **half).shape
    torch.Size([1, 2])
    """
    checks.check_state("z", z)
    if not isinstance(schedule, ConsistencySchedule):
        raise TypeError(f"schedule: expected a ConsistencySchedule, got {checks.described(schedule)}")
    if schedule.zigzags:
        raise ValueError(f"schedule: CM inversion makes no zigzags, got {schedule.zigzags}")
    check_count("iterations", iterations)
    check_radius("tau", tau)
    check_size("rate", rate, len(z))
    callback, seed, sample_id = options.get("callback"), options.get("seed", 0), options.get("sample_id", 0)
    checks.check_callback(callback)
    problem = Problem(options.get("operator"), options.get("y"), options.get("distance", "norm"), z, seed, sample_id)
    form, end = parameterization, schedule.t_min
    clean = CleanModel(consistency_model, form, schedule.sigma_data, end, options.get("extra_args"))
    key, x, levels = fold_in(seed, CM_INVERSION), z, [*schedule.levels, end]
    leaps = [Leap(t, end, max(below * below - end * end, 0.0) ** 0.5, below) for t, below in pairwise(levels)]
    for place, leap in enumerate(shown(leaps, options.get("progress", False))):
        t = leap.start
        for k in range(iterations):
            state = leaf(x)
            with torch.enable_grad():
                found = problem.measure(clean.clean(state, t, clean.ask(state, t)), tau, place, range(k, k + 1))
            x = affine_step([x, gradient(found, state)], [1.0, -step_size("rate", rate, len(z), t)])
        output = clean.ask(x, t)
        if leap.noise:
            x = clean.renoised(x, t, output, leap.noise, seed=key, step=place, sample_id=sample_id)
        else:
            x = clean.clean(x, t, output)
        if callback is not None:
            callback(LeapInfo(leap, x, output))
    return x
