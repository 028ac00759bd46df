"""UniPC of orders one to three: one launch corrects the last step's result, another one takes the next step."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor, promote_types

from bicm_diffusion.adapters.diffusers.drawing import traced
from bicm_diffusion.adapters.diffusers.levels import (
    NO_SIGNAL,
    PREDICTIONS,
    Level,
    level_of,
    log_ratio,
    reading_noise,
    reading_x0,
    step_of_no_length,
)
from bicm_diffusion.adapters.diffusers.outputs import as_dtype, as_output, as_state
from bicm_diffusion.adapters.diffusers.scheduler import fused
from bicm_diffusion.adapters.diffusers.sigmas import ROWS, Counted
from bicm_diffusion.adapters.diffusers.tables import Row, Tables
from bicm_kernels import affine_step, denoised_step

MOST_ORDER = 3


def unified_row(levels: list[Level], *, bh1: bool, predicts_x0: bool, corrects: bool) -> Row:
    """Weights of the state, of the predictions there and before it, and of the prediction at its end (UniPC).

    levels: the target, the current one, and as many earlier ones as the order needs. The last weight is the
    corrector's, 0 for the predictor.
    """
    order = len(levels) - 1
    (alpha, sigma), (alpha_here, sigma_here) = levels[:2]
    there, here, *before = (log_ratio(level) for level in levels)
    h = there - here
    hh = -h if predicts_x0 else h
    kept, factor = (sigma / sigma_here, alpha) if predicts_x0 else (alpha / alpha_here, sigma)
    phi = math.expm1(hh)
    scale = factor * (hh if bh1 else phi)
    if not math.isfinite(scale):
        raise ValueError("a step of no end")  # the original gives NaN
    if order == 1 and not (corrects and h):
        return kept, -factor * phi, 0.0
    if order > 1 and any(step_of_no_length(*pair) for pair in pairwise(levels)):
        raise ZeroDivisionError
    ratios = [*((x - here) / h for x in before), 1.0]
    # The moments that the weights of the differences have to have.
    moments, factorial, value = [], 1.0, phi / hh - 1.0
    for k in range(1, order + 1):
        moments.append(value * factorial / (hh if bh1 else phi))
        factorial *= k + 1
        value = value / hh - 1.0 / factorial
    count = order if corrects else order - 1
    if order == (1 if corrects else 2):
        rho = [0.5]
    else:
        powers = np.array([[ratio**k for ratio in ratios[:count]] for k in range(count)])
        rho = np.linalg.solve(powers, np.array(moments[:count])).tolist()
    corrected = -scale * rho[-1] if corrects else 0.0
    earlier = [-scale * w / ratio for w, ratio in zip(rho, ratios[: order - 1], strict=False)]
    return kept, -factor * phi - sum(earlier) - corrected, *earlier, corrected


class UniPc(Counted):
    predict_x0: bool
    solver_p: Any
    disable_corrector: Any
    model_outputs: list[Tensor | None]
    timestep_list: list[Any]
    lower_order_nums: int
    this_order: int
    last_sample: Tensor | None

    _sources = ("sigmas", "timesteps", "predict_x0")
    _options: ClassVar[tuple[str, ...]] = (
        "prediction_type",
        "thresholding",
        "solver_order",
        "solver_type",
        "lower_order_final",
        "use_flow_sigmas",
    )

    def _uncovered(self) -> str | None:
        config, prediction = self.config, self.config.prediction_type
        if prediction not in (PREDICTIONS if self.predict_x0 else PREDICTIONS[:3]):
            return f"prediction_type={prediction!r}"
        if config.thresholding and self.predict_x0:
            return "thresholding"
        if config.solver_type not in ("bh1", "bh2"):
            return f"solver_type={config.solver_type!r}"
        if config.solver_order not in range(1, MOST_ORDER + 1):
            return f"solver_order={config.solver_order!r}"
        return "solver_p" if self.solver_p else None

    def _fill(self, tables: Tables) -> None:
        count = min(len(tables.timesteps.values), len(tables.levels) - 1)
        tables.put(ROWS, partial(self._reading_at, tables), count)
        for order in range(1, self.config.solver_order + 1):
            for corrects in (False, True):
                tables.put((order, corrects), partial(self._row_of, tables, order=order, corrects=corrects), count)

    def _reading_at(self, tables: Tables, index: int) -> Row:
        """Weights of sample and output in the prediction."""
        sigma = tables.levels[index]
        level = level_of(sigma, self.config.use_flow_sigmas)
        if level[0] < NO_SIGNAL and self.predict_x0 and self.config.prediction_type == "epsilon":
            raise ValueError("no signal")
        if self.predict_x0:
            return reading_x0(self.config.prediction_type, sigma, level)
        return reading_noise(self.config.prediction_type, level)

    def _row_of(self, tables: Tables, index: int, order: int, corrects: bool) -> Row:
        """The predictor's weights from a level, or those of the corrector of the step to it."""
        at = index - 1 if corrects else index
        if at < order - 1:
            raise ValueError(f"step {at} has no {order - 1} before it")
        levels = [level_of(tables.levels[k], self.config.use_flow_sigmas) for k in range(at + 1, at - order, -1)]
        bh1 = self.config.solver_type == "bh1"
        return unified_row(levels, bh1=bh1, predicts_x0=bool(self.predict_x0), corrects=corrects)

    def _order(self, tables: Tables, index: int) -> int:
        config = self._internal_dict
        order: int = config.solver_order
        if config.lower_order_final:
            order = min(order, len(tables.timesteps.values) - index)
        return min(order, self.lower_order_nums + 1)

    @fused
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Any:
        graph = traced()
        tables = self._ready(graph) if self.num_inference_steps is not None else None
        most = self._internal_dict.solver_order
        if tables is None or self.solver_p or not len(self.model_outputs) == len(self.timestep_list) == most:
            return None
        index = self._index(timestep)
        last = self.last_sample if index > 0 and index - 1 not in self.disable_corrector else None
        corrector, order = 0 if last is None else self.this_order, self._order(tables, index)
        if not 0 < order <= most or not (last is None or 0 < corrector <= most):
            return None
        device = sample.device if graph else None
        reading: Any = tables.row(ROWS, index, device)
        correction: Any = tables.row((corrector, True), index, device) if corrector else ()
        row: Any = tables.row((order, False), index, device)
        depth = max(corrector, order - 1)
        history: list[Any] = self.model_outputs[-depth:][::-1] if depth else []
        state = as_state(sample, model_output)
        others = [*history, *(() if last is None else (last,))]
        if reading is None or correction is None or row is None or any(x is None for x in others):
            return None
        alone = self._internal_dict.prediction_type == ("sample" if self.predict_x0 else "epsilon")
        result = sample.dtype if last is None else last.dtype
        # The original multiplies by way of (B, C, ...), and two differences at once in one dtype alone.
        if depth > 1 and sample.dim() < 2:
            return None
        own = model_output if alone else state
        if max(corrector, order) > 2 and any(x.dtype is not result for x in (own, *others)):
            return None
        if not alone and result is not state.dtype and promote_types(result, state.dtype) is not state.dtype:
            return None  # a launch corrects in the dtype of the state
        given = sample if alone else state, model_output, last, history
        converted, corrected, previous = self._launch(given, reading, correction, row, alone)
        self.model_outputs[:-1] = self.model_outputs[1:]
        self.timestep_list[:-1] = self.timestep_list[1:]
        self.model_outputs[-1] = converted
        self.timestep_list[-1] = timestep
        self.this_order, self.last_sample = order, as_dtype(corrected, result) if corrector else sample
        if self.lower_order_nums < most:
            self.lower_order_nums += 1
        self._step_index = index + 1
        previous = as_dtype(previous, result)
        return as_output(graph, SchedulerOutput, previous) if return_dict else (previous,)

    def _launch(
        self,
        given: tuple[Tensor, Tensor, Any, list[Any]],
        reading: Any,
        correction: Any,
        row: Any,
        alone: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The prediction, the corrected sample, and the next one.

        alone: whether the model's output is the prediction itself.
        """
        sample, output, last, history = given
        kept, now, *earlier, _ = row
        if not correction:
            tensors = [sample, output, *history[: len(earlier)]]
            if alone:
                return output, sample, affine_step(tensors, [kept, now, *earlier])
            nothing = [0.0] * len(earlier)
            out, converted, _ = denoised_step(tensors, [*reading, *nothing], [kept, 0.0, *earlier], x0_weight=now)
            return converted, sample, out
        # The output is the second of the tensors in every launch, so that error messages agree.
        of_last, *of_history, of_converted = correction
        before = history[: len(of_history)]
        if alone:
            converted = output
            corrected = affine_step([last, output, *before], [of_last, of_converted, *of_history])
        elif len(before) < MOST_ORDER:
            nothing = [0.0] * (1 + len(before))
            corrected, converted, _ = denoised_step(
                [sample, output, last, *before],
                [*reading, *nothing],
                [0.0, 0.0, of_last, *of_history],
                x0_weight=of_converted,
            )
        else:
            converted = affine_step([sample, output], [*reading])
            corrected = affine_step([last, *before, converted], [of_last, *of_history, of_converted])
        return (
            converted,
            corrected,
            affine_step([corrected, converted, *history[: len(earlier)]], [kept, now, *earlier]),
        )
