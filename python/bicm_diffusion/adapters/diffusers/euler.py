"""Euler's method, with diffusers' scaling and with EDM's: one launch for the step and the next evaluation's input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.arguments import is_whole, numbers
from bicm_diffusion.adapters.diffusers.churn import Churning
from bicm_diffusion.adapters.diffusers.drawing import Generators
from bicm_diffusion.adapters.diffusers.outputs import as_output
from bicm_diffusion.adapters.diffusers.scheduler import GRAPH, PLAIN, on_tables
from bicm_diffusion.adapters.diffusers.sigmas import ROWS, Sigmas, SigmaTables
from bicm_diffusion.adapters.diffusers.tables import Row, Tables
from bicm_kernels.inputs import output

#: The default churn arguments of both schedulers' `step`.
NO_CHURN = (0.0, 0.0, math.inf, 1.0)


def edm_denoiser(sigma: float, sigma_data: float, prediction: str) -> tuple[float, float]:
    """c_skip and c_out of EDM's preconditioning; "v_prediction" changes the sign of the second."""
    total = sigma * sigma + sigma_data * sigma_data
    c_out = sigma * sigma_data / math.sqrt(total)
    return sigma_data * sigma_data / total, -c_out if prediction == "v_prediction" else c_out


def euler_weights(prediction: str, sigma: float, raised: float, below: float) -> Row:
    """Weights of sample and output in x0, then in the result of a step; x0 from v is read at the level before churn."""
    ratio = (below - raised) / raised
    if prediction == "epsilon":
        return 1.0, -raised, 1.0, below - raised
    if prediction == "v_prediction":
        total = sigma * sigma + 1.0
        kept, of_output = 1.0 / total, -sigma / math.sqrt(total)
        return kept, of_output, 1.0 + ratio * (1.0 - kept), -ratio * of_output
    return 0.0, 1.0, below / raised, -ratio


def derivative_weights(prediction: str, sigma: float) -> Row:
    """Weights of sample and output in x0, then in the slope (x - x0)/sigma."""
    x0_sample, x0_output, _, _ = euler_weights(prediction, sigma, sigma, 0.0)
    return x0_sample, x0_output, (1.0 - x0_sample) / sigma, -x0_output / sigma


@dataclass
class EulerTables(SigmaTables):
    #: Whether x0 is what the model predicts.
    gives_output: bool = False


class _EulerSteps(Sigmas, Churning):
    """Shared by both of diffusers' Euler schedulers."""

    _kind: ClassVar[type[Tables]] = EulerTables
    _output: Any

    def _weights(self, sigma: float, raised: float, below: float) -> Row:
        """Weights of sample and output in x0, then in the result, at a level that churn raised."""
        raise NotImplementedError

    def _row(self, tables: EulerTables, index: int) -> Row:
        sigma, below = tables.levels[index], tables.levels[index + 1]
        return self._weights(sigma, sigma, below)

    def _fill(self, tables: EulerTables) -> None:
        super()._fill(tables)
        for (_, index), row in tables.rows.items():
            if row is not None:
                tables.plain[index] = row[:2], row[2:], None, tables.scale_after(index)

    def _euler(
        self,
        tables: EulerTables | None,
        known: int,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        churn: tuple[float, float, float, float],
        generator: Generators,
        return_dict: bool,
    ) -> Any:
        """The step, or None where the original has to run."""
        if known == PLAIN and churn == NO_CHURN and tables is not None:
            own = self.__dict__
            index = own["_step_index"]
            if index is None:
                index = self._index(timestep)
            plain = tables.plain.get(index)
            asked_for = own["is_scale_input_called"] and (type(timestep) is Tensor or not is_whole(timestep))
            if plain is not None and asked_for:
                out, x0 = self._take(own, tables, index, [sample, model_output], plain)
                if tables.gives_output:
                    x0 = model_output
                if not return_dict:
                    return out, x0
                return output(self._output, "prev_sample", out, "pred_original_sample", x0)
        graph = known == GRAPH
        if not graph and churn != NO_CHURN:
            s_churn, s_tmin, s_tmax, s_noise = churn
            numbers(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
        if tables is None or is_whole(timestep) or not self.is_scale_input_called:
            return None
        index = self._index(timestep)
        row: Any = tables.row(ROWS, index, sample.device if graph else None)
        if row is None:
            return None
        # The original computes in float32 for every input dtype; only a float64 output keeps its dtype.
        given = model_output.dtype
        dtype = given if given is torch.float64 else torch.float32
        state = sample if sample.dtype is dtype else sample.to(dtype)
        lift = self._lift(tables, index, *churn[:3]) if churn[0] else 0.0
        if lift:
            sigma = tables.levels[index]
            raised = sigma * (1.0 + lift)
            state = self._churned(state, model_output, churn[3] * math.sqrt(raised**2 - sigma**2), index, generator)
            row = self._weights(sigma, raised, tables.levels[index + 1])
        x0_sample, x0_output, of_sample, of_output = row
        scale = self._next_scale(tables, index, given, sample, model_output, graph)
        terms = [state, model_output], [x0_sample, x0_output], [of_sample, of_output]
        out, x0 = self._advance(terms, index, given, scale)
        if tables.gives_output:
            x0 = model_output
        return as_output(graph, self._output, out, "pred_original_sample", x0) if return_dict else (out, x0)


class Euler(_EulerSteps):
    _output = EulerDiscreteSchedulerOutput
    _options = ("prediction_type",)

    def _uncovered(self) -> str | None:
        prediction = self.config.prediction_type
        known = ("epsilon", "sample", "original_sample", "v_prediction")
        return None if prediction in known else f"prediction_type={prediction!r}"

    def _scale(self, sigma: float) -> float:
        return 1.0 / math.sqrt(sigma * sigma + 1.0)

    def _weights(self, sigma: float, raised: float, below: float) -> Row:
        return euler_weights(self.config.prediction_type, sigma, raised, below)

    def _fill(self, tables: EulerTables) -> None:
        super()._fill(tables)
        tables.gives_output = self.config.prediction_type in ("sample", "original_sample")

    @on_tables
    def step(
        self,
        tables: EulerTables | None,
        known: int,
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
        churn = s_churn, s_tmin, s_tmax, s_noise
        return self._euler(tables, known, model_output, timestep, sample, churn, generator, return_dict)


class EdmEuler(_EulerSteps):
    _output = EDMEulerSchedulerOutput
    _options = ("prediction_type", "sigma_data")

    def _uncovered(self) -> str | None:
        prediction = self.config.prediction_type
        return None if prediction in ("epsilon", "v_prediction") else f"prediction_type={prediction!r}"

    def _scale(self, sigma: float) -> float:
        return 1.0 / math.sqrt(sigma * sigma + self.config.sigma_data**2)

    def _weights(self, sigma: float, raised: float, below: float) -> Row:
        kept, of_output = edm_denoiser(raised, self.config.sigma_data, self.config.prediction_type)
        ratio = (below - raised) / raised
        return kept, of_output, 1.0 + ratio * (1.0 - kept), -ratio * of_output

    @on_tables
    def step(
        self,
        tables: EulerTables | None,
        known: int,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
    ) -> Any:
        if pred_original_sample is not None:
            return None
        churn = s_churn, s_tmin, s_tmax, s_noise
        return self._euler(tables, known, model_output, timestep, sample, churn, generator, return_dict)
