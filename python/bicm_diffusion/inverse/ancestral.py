"""Shared by solvers on a `Schedule`: their options, and corrections as shifts of the denoised sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypedDict

from torch import Tensor

from bicm_diffusion.inverse.distances import Distance
from bicm_diffusion.inverse.problem import Integer, Operator, Problem, check_size, step_size
from bicm_diffusion.samplers.ancestral import Ancestral
from bicm_diffusion.samplers.guide import Guide, Shift
from bicm_diffusion.samplers.loop import Callback, Loop, Model
from bicm_diffusion.samplers.prediction import Number, Prediction
from bicm_diffusion.schedules import Schedule


class SolverOptions(TypedDict, total=False):
    """The keyword arguments of every solver on a `Schedule`; `operator` and `y` are required.

    operator: called as `operator(x0)` with x0 (B, …), returns the prediction of y; any function that torch
        differentiates. y: the measurement (B, …). A solver's result for a sample does not depend on its batch where
        operator and model do not.
    distance: "norm" (the default, not squared), "half_squared", "mse", "cross_entropy" (operator returns logits, y
        holds classes), or a function of (operator(x0), y) that returns (B,).
    scale: ζ, the size of a correction; a number, a tensor (B,), or a function of the noise levels sigma and sigma' (in
        units of x0) at both ends of the step.
    seed, sample_id: key of all noise, apart from that of `bicm_kernels.normal` with the same seed; 0 by default.
    prediction, guidance_scale, extra_args, callback, progress: as for samplers, see `bicm_diffusion.Options`.
    """

    operator: Operator
    y: Tensor
    distance: Distance
    scale: Number | Callable[..., Number]
    seed: Integer
    sample_id: Integer
    prediction: Prediction
    guidance_scale: Number | None
    extra_args: Mapping[str, Any] | None
    callback: Callback | None
    progress: bool


class Run(Loop):
    """One run of a solver: ancestral steps, guided towards the measurement."""

    def __init__(
        self,
        name: str,
        model: Model,
        z: Tensor,
        schedule: Schedule,
        *,
        operator: Operator | None = None,
        y: Tensor | None = None,
        distance: Distance = "norm",
        scale: Number | Callable[..., Number] = 1.0,
        seed: Integer = 0,
        sample_id: Integer = 0,
        prediction: Prediction = "noise",
        guidance_scale: Number | None = None,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__(
            name,
            model,
            z,
            schedule,
            prediction=prediction,
            guidance_scale=guidance_scale,
            extra_args=extra_args,
            callback=callback,
            progress=progress,
        )
        if schedule.straight is not None:
            raise ValueError("schedule: expected alpha > 0, since fresh noise is added, got alpha = 0 at its end")
        self.problem = Problem(operator, y, distance, z, seed, sample_id)
        check_size("scale", scale, len(z))
        self.scale, self.seed, self.sample_id = scale, seed, sample_id

    @contextmanager
    def guided(self, guide: Guide) -> Iterator[Ancestral]:
        """The steps with a guide, which refers to the run, until they are taken."""
        self.guide = guide
        try:
            yield Ancestral(self, self.seed, self.sample_id)
        finally:
            self.guide = None

    def solve(self, z: Tensor, guide: Guide) -> Tensor:
        """Return z_0 from z_N."""
        with self.guided(guide) as steps:
            return steps.walk(z)

    def level(self, i: int) -> float:
        """The noise level at index i, in units of x0."""
        return self.schedule.sigma[i] / self.schedule.alpha[i]

    def size(self, i: int) -> Any:
        """ζ of the step from index i."""
        return step_size("scale", self.scale, len(self.problem.y), self.level(i), self.level(i - 1))

    def moved(self, i: int, direction: Tensor) -> Shift:
        """Return the shift that moves the next state by -ζ·direction, where D has weight α'·(1 - ρ)."""
        ratio = self.level(i - 1) / self.level(i)
        return Shift(direction, -self.size(i) / (self.schedule.alpha[i - 1] * (1.0 - ratio * ratio)))
