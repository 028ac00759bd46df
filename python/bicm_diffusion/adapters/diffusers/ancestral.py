"""Euler's ancestral method: a step to below the next level, and fresh noise up to it, in one launch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.arguments import is_whole
from bicm_diffusion.adapters.diffusers.drawing import Generators, traced
from bicm_diffusion.adapters.diffusers.euler import euler_weights
from bicm_diffusion.adapters.diffusers.outputs import as_output
from bicm_diffusion.adapters.diffusers.scheduler import fused
from bicm_diffusion.adapters.diffusers.sigmas import ROWS, Sigmas, SigmaTables
from bicm_diffusion.adapters.diffusers.tables import Row, Tables


def ancestral(sigma: float, below: float) -> tuple[float, float]:
    """The level to step down to, and the standard deviation of the noise that raises it to `below`."""
    up = math.sqrt(below**2 * (sigma**2 - below**2) / sigma**2)
    return math.sqrt(below**2 - up**2), up


@dataclass
class AncestralTables(SigmaTables):
    #: The steps at which the original's rounding takes the root of a negative number, and gives NaN.
    lost: list[bool] = field(default_factory=list)


class EulerAncestral(Sigmas):
    _kind: ClassVar[type[Tables]] = AncestralTables
    _options = ("prediction_type",)

    def _uncovered(self) -> str | None:
        prediction = self.config.prediction_type
        return None if prediction in ("epsilon", "v_prediction") else f"prediction_type={prediction!r}"

    def _scale(self, sigma: float) -> float:
        return 1.0 / math.sqrt(sigma * sigma + 1.0)

    def _fill(self, tables: AncestralTables) -> None:
        sigma, below = self.sigmas[:-1], self.sigmas[1:]
        up = (below**2 * (sigma**2 - below**2) / sigma**2) ** 0.5
        tables.lost = (below**2 < up**2).tolist()
        super()._fill(tables)

    def _row(self, tables: AncestralTables, index: int) -> Row:
        """Weights of sample and output in x0, then in the result, and the deviation of noise."""
        if tables.lost[index]:
            raise ValueError("the root of a negative number")
        sigma = tables.levels[index]
        down, up = ancestral(sigma, tables.levels[index + 1])
        return *euler_weights(self.config.prediction_type, sigma, sigma, down), up

    @fused
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        graph = traced()
        tables = self._ready(graph)
        if tables is None or is_whole(timestep) or not self.is_scale_input_called:
            return None
        index = self._index(timestep)
        row: Any = tables.row(ROWS, index, sample.device if graph else None)
        if row is None:
            return None
        # The original computes in float32 for every input dtype; only a float64 output keeps its dtype.
        given = model_output.dtype
        dtype = given if given is torch.float64 else torch.float32
        tensors = [sample if sample.dtype is dtype else sample.to(dtype), model_output]
        x0_sample, x0_output, of_sample, of_output, up = row
        weights = [of_sample, of_output]
        keyed = self._noisy(tensors, weights, up, index, generator, model_output, sample)
        scale = self._next_scale(tables, index, given, sample, model_output, graph)
        out, x0 = self._advance((tensors, [x0_sample, x0_output], weights), index, given, scale, **keyed)
        cls = EulerAncestralDiscreteSchedulerOutput
        return as_output(graph, cls, out, "pred_original_sample", x0) if return_dict else (out, x0)
