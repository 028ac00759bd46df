"""DDIM and its inversion: tables of alpha-bar over all training timesteps, one launch a step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddim_inverse import DDIMSchedulerOutput as DDIMInverseSchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.alphas import Alphas, AlphaTables, ddim_row
from bicm_diffusion.adapters.diffusers.arguments import constant, host_value, numbers
from bicm_diffusion.adapters.diffusers.drawing import Generators, traced
from bicm_diffusion.adapters.diffusers.log_prob import check_range, check_states, scheduled
from bicm_diffusion.adapters.diffusers.outputs import as_output, as_state
from bicm_diffusion.adapters.diffusers.scheduler import GRAPH, on_tables
from bicm_diffusion.adapters.diffusers.tables import Number


def leaves_no_direction(here: float, below: float, eta: float) -> bool:
    """Whether the direction's variance is negative, or so small that the original's rounding may make it so."""
    variance = eta * eta * (1.0 - below) / (1.0 - here) * (1.0 - here / below)
    return variance > 0.0 and 1.0 - below - variance < 1e-6 * (1.0 - below)


class Ddim(Alphas):
    _beyond = "final_alpha_cumprod"
    _sources = ("alphas_cumprod", "timesteps", _beyond)
    _options = (*Alphas._options, "thresholding")

    def _uncovered(self) -> str | None:
        return "thresholding" if self.config.thresholding else super()._uncovered()

    def _ends(self, timestep: Any, tables: AlphaTables) -> tuple[Any, Any]:
        return timestep, timestep - tables.gap

    def _row(self, levels: tuple[Number, Number], eta: float, rederives: bool) -> Any:
        if not traced():
            here, below = levels
            # A negative variance, for any eta, or the root of one: the original gives NaN.
            if below < here or (eta and 0.0 < here < 1.0 and leaves_no_direction(here, below, eta)):  # type: ignore[arg-type]
                return None
        return super()._row(levels, eta, rederives)

    @on_tables
    def step(
        self,
        tables: AlphaTables | None,
        known: int,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        if eta.__class__ is float and eta == 0.0 and not use_clipped_model_output:
            found = self._launched(tables, known, timestep, sample, model_output, DDIMSchedulerOutput, return_dict)
            if found is not None:
                return found
        graph = known == GRAPH
        if not graph and (type(eta) is not float or eta != eta):
            numbers(eta=eta)
        given_twice = variance_noise is not None and generator is not None and eta > 0
        if tables is None or not self.num_inference_steps or given_twice:
            return None
        at: Any = timestep if graph else host_value(timestep, tables.timesteps)
        row = self._row_at(tables, at, sample, graph, eta, use_clipped_model_output)
        if row is None:
            return None
        state = as_state(sample, model_output)
        if eta > 0 and self._noise == "keyed" and variance_noise is None:
            seed, sample_id = self._key(generator, sample, at)
            out, x0 = self._two(tables, state, model_output, row, seed=seed, step=at, sample_id=sample_id)
        elif eta > 0:
            noise = self._drawn(model_output, sample, generator) if variance_noise is None else variance_noise
            if not graph:
                constant(noise)
            if torch.promote_types(noise.dtype, state.dtype) != state.dtype:
                return None
            out, x0 = self._two(tables, state, model_output, row, noise)
        else:
            out, x0 = self._two(tables, state, model_output, row)
        return as_output(graph, DDIMSchedulerOutput, out, "pred_original_sample", x0) if return_dict else (out, x0)

    def step_with_log_prob(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        prev_sample: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take a step of DDIM with η as DDPO does, or find the log-probability of one that was taken.

        model_output, sample: (B, …). timestep: one of the schedule's, or (B,) of them; as DDPO has it, the last step
        goes to timestep 0 and not beyond the schedule's end. eta: at least 0; above 1 only where it leaves the
        direction a variance. prev_sample: the state that was taken; None takes a new one, with noise from generator or
        from the scheduler's key.

        Returns (prev_sample, log_prob): the state in the dtype of sample, and (B,) as a mean over elements, of the
        rounded state; differentiable in model_output.
        Raises TypeError, ValueError for an argument of another type, shape or range, or where x0 is thresholded.
        """
        check_states(model_output, sample, prev_sample, generator)
        check_range("eta", eta, 0.0)
        tables = self._current()
        if tables.reason is not None or not tables.gap:
            raise ValueError(f"scheduler: expected steps that are set and covered, got {tables.reason or 'none'}")
        times = scheduled(timestep, len(sample), tables.timesteps.values)
        if not all(0 <= t < len(tables.levels) - 1 for t in times):
            raise ValueError(f"timestep: expected values in [0, {len(tables.levels) - 1}), got {times}")
        options = {
            "rounds": self.alphas_cumprod.dtype is torch.float32,
            "clips": self.config.clip_sample,
            "rederives": use_clipped_model_output,
        }
        try:
            rows = [
                ddim_row(
                    self.config.prediction_type, tables.levels[t], tables.levels[max(t - tables.gap, 0)], eta, **options
                )
                for t in times
            ]
        except (ArithmeticError, ValueError):
            if eta > 1.0:
                expected = "expected one that leaves the direction a variance, as those up to 1 do"
                raise ValueError(f"eta: {expected}, got {eta}") from None
            raise ValueError(f"timestep: expected levels where x0 can be read from the noise, got {times}") from None
        return self._with_log_prob(rows, model_output, sample, prev_sample, generator, times)


class DdimInverse(Alphas):
    initial_alpha_cumprod: Tensor
    _beyond = "initial_alpha_cumprod"
    _sources = ("alphas_cumprod", "timesteps", _beyond)

    def _uncovered(self) -> str | None:
        if self.config.prediction_type == "sample" and float(self.initial_alpha_cumprod) == 1.0:
            return "prediction_type='sample' from a level without noise"  # infinite from the first step on
        return super()._uncovered()

    def _ends(self, timestep: Any, tables: AlphaTables) -> tuple[Any, Any]:
        # The state is at the level below, whose alpha-bar the first step takes from beyond the schedule.
        below, most = timestep - tables.gap, self._internal_dict.num_train_timesteps - 1
        return (below.clamp(max=most) if isinstance(below, Tensor) else min(below, most)), timestep

    @on_tables
    def step(
        self,
        tables: AlphaTables | None,
        known: int,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Any:
        found = self._launched(tables, known, timestep, sample, model_output, DDIMInverseSchedulerOutput, return_dict)
        if found is not None:
            return found
        graph = known == GRAPH
        tables = tables if self.num_inference_steps else None
        return self._plain(tables, model_output, timestep, sample, graph, DDIMInverseSchedulerOutput, return_dict)
