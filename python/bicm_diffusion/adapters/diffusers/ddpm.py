"""DDPM's ancestral step: rows of weights by a timestep's index in the schedule, one launch per step."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.alphas import (
    CANCELS,
    LEAST,
    Alphas,
    AlphaTables,
    quotient,
    reading,
    reading_of_pair,
)
from bicm_diffusion.adapters.diffusers.arguments import host_value
from bicm_diffusion.adapters.diffusers.drawing import Generators, traced
from bicm_diffusion.adapters.diffusers.log_prob import check_states, scheduled
from bicm_diffusion.adapters.diffusers.outputs import as_output, as_state
from bicm_diffusion.adapters.diffusers.scheduler import fused
from bicm_diffusion.adapters.diffusers.sigmas import ROWS
from bicm_diffusion.adapters.diffusers.tables import Row

#: The original's lower bound of the variance.
LEAST_VARIANCE = 1e-20


class Ddpm(Alphas):
    variance_type: str
    custom_timesteps: bool
    _beyond = "one"
    _sources = ("alphas_cumprod", "timesteps", _beyond, "custom_timesteps")
    _options = ("prediction_type", "variance_type", "clip_sample", "clip_sample_range", "thresholding")

    def _uncovered(self) -> str | None:
        variance = self.config.variance_type
        if self.config.thresholding:
            return "thresholding"
        if variance in ("learned", "learned_range") or self.variance_type in ("learned", "learned_range"):
            return f"variance_type={variance!r}"
        return super()._uncovered()

    def _fill(self, tables: AlphaTables) -> None:
        tables.clip = float(self.config.clip_sample_range) if self.config.clip_sample else None
        tables.gives_output = self.config.prediction_type == "sample"
        tables.put(ROWS, lambda position: self._row_of(tables, position), len(tables.timesteps.values))

    def _row_of(self, tables: AlphaTables, position: int) -> Row:
        """The weights that `_two` takes, of the step from one of the timesteps (DDPM eq. 7, 11 and 15)."""
        config, times = self.config, tables.timesteps.values
        here = times[position]
        spaced = self.custom_timesteps or self.num_inference_steps
        following = (times[position + 1] if position + 1 < len(times) else -1) if spaced else here - 1
        if not 0 <= max(here, following) < len(tables.levels) - 1:
            raise ValueError("no level")  # the original raises
        a, below = tables.levels[int(here)], tables.levels[max(int(following), -1)]
        if config.prediction_type == "epsilon" and a < LEAST:
            raise ValueError("no signal")  # the original gives infinities
        x0_sample, x0_output, *_ = (float(x) for x in reading(config.prediction_type, a))
        kept = float(quotient(a, below, self.alphas_cumprod.dtype is torch.float32))
        of_x0 = math.sqrt(below) * (1.0 - kept) / (1.0 - a)
        of_sample = math.sqrt(kept) * (1.0 - below) / (1.0 - a)
        large = 1.0 - kept
        small = max((1.0 - below) / (1.0 - a) * large, LEAST_VARIANCE)
        variance = large if config.variance_type == "fixed_large" else small
        if config.variance_type == "fixed_large_log" and here > 0:
            raise ValueError("the root of a logarithm")  # the original gives NaN
        deviation = math.sqrt(variance) if here > 0 else 0.0
        if config.clip_sample:
            weights = of_sample, 0.0, of_x0
        else:
            weights = of_sample + of_x0 * x0_sample, of_x0 * x0_output, 0.0
        if config.prediction_type != "epsilon" or a >= CANCELS:
            return x0_sample, x0_output, *weights, deviation, 0.0, 0.0
        near, guidance = reading_of_pair(a)
        return 0.0, 0.0, *weights, deviation, float(near), float(guidance)

    def _found(self, tables: AlphaTables, timestep: Any, sample: Tensor, graph: bool) -> Any:
        """The timestep and its row of weights, or None where the original has to run."""
        if graph:
            if tables.holes[ROWS] or not isinstance(timestep, Tensor):
                return None
            there = self.timesteps == timestep.to(self.timesteps.device)
            torch._assert_async(there.any(), "a timestep of the schedule")
            rows = tables.traced[ROWS].to(sample.device)
            return timestep, rows.index_select(0, there.int().argmax().reshape(1).to(sample.device))[0].unbind()
        at = host_value(timestep, tables.timesteps)
        if not isinstance(at, Integral) or at not in tables.timesteps.values:
            return None
        row: Any = tables.row(ROWS, tables.timesteps.values.index(int(at)))
        return None if row is None else (at, row if row[6] else row[:6])

    @fused
    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        graph = traced()
        tables = self._ready(graph)
        if tables is None or self.variance_type != self._internal_dict.variance_type:
            return None
        if min(sample.dim(), model_output.dim()) < 2:
            return None  # the original splits channels
        found = self._found(tables, timestep, sample, graph)
        if found is None:
            return None
        at, row = found
        state = as_state(sample, model_output)
        if not graph and at == 0:
            out, x0 = self._two(tables, state, model_output, row)
        elif self._noise == "keyed":
            seed, sample_id = self._key(generator, sample, at)
            out, x0 = self._two(tables, state, model_output, row, seed=seed, step=at, sample_id=sample_id)
        else:
            noise = (
                self._drawn_from(at, 1, model_output, generator)
                if graph
                else self._drawn(model_output, sample, generator)
            )
            out, x0 = self._two(tables, state, model_output, row, noise)
        return as_output(graph, DDPMSchedulerOutput, out, "pred_original_sample", x0) if return_dict else (out, x0)

    def step_with_log_prob(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        prev_sample: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take an ancestral step, or find the log-probability of one that was taken.

        model_output, sample: (B, …). timestep: one of the schedule's, or (B,) of them; the last step draws no noise,
        and its log-probability is 0. prev_sample: the state that was taken; None takes a new one, with noise from
        generator or from the scheduler's key.

        Returns (prev_sample, log_prob): the state in the dtype of sample, and (B,) as a mean over elements, of the
        rounded state; differentiable in model_output.
        Raises TypeError, ValueError for an argument of another type, shape or range, or a configuration that is not
        accelerated.
        """
        check_states(model_output, sample, prev_sample, generator)
        tables = self._current()
        if tables.reason is not None:
            raise ValueError(f"scheduler: expected a configuration that is accelerated, got {tables.reason}")
        known = tables.timesteps.values
        times = scheduled(timestep, len(sample), known)
        rows = []
        for t in times:
            row = self._row_of(tables, known.index(t))
            if row[6] and tables.clip is not None:  # where sample and noise cancel, x0 has separate weights
                x0 = reading("epsilon", tables.levels[t])
                row = (float(x0[0]), float(x0[1]), *row[2:])
            rows.append(row)
        return self._with_log_prob(rows, model_output, sample, prev_sample, generator, times)
