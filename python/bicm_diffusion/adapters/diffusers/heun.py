"""Heun's method, on levels of noise and on flows: Euler's step, then one from the same state with the mean slope."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.arguments import is_whole, numbers
from bicm_diffusion.adapters.diffusers.churn import Churning
from bicm_diffusion.adapters.diffusers.drawing import Generators, traced
from bicm_diffusion.adapters.diffusers.euler import NO_CHURN, derivative_weights, euler_weights
from bicm_diffusion.adapters.diffusers.halves import FIRST, SECOND, Slopes, kept_sample
from bicm_diffusion.adapters.diffusers.outputs import as_dtype, as_output, as_state
from bicm_diffusion.adapters.diffusers.scheduler import fused
from bicm_diffusion.adapters.diffusers.sigmas import Sigmas, SigmaTables
from bicm_diffusion.adapters.diffusers.tables import Row, Tables
from bicm_kernels import affine_step


@dataclass
class HeunTables(SigmaTables):
    #: `dt` after a first half, by the step.
    lengths: list[Tensor] = field(default_factory=list)
    clip: float | None = None
    #: Whether x0 is what the model predicts, in its dtype, and whether it is that tensor itself.
    predicts_x0: bool = False
    gives_output: bool = False


class Heun(Sigmas, Slopes):
    _kind: ClassVar[type[Tables]] = HeunTables
    _options = ("prediction_type", "clip_sample", "clip_sample_range")
    _remembers = False

    def _scale(self, sigma: float) -> float:
        return 1.0 / math.sqrt(sigma * sigma + 1.0)

    def _uncovered(self) -> str | None:
        prediction = self.config.prediction_type
        known = prediction in ("epsilon", "sample", "v_prediction")
        return None if known else f"prediction_type={prediction!r}"

    def _fill(self, tables: HeunTables) -> None:
        config, count = self.config, min(len(tables.timesteps.values), len(tables.levels) - 1)
        self._fill_scales(tables)
        self._fill_lengths(tables)
        tables.clip = float(config.clip_sample_range) if config.clip_sample else None
        tables.predicts_x0 = config.prediction_type == "sample"
        tables.gives_output = tables.predicts_x0 and tables.clip is None
        tables.put(FIRST, lambda index: self._first_row(tables, index), count)
        tables.put(SECOND, lambda index: self._second_row(tables, index), count)

    def _first_row(self, tables: HeunTables, index: int) -> Row:
        """Weights of sample and output in x0, of these and of x0 in the result, and the inverse of the level."""
        sigma, below = tables.levels[index], tables.levels[index + 1]
        x0_sample, x0_output, of_sample, of_output = euler_weights(self.config.prediction_type, sigma, sigma, below)
        if tables.clip is None:
            return x0_sample, x0_output, of_sample, of_output, 0.0, 1.0 / sigma
        kept = below / sigma
        return x0_sample, x0_output, kept, 0.0, 1.0 - kept, 1.0 / sigma

    def _second_row(self, tables: HeunTables, index: int) -> Row:
        """Weights of sample and output in x0, of these and of x0 in the slope."""
        if index < 1:
            raise ValueError("a second half without a first one")
        below = tables.levels[index]
        x0_sample, x0_output, of_sample, of_output = derivative_weights(self.config.prediction_type, below)
        if tables.clip is None:
            return x0_sample, x0_output, of_sample, of_output, 0.0
        return x0_sample, x0_output, 1.0 / below, 0.0, -1.0 / below

    @fused
    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        graph = traced()
        tables = self._ready(graph)
        if tables is None:
            return None
        index = self._index(timestep)
        state = as_state(sample, model_output)
        half = self._first if self.dt is None else self._second
        result = half(tables, index, state, model_output, sample, graph)
        if result is None:
            return None
        out, x0 = result
        if tables.predicts_x0:  # the output itself, or what is left of it
            x0 = model_output if tables.gives_output else as_dtype(x0, model_output.dtype)
        cls = HeunDiscreteSchedulerOutput
        return as_output(graph, cls, out, "pred_original_sample", x0) if return_dict else (out, x0)

    def _first(self, tables: HeunTables, index: int, state: Tensor, output: Tensor, sample: Tensor, graph: bool) -> Any:
        row: Any = tables.row(FIRST, index, sample.device if graph else None)
        if row is None:
            return None
        x0_sample, x0_output, of_sample, of_output, of_x0, inverse = row
        scale = self._next_scale(tables, index, state.dtype, sample, output, graph)
        terms = [state, output], [x0_sample, x0_output], [of_sample, of_output]
        out, x0 = self._advance(terms, index, state.dtype, scale, x0_weight=of_x0, clip=tables.clip)
        self.sample, holds = sample, state is sample and self._may_hold(graph, sample, output)
        if graph:
            self.dt, self._ended = tables.traced["lengths"][index], out if holds else None
            self.prev_derivative = affine_step([state, output if tables.gives_output else x0], [inverse, -inverse])
            return out, x0
        sigma, below = tables.levels[index], tables.levels[index + 1]
        if holds:
            self._hold(tables.lengths[index], below - sigma, out, x0, (sigma, below, 0.0))
        else:
            slope = affine_step([state, output if tables.gives_output else x0], [inverse, -inverse])
            self._leave(tables.lengths[index], below - sigma, slope)
        return out, x0

    def _second(
        self, tables: HeunTables, index: int, state: Tensor, output: Tensor, sample: Tensor, graph: bool
    ) -> Any:
        row: Any = tables.row(SECOND, index, sample.device if graph else None)
        kept = kept_sample(self.sample, state)
        length: Any = self.dt.to(sample.device, torch.float64) if graph else self._length()
        if row is None or kept is None or length is None:
            return None
        x0_sample, x0_output, of_sample, of_output, of_x0 = row
        half = 0.5 * length
        before = self._earlier(kept, state, state.dtype, half, graph)
        if before is None:
            return None
        tensors, weights, of_state = before
        scale = self._next_scale(tables, index, state.dtype, sample, output, graph)
        terms = (
            [state, output, *tensors],
            [x0_sample, x0_output],
            [half * of_sample + of_state, half * of_output, *weights],
        )
        result = self._advance(terms, index, state.dtype, scale, x0_weight=half * of_x0, clip=tables.clip)
        self._done()
        return result


class FlowMatchHeun(Churning, Slopes):
    _kind: ClassVar[type[Tables]] = HeunTables

    def _fill(self, tables: HeunTables) -> None:
        self._fill_lengths(tables)
        count = min(len(tables.timesteps.values), len(tables.levels) - 1)
        tables.put(FIRST, lambda index: self._whole(tables, index), count)
        # The original divides by the level of the second half.
        tables.put(SECOND, lambda index: (1.0 / tables.levels[index],), count)

    def _whole(self, tables: HeunTables, index: int) -> Row:
        """The length of a step, and the original's divisor."""
        sigma, below = tables.levels[index], tables.levels[index + 1]
        return below - sigma, 1.0 / sigma

    @fused
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        graph = traced()
        churn = s_churn, s_tmin, s_tmax, s_noise
        if not graph and churn != NO_CHURN:
            numbers(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
        tables = self._ready(graph)
        if tables is None or is_whole(timestep):
            return None
        index = self._index(timestep)
        first = self.dt is None
        row: Any = tables.row(FIRST if first else SECOND, index, sample.device if graph else None)
        if row is None:
            return None
        lift = self._lift(tables, index if first else index - 1, *churn[:3]) if s_churn else 0.0
        # The original computes in float32 for every input dtype; only a float64 output keeps its dtype.
        dtype = torch.float64 if model_output.dtype is torch.float64 else torch.float32
        state = sample if sample.dtype is dtype else sample.to(dtype)
        out: Tensor | None
        if first:
            out = self._first(tables, index, row[0], state, model_output, lift, s_noise, generator, graph)
        else:
            out = self._second(state, model_output, lift, generator, graph)
        if out is None:
            return None
        self._step_index = index + 1
        return as_output(graph, FlowMatchHeunDiscreteSchedulerOutput, out) if return_dict else (out,)

    def _first(
        self,
        tables: HeunTables,
        index: int,
        length: Any,
        state: Tensor,
        output: Tensor,
        lift: float,
        s_noise: float,
        generator: Generators,
        graph: bool,
    ) -> Tensor:
        dt: Any = tables.traced["lengths"][index] if graph else tables.lengths[index]
        share = 1.0
        if lift:
            sigma = tables.levels[index]
            raised = sigma * (1.0 + lift)
            deviation = s_noise * math.sqrt(raised**2 - sigma**2)
            state = self._churned(state, output, deviation, index, generator)
            length, share = tables.levels[index + 1] - raised, sigma / raised
            dt = torch.full_like(dt, length)
        out = affine_step([state, output], [1.0, length * share])
        self.sample, whole = state, output.dtype is state.dtype
        holds = whole and self._may_hold(graph, state, output)
        if graph:
            self.dt, self._ended = dt, out if holds else None
            self.prev_derivative = affine_step([output.to(state.dtype)], [share])
        elif holds:
            self._hold(dt, length, out, output, (0.0, 0.0, 1.0 / share))
        else:
            self._leave(dt, length, affine_step([output.to(state.dtype)], [share]))
        return out if whole else out.to(output.dtype)

    def _second(self, state: Tensor, output: Tensor, lift: float, generator: Generators, graph: bool) -> Tensor | None:
        """The sample of a second half cancels in its slope, and so does its noise, which the original draws."""
        kept = kept_sample(self.sample, state)
        length: Any = self.dt.to(state.device, torch.float64) if graph else self._length()
        if kept is None or length is None or kept.dtype is not state.dtype or output.shape != kept.shape:
            return None
        half = 0.5 * length
        before = self._earlier(kept, None, state.dtype, half, graph)
        if before is None:
            return None
        tensors, weights, _ = before
        if lift > 0.0 and self._noise != "keyed":
            self._drawn(output, state, generator)
        out = affine_step([*tensors, output], [*weights, half])
        self._done()
        return out if output.dtype is state.dtype else out.to(output.dtype)
