"""Pseudo linear multistep and Runge-Kutta steps: the outputs so far and the state in one launch."""

from __future__ import annotations

from functools import reduce
from numbers import Integral
from typing import Any, ClassVar

from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.alphas import Alphas, AlphaTables
from bicm_diffusion.adapters.diffusers.arguments import host_value
from bicm_diffusion.adapters.diffusers.drawing import traced
from bicm_diffusion.adapters.diffusers.outputs import as_output, as_state
from bicm_diffusion.adapters.diffusers.scheduler import fused
from bicm_diffusion.adapters.diffusers.tables import Number, root
from bicm_kernels import affine_step, denoised_step

#: Adams-Bashforth's weights of the last outputs, the newest first, by how many there are.
MULTISTEP = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
#: Runge-Kutta's weights of the four outputs of a step.
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


class Pndm(Alphas):
    prk_timesteps: Any
    counter: int
    cur_model_output: Any
    cur_sample: Tensor | None
    ets: list[Any]

    _beyond = "final_alpha_cumprod"
    _sources = ("alphas_cumprod", "timesteps", _beyond)
    _options: ClassVar[tuple[str, ...]] = ("num_train_timesteps", "prediction_type", "skip_prk_steps")
    _clips = False

    def _uncovered(self) -> str | None:
        prediction = self.config.prediction_type
        return None if prediction in ("epsilon", "v_prediction") else f"prediction_type={prediction!r}"

    def _row(self, levels: tuple[Number, Number], eta: float, rederives: bool) -> Any:
        """Weights of the sample and of the output in the step (PNDM eq. 9)."""
        a, below = levels
        try:
            kept = root(below / a)
            along = -(below - a) / (a * root(1.0 - below) + root(a * (1.0 - a) * below))
            if self.config.prediction_type == "epsilon":
                return kept, along
            return kept + along * root(1.0 - a), along * root(a)
        except (ZeroDivisionError, ValueError, OverflowError):
            return None  # the original gives infinities

    def _weights(self, tables: AlphaTables, here: Any, there: Any, sample: Tensor) -> Any:
        """The weights between two timesteps, or None where the original has to run."""
        if traced():
            levels = self._levels_at(here, there, tables, sample)
            assert levels is not None
            return self._row(levels, 0.0, False)
        if not isinstance(here, Integral) or not isinstance(there, Integral) or here < 0:
            return None
        key = int(here), int(there)
        if key not in tables.rows:
            levels = self._levels_at(*key, tables, sample)
            tables.rows[key] = None if levels is None else self._row(levels, 0.0, False)
        return tables.rows[key]

    @fused
    def step_prk(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True) -> Any:
        graph = traced()
        tables = self._ready(graph) if self.num_inference_steps else None
        if tables is None:
            return None
        count, part = self.counter, self.counter % 4
        at = timestep if graph else host_value(timestep, tables.timesteps)
        if not graph and not isinstance(at, Integral):
            return None
        there = at if count % 2 else at - tables.gap // 2
        first = count // 4 * 4
        # In a graph, the timesteps of this kind come first.
        here = self.timesteps[first] if graph else self.prk_timesteps[first]
        row = self._weights(tables, here, there, sample)
        current = sample if part == 0 or self.cur_sample is None else self.cur_sample
        so_far, share = self.cur_model_output, RUNGE_KUTTA[part]
        known = isinstance(so_far, Tensor)
        if row is None or not (known or so_far == 0):
            return None
        state = as_state(current, model_output)
        if known and so_far.dtype is not model_output.dtype:
            return None  # the original adds to it in place
        of_sample, of_output = row
        terms, shares = [model_output, *([so_far] if known else [])], [share, *([1.0] if known else [])]
        if part == 3:
            sums: Any = 0
            out = affine_step([state, *terms], [of_sample, *(of_output * x for x in shares)])
        else:
            weights = [of_sample, of_output, *([0.0] if known else [])]
            if state.dtype is model_output.dtype:
                out, sums, _ = denoised_step([state, *terms], [0.0, *shares], weights, x0_weight=0.0)
            else:
                out, sums = affine_step([state, model_output], weights[:2]), affine_step(terms, shares)
        if part == 0:
            self.ets.append(model_output)
            self.cur_sample = sample
        self.cur_model_output = sums
        self.counter = count + 1
        return as_output(graph, SchedulerOutput, out) if return_dict else (out,)

    @fused
    def step_plms(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True) -> Any:
        graph = traced()
        tables = self._ready(graph) if self.num_inference_steps else None
        if tables is None or (not self._internal_dict.skip_prk_steps and len(self.ets) < 3):
            return None
        at: Any = timestep if graph else host_value(timestep, tables.timesteps)
        if not graph and not isinstance(at, Integral):
            return None
        again = self.counter == 1
        outputs = self.ets if again else [*self.ets[-3:], model_output]
        here, there = (at + tables.gap, at) if again else (at, at - tables.gap)
        row = self._weights(tables, here, there, sample)
        count = len(outputs)
        current, terms = sample, outputs[::-1][:4]
        if count == 1 and again:
            current, terms, shares = self.cur_sample, [model_output, outputs[0]], (0.5, 0.5)  # type: ignore[assignment]
        elif count == 1 and self.counter == 0:
            shares = (1.0,)  # type: ignore[assignment]
        elif count > 1:
            shares = MULTISTEP[min(count, 4)]  # type: ignore[assignment]
        else:
            return None
        if row is None or current is None:
            return None
        of_sample, of_output = row
        state = reduce(as_state, terms, current)
        out = affine_step([state, *terms], [of_sample, *(of_output * x for x in shares)])
        if not again:
            self.ets = outputs
        if count == 1:
            self.cur_sample = None if again else sample
        self.counter += 1
        return as_output(graph, SchedulerOutput, out) if return_dict else (out,)

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True) -> Any:
        first = self.counter < len(self.prk_timesteps) and not self._internal_dict.skip_prk_steps
        step = self.step_prk if first else self.step_plms
        return step(model_output=model_output, timestep=timestep, sample=sample, return_dict=return_dict)

    step.__qualname__ = "PNDMScheduler.step"  # named in Python's error for wrong arguments
