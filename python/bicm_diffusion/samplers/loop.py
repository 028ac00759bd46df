"""Shared by every sampler's loop: the model's call, tables of coefficients, the fused step, the callback.

Every sampler is a loop over the indices of a `Schedule`: per evaluation of the model one fused op, whose weights are
formed in float64 and rounded once. In an eager loop the weights are Python floats, which a captured graph stores as
arguments of its launches; in a traced loop they are rows of float64 tables on the state's device, made from
`Schedule.table`, so that another schedule of as many steps runs in the same graph. No gradients are recorded, unless
a guide requests them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor

from bicm_diffusion.extras import extra
from bicm_diffusion.samplers import checks
from bicm_diffusion.samplers.guide import Changed, Evaluation, Guide, Plain, Sum, asked, changed, check_guide, opened
from bicm_diffusion.samplers.prediction import (
    Level,
    Number,
    Preconditioned,
    Prediction,
    denoised_weights,
    known_prediction,
)
from bicm_diffusion.schedules import Schedule
from bicm_kernels import affine_step, denoise, denoised_step, scale_input

#: A model's output, possibly changed by a guide.
Output: TypeAlias = Tensor | tuple[Tensor, Tensor] | Changed
Model: TypeAlias = Callable[..., Tensor | tuple[Tensor, Tensor]]
Row: TypeAlias = tuple[Number, ...]

traced = torch.compiler.is_compiling


@dataclass(frozen=True)
class StepInfo:
    """The argument of a callback: the index just reached, the state there, and the model's last output."""

    index: int
    z: Tensor
    eps: Tensor | tuple[Tensor, Tensor]


Callback: TypeAlias = Callable[[StepInfo], object]


class Options(TypedDict, total=False):
    """The keyword arguments of every sampler.

    model, the samplers' first argument, is called as `model(z, times, **extra_args)` with z (B, …) and times (B,),
    float64 for a float64 state and float32 otherwise; it returns its prediction (B, …).
    prediction: the model's prediction type: "noise" (the default; "epsilon" is the same), "v", "x0", "flow" (n - x), or
        a `Preconditioned`.
    guidance_scale: the model returns a pair (uncond, cond), and uncond + guidance_scale·(cond - uncond) is formed
        inside the step op; a float or (B,).
    extra_args: keyword arguments of the model.
    guide: called with an `Evaluation` for every evaluation of the model, with gradients enabled; it returns the
        replacement of the model's denoised sample, a `Shift` of it, or None for no change.
    callback: called with a `StepInfo` after every step.
    progress: True shows a progress bar (needs tqdm).
    """

    prediction: Prediction
    guidance_scale: Number | None
    extra_args: Mapping[str, Any] | None
    guide: Guide | None
    callback: Callback | None
    progress: bool


class Loop:
    """One run of a sampler: the values that do not change between steps."""

    def __init__(
        self,
        name: str,
        model: Model,
        z: Tensor,
        schedule: Schedule,
        *,
        prediction: Prediction = "noise",
        guidance_scale: Number | None = None,
        extra_args: Mapping[str, Any] | None = None,
        guide: Guide | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> None:
        checks.check_model(model)
        checks.check_state("z", z)
        checks.check_schedule(schedule)
        # What guides see: of a flow that begins at alpha = 0, steps are taken in variables with another alpha.
        alpha = schedule.table[1].to(z.device) if traced() else schedule.alpha
        schedule, prediction = along_lines(schedule, known_prediction(prediction))
        checks.check_guidance(guidance_scale, len(z))
        checks.check_arguments("extra_args", extra_args)
        check_guide(guide)
        checks.check_callback(callback)
        self.name, self.model, self.schedule, self.prediction = name, model, schedule, prediction
        self.alpha: Sequence[float] | Tensor = alpha
        self.guidance_scale, self.extra_args = guidance_scale, extra_args or {}
        self.guide, self.callback, self.progress = guide, callback, progress
        # A guide that differentiates the model computes its input again.
        self.tracks = False
        self.times_dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        self.device = z.device
        self.table = schedule.table.to(z.device) if traced() else None
        self.times: tuple[Tensor, ...] = ()
        self.answer: type | None = None

    def rows(
        self, formula: Callable[..., Row], indices: range, offsets: Sequence[int], *numbers: Number | Sequence[Number]
    ) -> dict[int, Row]:
        """Return formula(prediction, levels at index + offset …, *numbers) for every index of an ascending range.

        A formula is arithmetic that holds for floats, for 0-d and for (B,) tensors. numbers: one for all indices, or
        N + 1 of them, one per index.
        """
        table = self.table
        if not indices:
            return {}
        if table is None:
            known = {i: self._level(i) for i in range(indices.start + min(offsets), indices.stop + max(offsets))}
            return {
                i: formula(
                    self.prediction,
                    *[known[i + k] for k in offsets],
                    *[n[i] if isinstance(n, Sequence) else n for n in numbers],
                )
                for i in indices
            }
        low, high = indices.start, indices.stop
        levels = [Level(*table[:, low + k : high + k].unbind()) for k in offsets]
        across = [_column(n, low, high, table) for n in numbers]
        whole = torch.ones_like(table[0, low:high])
        columns = [(c * whole).unbind(-1) for c in formula(self.prediction, *levels, *across)]
        return {i: tuple(column[i - low] for column in columns) for i in indices}

    def _level(self, i: int) -> Level:
        return Level(self.schedule.times[i], self.schedule.alpha[i], self.schedule.sigma[i])

    def input_scale(self, i: int, lift: float = 1.0) -> Number | None:
        """The scale from a state at index i to the model's input; None where they are the same."""
        if not isinstance(self.prediction, Preconditioned):
            return None
        level = self._level(i) if self.table is None else Level(*self.table[:, i].unbind())
        return self.prediction.input_scale(level._replace(sigma=level.sigma * lift))

    def evaluate(self, i: int, z: Tensor, scaled: Tensor | None = None, *, lift: float = 1.0) -> Output:
        """Return the model's output at z with the time of index i, and with the guide's change.

        scaled: the model's input, if an earlier launch computed it; lift: a factor of the time and of sigma.
        """
        if self.guide is None:
            return self._ask(i, z, scaled, lift)
        level = self._level(i) if self.table is None else Level(*self.table[:, i].unbind())
        level = Level(level.time * lift, level.alpha, level.sigma * lift)
        # This op's derivative is a kernel; affine_step's is the reference.
        form = self.prediction if self.table is None and level.alpha == 1.0 else None
        of_state, of_output = denoised_weights(self.prediction, level)

        def ask(z: Tensor, tracked: bool) -> Output:
            if not tracked:
                return self._ask(i, z, scaled, lift)
            own = scale_input(z, level.sigma, sigma_data=form.sigma_data) if isinstance(form, Preconditioned) else None
            return self._ask(i, z, own, lift)

        def denoised(z: Tensor, output: Any) -> Tensor:
            if self.prediction == "x0" and isinstance(output, Tensor):
                return output.to(z.dtype)
            if isinstance(form, Preconditioned) and isinstance(output, Tensor):
                numbers: Any = {"parameterization": form.parameterization, "sigma_min": form.t_min}
                return denoise(z, output, level.sigma, sigma_data=form.sigma_data, **numbers)
            if z.requires_grad and isinstance(output, Tensor):
                return Sum.apply(of_state, of_output, z, output)
            return affine_step([z, output], [of_state, of_output], guidance_scale=self.guidance_scale)

        z = z.detach() if z.requires_grad else z
        at = Evaluation(i, level.time, self.alpha[i], level.sigma, z, Plain(ask, denoised))
        change = asked(self.guide, at)
        self.tracks = at.was_tracked
        return at.output if change is None else changed(change, at, of_state, of_output)

    def _ask(self, i: int, z: Tensor, scaled: Tensor | None, lift: float) -> Tensor | tuple[Tensor, Tensor]:
        if self.table is None:
            times = self._times(i, lift, z)
        else:
            times = (self.table[0, i] * lift).to(self.times_dtype).expand(z.shape[0])
        if scaled is None:
            scale = self.input_scale(i, lift)
            scaled = z if scale is None else affine_step([z], [scale])
        output = self.model(scaled, times, **self.extra_args)
        if type(output) is not self.answer:  # checked once: a model's output type does not change
            checks.check_output(output, z, self.guidance_scale)
            self.answer = type(output)
        return output

    def _times(self, i: int, lift: float, z: Tensor) -> Tensor:
        if lift != 1.0 or not z.is_cpu:  # copying a table from the host would sync, or break a capture
            return torch.full(z.shape[:1], self.schedule.times[i] * lift, dtype=self.times_dtype, device=z.device)
        if not self.times:
            self.times = torch.tensor(self.schedule.times, dtype=self.times_dtype)[:, None].repeat(1, len(z)).unbind()
        return self.times[i]

    def advance(
        self, tensors: Sequence[Any], weights: Sequence[Number], *, then: int | None = None, guided: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return Σ w_k·x_k, and the model's input for the next evaluation, at index `then`.

        guided: the last tensor is an output of the model, a pair under guidance.
        """
        guidance = self.guidance_scale if guided else None
        if self.guide is not None and guided:
            tensors, (weights,), guidance = opened(tensors, [weights], guidance)
            then = None if self.tracks else then
        scale = None if then is None else self.input_scale(then)
        if scale is not None:
            # The sum is formed as x0, so that the op also returns the scaled input and writes nothing unused.
            nothing = [0.0] * len(weights)
            scaled, out, _ = denoised_step(tensors, weights, nothing, x0_weight=scale, guidance_scale=guidance)
            return out, scaled
        return affine_step(tensors, weights, guidance_scale=guidance), None

    def advance_with_noise(
        self, tensors: Sequence[Any], weights: Sequence[Number], noise: Mapping[str, Any], then: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the same with noise of a weight and key added last."""
        tensors, (weights,), guidance = opened(tensors, [weights], self.guidance_scale)
        scale = None if then is None or self.tracks else self.input_scale(then)
        if scale is None:
            return affine_step(tensors, weights, guidance_scale=guidance, **noise), None
        last = {"x0_weight": 0.0, "next_scale": scale, "guidance_scale": guidance, **noise}
        out, _, scaled = denoised_step(tensors, [0.0] * len(weights), weights, **last)
        return out, scaled

    def report(self, index: int, z: Tensor, output: Output) -> None:
        """Call the callback after a step."""
        if self.callback is not None:
            self.callback(StepInfo(index, z, output.answer if isinstance(output, Changed) else output))

    def steps(self, indices: range) -> Iterable[int]:
        """Return the indices, with an optional progress bar."""
        if not self.progress:
            return indices
        with extra("diffusion", "or pass progress=False"):
            from tqdm import tqdm

        return tqdm(indices, unit="step")


def _column(number: Number | Sequence[Number], low: int, high: int, table: Tensor) -> Number:
    """A number of a formula, broadcast against columns of levels: (B, 1) where it is per sample."""
    if isinstance(number, Sequence):
        return torch.stack([torch.ones_like(table[0, 0]) * x for x in number[low:high]])
    if isinstance(number, Tensor) and number.dim():
        return number.to(table.dtype).unsqueeze(-1)
    return number


def along_lines(schedule: Schedule, prediction: Prediction) -> tuple[Schedule, Prediction]:
    """Return a flow schedule that begins at alpha = 0 in the variables of dz/dt = v, where Euler's step is defined.

    There the noise prediction would be 0/0, but v is the model's output. Other schedules are returned unchanged.
    Raises ValueError for another prediction type at alpha = 0.
    """
    if schedule.straight is None:
        return schedule, prediction
    if prediction != "flow":
        raise ValueError(
            f"schedule: expected alpha > 0 for prediction={prediction!r}, got alpha = 0 at index {schedule.steps}; "
            "only prediction='flow' is defined there"
        )
    return schedule.straight, "noise"


def transfer(here: Level, there: Level) -> tuple[Number, Number]:
    """Return a and b of the DDIM step a·z + b·eps from one level to another, in either direction (BDIA eq. 6)."""
    a = there.alpha / here.alpha
    return a, there.sigma - here.sigma * a
