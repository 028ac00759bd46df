"""The loop of every solver that walks down a schedule: one ancestral step per evaluation, its correction within it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

from bicm_diffusion.inverse.distances import Distance
from bicm_diffusion.inverse.problem import Integer, Operator, Problem, check_size, step_size
from bicm_diffusion.keys import ANCESTRAL
from bicm_diffusion.samplers.loop import Callback, Loop, Model, Output, Row, transfer
from bicm_diffusion.samplers.prediction import Level, Number, Preconditioned, Prediction, folded, read
from bicm_diffusion.schedules import Schedule
from bicm_kernels import affine_step, denoise, denoised_step, fold_in, scale_input


class SolverOptions(TypedDict, total=False):
    """The keyword arguments that every solver on a `Schedule` takes, beside `operator` and `y`.

    operator: called as `operator(x0)` with x0 (B, …), returns what y is compared with; any function that torch
        differentiates. y: the measurement (B, …). A solver's result for a sample does not depend on its batch where
        operator and model do not.
    distance: "norm" (the default, not squared), "half_squared", "mse", "cross_entropy" (operator returns logits, y
        holds classes), or a function of (operator(x0), y) that returns (B,).
    scale: ζ, the size of a correction; a number, a tensor (B,), or a function of the noise levels sigma and sigma' (in
        units of x0) between which the step leads.
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


class Correction(NamedTuple):
    """weight·direction is added to the state, or with `clean` to the denoised sample that the step leads towards."""

    direction: Tensor
    weight: Number
    clean: bool = False


class Run(Loop):
    """One run of a solver."""

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
        self.key = fold_in(seed, ANCESTRAL)
        indices = range(1, schedule.steps + 1)
        self.rows_down = self.rows(_ancestral, indices, (-1, 0))
        self.clean_rows = self.rows(_clean, indices, (0,))

    def level(self, i: int) -> float:
        """The noise level at index i, in units of x0."""
        return self.schedule.sigma[i] / self.schedule.alpha[i]

    def size(self, i: int) -> Any:
        """ζ of the step from index i."""
        return step_size("scale", self.scale, len(self.problem.y), self.level(i), self.level(i - 1))

    def tracked(self, i: int, z: Tensor) -> tuple[Output, Tensor]:
        """Return the model's output at z and the denoised sample, both differentiable in z."""
        scaled = None
        if isinstance(self.prediction, Preconditioned) and self.schedule.alpha[i] == 1.0:
            # The op that has a kernel for its derivative; affine_step takes the reference.
            scaled = scale_input(z, self.schedule.sigma[i], sigma_data=self.prediction.sigma_data)
        output = self.evaluate(i, z, scaled)
        return output, self.denoised(i, z, output)

    def denoised(self, i: int, z: Tensor, output: Output) -> Tensor:
        """Return the denoised sample, differentiable in z where that is tracked."""
        form = self.prediction
        if isinstance(form, Preconditioned) and isinstance(output, Tensor) and self.schedule.alpha[i] == 1.0:
            return denoise(
                z,
                output,
                self.schedule.sigma[i],
                parameterization=form.parameterization,
                sigma_data=form.sigma_data,
                sigma_min=form.t_min,
            )
        of_z, of_output = self.clean_rows[i]
        return affine_step([z, output], [of_z, of_output], guidance_scale=self.guidance_scale)

    def down(
        self,
        i: int,
        z: Tensor,
        output: Output,
        correction: Correction,
        *,
        key: Integer | None = None,
        ask: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the state at index i - 1 with the correction, in one launch from the model's output.

        ask: return the model's input there too, where the model takes one of its own.
        """
        of_z, of_output, toward, deviation = self.rows_down[i]
        weight = correction.weight * toward if correction.clean else correction.weight
        output = output.detach() if isinstance(output, Tensor) else tuple(x.detach() for x in output)  # type: ignore[assignment]
        tensors, weights = [z, correction.direction, output], [of_z, weight, of_output]
        noise: dict[str, Any] = {
            "noise_weight": deviation,
            "seed": self.key if key is None else key,
            "step": i,
            "sample_id": self.sample_id,
            "guidance_scale": self.guidance_scale,
        }
        scale = self.input_scale(i - 1) if ask and i > 1 else None
        if scale is None:
            return affine_step(tensors, weights, **noise), None
        z, _, scaled = denoised_step(tensors, [0.0] * 3, weights, x0_weight=0.0, next_scale=scale, **noise)
        return z, scaled


def _ancestral(prediction: Prediction, below: Level, here: Level) -> Row:
    """Weights of z_i, the output there, the denoised sample within them, and the noise in an ancestral step.

    In units of x0 it is D + ρ·(x - D) + σ'·√(1 - ρ)·n with ρ = (σ'/σ)²: Euler's step to σ'²/σ, and noise back to σ'.
    """
    ratio = (below.sigma / below.alpha) / (here.sigma / here.alpha)
    lowered = Level(below.time, below.alpha, below.sigma * ratio)
    kept = 1.0 - ratio * ratio
    of_z, of_output = folded(read(prediction, here), *transfer(here, lowered))
    return of_z, of_output, below.alpha * kept, below.sigma * kept**0.5


def _clean(prediction: Prediction, here: Level) -> Row:
    """Weights of z_i and the output there in the denoised sample."""
    of_state, of_output = read(prediction, here)
    lost = 0.0 if of_state is None else here.sigma * of_state
    return (1.0 - lost) / here.alpha, -here.sigma * of_output / here.alpha
