"""Trajectory consistency distillation: a step to below the next level, and fresh noise up to it, in one launch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from typing import Any, ClassVar

from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.alphas import LEAST, PREDICTIONS, reading
from bicm_diffusion.adapters.diffusers.arguments import host_value, numbers
from bicm_diffusion.adapters.diffusers.drawing import Generators, traced
from bicm_diffusion.adapters.diffusers.outputs import as_output, as_state
from bicm_diffusion.adapters.diffusers.scheduler import fused
from bicm_diffusion.adapters.diffusers.sigmas import Counted
from bicm_diffusion.adapters.diffusers.tables import Row, Tables, is_double, single

#: The default of `step`: its rows exist before a graph is made.
ETA = 0.3


@dataclass
class TcdTables(Tables):
    #: The values of eta that rows were made for.
    etas: set[float] = field(default_factory=set)


class Tcd(Counted):
    _kind: ClassVar[type[Tables]] = TcdTables
    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    _sources = ("alphas_cumprod", "timesteps", "final_alpha_cumprod")
    _options = ("prediction_type",)
    #: The values of eta that steps were called with, so that a graph finds their rows.
    _etas: tuple[float, ...] = (ETA,)

    def _uncovered(self) -> str | None:
        prediction = self.config.prediction_type
        return None if prediction in PREDICTIONS else f"prediction_type={prediction!r}"

    def _host_levels(self) -> list[float]:
        return self.alphas_cumprod.tolist()

    def _fill(self, tables: TcdTables) -> None:
        for eta in self._etas:
            self._put(tables, eta)

    def _put(self, tables: TcdTables, eta: float) -> None:
        tables.etas.add(eta)
        tables.put(eta, partial(self._row_of, tables, eta=eta), len(tables.timesteps.values))

    def _row_of(self, tables: TcdTables, index: int, eta: float) -> Row:
        """Weights of sample and output at the lower level, then of that state and of noise (TCD eq. 22 to 24).

        The last two are the first two for float32: their terms may cancel, so they share the rounding of the first.
        """
        times, levels = tables.timesteps.values, tables.levels
        here, below = int(times[index]), int(times[index + 1]) if index + 1 < len(times) else 0
        # As PyTorch multiplies an integer by a number: in float32.
        lower = math.floor(single(single(1.0 - eta) * single(below)))
        if not 0 <= max(here, below, lower) < len(levels) or min(here, lower) < 0:
            raise ValueError("no level")  # the original raises
        level = levels[below] if below >= 0 else float(self.final_alpha_cumprod)
        if self.config.prediction_type == "epsilon" and levels[here] < LEAST:
            raise ValueError("no signal")  # the original gives infinities
        readings = reading(self.config.prediction_type, levels[here])
        x0_sample, x0_output, eps_sample, eps_output = (float(x) for x in readings)
        kept, noise = math.sqrt(levels[lower]), math.sqrt(1.0 - levels[lower])
        of_sample, of_output = kept * x0_sample + noise * eps_sample, kept * x0_output + noise * eps_output
        shared = single(of_sample)
        near = shared, of_output * (shared / of_sample) if of_sample else of_output
        share = level / levels[lower]
        # Without noise, and at the last step, the lower level is the target.
        last = self.num_inference_steps is not None and index == self.num_inference_steps - 1
        if eta <= 0.0 or last:
            return of_sample, of_output, 1.0, 0.0, *near
        return of_sample, of_output, math.sqrt(share), math.sqrt(1.0 - share), *near

    @fused
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = ETA,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        graph = traced()
        if not graph:
            numbers(eta=eta)
        tables = None if self.num_inference_steps is None else self._ready(graph)
        if tables is None or not 0.0 <= eta <= 1.0:
            return None
        index = self._index(timestep)
        if eta not in tables.etas:
            if graph:
                return None
            self._etas = (*self._etas, eta)
            self._put(tables, eta)
        row: Any = tables.row(eta, index, sample.device if graph else None)
        if not graph and row is not None:
            # The original looks up alpha-bar by the timestep argument, for every step.
            value = host_value(timestep, tables.timesteps)
            if not isinstance(value, Integral) or value != tables.timesteps.values[index]:
                return None
        if row is None:
            return None
        of_sample, of_output, kept, deviation, *near = row
        state = as_state(sample, model_output)
        if not is_double(state):
            of_sample, of_output = near
        tensors, weights = [state, model_output], [0.0, 0.0]
        keyed: dict[str, Any] = {}
        if eta > 0 and index != self.num_inference_steps - 1:  # type: ignore[operator]
            keyed = self._noisy(tensors, weights, deviation, index, generator, model_output, sample, state.dtype)
            terms = tensors, [of_sample, of_output], weights
            out, lower = self._advance(terms, index, state.dtype, x0_weight=kept, **keyed)
        else:
            out, _ = self._advance((tensors, [0.0, 0.0], [of_sample, of_output]), index, state.dtype)
            lower = out
        return as_output(graph, TCDSchedulerOutput, out, "pred_noised_sample", lower) if return_dict else (out, lower)
