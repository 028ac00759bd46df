"""DPM-Solver-2 in k-diffusion's form: Euler's step to an intermediate level, then one with the slope there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteSchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.drawing import Generators, traced
from bicm_diffusion.adapters.diffusers.euler import derivative_weights, euler_weights
from bicm_diffusion.adapters.diffusers.halves import FIRST, SECOND, kept_sample
from bicm_diffusion.adapters.diffusers.outputs import as_output, as_state
from bicm_diffusion.adapters.diffusers.scheduler import fused
from bicm_diffusion.adapters.diffusers.sigmas import Sigmas, SigmaTables
from bicm_diffusion.adapters.diffusers.tables import Row, Tables

BETWEEN = "scales between"


@dataclass
class MidpointTables(SigmaTables):
    #: By the step, the level of its second half, and the scale of the model's input there.
    between: list[float] = field(default_factory=list)
    scales_between: list[float] = field(default_factory=list)
    #: The target levels of second halves, and the standard deviation of their noise, by the first half's step.
    ends: list[float] = field(default_factory=list)
    lifts: list[float] = field(default_factory=list)
    #: `dt` after a first half, where the original keeps it.
    lengths: list[Tensor] = field(default_factory=list)


class Kdpm2(Sigmas):
    _kind: ClassVar[type[Tables]] = MidpointTables
    _sources: ClassVar[tuple[str, ...]] = ("sigmas", "sigmas_interpol", "timesteps")
    _options = ("prediction_type",)
    _remembers = False
    _output: Any = KDPM2DiscreteSchedulerOutput
    _draws = False
    sigmas_interpol: Tensor
    sample: Any
    #: Whether the precomputed input is a second half's.
    _for_second = False

    def _uncovered(self) -> str | None:
        prediction = self.config.prediction_type
        return None if prediction in ("epsilon", "v_prediction") else f"prediction_type={prediction!r}"

    def _scale(self, sigma: float) -> float:
        return 1.0 / math.sqrt(sigma * sigma + 1.0)

    def _read(self, tables: MidpointTables) -> None:
        tables.between = self.sigmas_interpol.tolist()
        tables.ends = tables.levels[1:]
        tables.lifts = [0.0] * len(tables.ends)

    def _fill(self, tables: MidpointTables) -> None:
        self._read(tables)
        self._fill_scales(tables)
        tables.scales_between = [self._scale(x) for x in tables.between]
        tables.traced[BETWEEN] = torch.tensor(tables.scales_between, dtype=torch.float64)
        count = min(len(tables.timesteps.values), len(tables.levels) - 1)
        tables.put(FIRST, lambda index: self._first_row(tables, index), count)
        tables.put(SECOND, lambda index: self._second_row(tables, index), count)

    def _first_row(self, tables: MidpointTables, index: int) -> Row:
        """Weights of sample and output in x0, then in the result."""
        sigma = tables.levels[index]
        return euler_weights(self.config.prediction_type, sigma, sigma, tables.between[index + 1])

    def _second_row(self, tables: MidpointTables, index: int) -> Row:
        """Weights of sample and output in x0, those of both samples in the result, and the noise's deviation."""
        if index < 1:
            raise ValueError("a second half without a first one")
        x0_sample, x0_output, *slope = derivative_weights(self.config.prediction_type, tables.between[index])
        length = tables.ends[index - 1] - tables.levels[index - 1]
        of_sample, of_output = (length * x for x in slope)
        return x0_sample, x0_output, of_sample, of_output, tables.lifts[index - 1]

    # --- the model's input --------------------------------------------------------------------------------------------
    def _present_scale(self, tables: MidpointTables, index: int, graph: bool) -> Any:
        if self.sample is None:
            return super()._present_scale(tables, index, graph)
        if graph:
            return tables.traced[BETWEEN][index]
        return tables.scales_between[index] if index > 0 else None

    def _next_scale(
        self, tables: MidpointTables, index: int, result: torch.dtype, sample: Tensor, output: Tensor, graph: bool
    ) -> Any:
        scale = super()._next_scale(tables, index, result, sample, output, graph)
        if scale is None:
            return None
        self._for_second = self.sample is None
        return tables.scales_between[index + 1] if self._for_second else scale

    @wraps(Sigmas.scale_model_input)
    def scale_model_input(self, *args: Any, **kwargs: Any) -> Any:
        if not traced() and self._for_second is (self.sample is None):
            self._pending = None  # made for the other half
        return super().scale_model_input(*args, **kwargs)

    # --- a step -------------------------------------------------------------------------------------------------------
    @fused
    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        return self._half(model_output, timestep, sample, None, return_dict)

    def _half(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators, return_dict: bool
    ) -> Any:
        """Half a step, or None where the original has to run."""
        graph = traced()
        tables = self._ready(graph)
        if tables is None:
            return None
        index, first = self._index(timestep), self.sample is None
        row: Any = tables.row(FIRST if first else SECOND, index, sample.device if graph else None)
        if row is None:
            return None
        state = as_state(sample, model_output)
        tensors, x0_weights, weights = [state, model_output], [*row[:2]], [*row[2:4]]
        keyed: dict[str, Any] = {}
        if not first:
            kept = kept_sample(self.sample, state)
            if kept is None:
                return None
            tensors.append(kept)
            weights.append(1.0)
            if self._draws:
                keyed = self._noisy(tensors, weights, row[4], index, generator, model_output, sample)
        scale = self._next_scale(tables, index, state.dtype, sample, model_output, graph)
        out, x0 = self._advance((tensors, x0_weights, weights), index, state.dtype, scale, **keyed)
        self.sample = sample if first else None
        if first:
            self._note_length(tables, index, graph)
        return as_output(graph, self._output, out, "pred_original_sample", x0) if return_dict else (out, x0)

    def _note_length(self, tables: MidpointTables, index: int, graph: bool) -> None:
        """Set `dt` where the original does."""


class Kdpm2Ancestral(Kdpm2):
    _sources = ("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "timesteps")
    _output = KDPM2AncestralDiscreteSchedulerOutput
    _draws = True
    sigmas_up: Tensor
    sigmas_down: Tensor
    dt: Any

    def _read(self, tables: MidpointTables) -> None:
        # A second half is at the level with its first half's index.
        tables.between = [math.nan, *self.sigmas_interpol.tolist()]
        tables.ends, tables.lifts = self.sigmas_down.tolist(), self.sigmas_up.tolist()
        lengths = (self.sigmas_interpol - self.sigmas.to(self.sigmas_interpol.device)).detach()
        tables.traced["lengths"], tables.lengths = lengths, list(lengths.unbind())

    def _note_length(self, tables: MidpointTables, index: int, graph: bool) -> None:
        self.dt = tables.traced["lengths"][index] if graph else tables.lengths[index]

    @fused
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        return self._half(model_output, timestep, sample, generator, return_dict)
