"""DEIS of orders one to three in log-rho: prediction, history and update in one launch."""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import Any, ClassVar

from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.drawing import traced
from bicm_diffusion.adapters.diffusers.levels import PREDICTIONS, level_of, noise_of_x0
from bicm_diffusion.adapters.diffusers.outputs import as_dtype, as_output, as_state
from bicm_diffusion.adapters.diffusers.scheduler import fused
from bicm_diffusion.adapters.diffusers.sigmas import Counted
from bicm_diffusion.adapters.diffusers.tables import Row, Tables
from bicm_kernels import denoised_step


def primitive(rho: float, logs: list[float]) -> float:
    """The integral over rho of the product of log(rho) - c, for up to two numbers c."""
    x = math.log(rho)
    if not logs:
        return rho
    if len(logs) == 1:
        return rho * (x - logs[0] - 1.0)
    b, c = logs
    return rho * (x * x - (b + c + 2.0) * x + b * c + b + c + 2.0)


def exponential_row(rhos: list[float]) -> Row:
    """Integrals of Lagrange's polynomials in log(rho) from the current level to the one to reach (DEIS eq. 15).

    rhos: the target, the current one, and as many earlier ones as the order needs.
    """
    to, here = rhos[:2]
    logs = [math.log(rho) for rho in rhos[1:]]
    weights = []
    for k, own in enumerate(logs):
        others = [x for j, x in enumerate(logs) if j != k]
        weights.append((primitive(to, others) - primitive(here, others)) / math.prod(own - x for x in others))
    return tuple(weights)


class Deis(Counted):
    model_outputs: list[Tensor | None]
    lower_order_nums: int

    _options: ClassVar[tuple[str, ...]] = (
        "prediction_type",
        "thresholding",
        "algorithm_type",
        "solver_order",
        "lower_order_final",
        "use_flow_sigmas",
    )

    def _uncovered(self) -> str | None:
        config = self.config
        if config.prediction_type not in PREDICTIONS:
            return f"prediction_type={config.prediction_type!r}"
        if config.thresholding:
            return "thresholding"
        if config.algorithm_type != "deis":
            return f"algorithm_type={config.algorithm_type!r}"
        return None if config.solver_order in (1, 2, 3) else f"solver_order={config.solver_order!r}"

    def _fill(self, tables: Tables) -> None:
        count = min(len(tables.timesteps.values), len(tables.levels) - 1)
        for order in range(1, self.config.solver_order + 1):
            tables.put(order, partial(self._row_of, tables, order=order), count)

    def _row_of(self, tables: Tables, index: int, order: int) -> Row:
        """Weights of sample and output in the predicted noise, of the sample, and of the noises in the result."""
        if index < order - 1:
            raise ValueError(f"step {index} has no {order - 1} before it")
        levels = [level_of(tables.levels[k], self.config.use_flow_sigmas) for k in range(index + 1, index - order, -1)]
        (alpha, sigma), (alpha_here, _) = levels[:2]
        if sigma <= 0.0 or min(level[0] for level in levels) <= 0.0:
            raise ValueError("a logarithm of zero")  # the original gives infinities
        rhos = [noise / signal for signal, noise in levels]
        weights = (alpha * weight for weight in exponential_row(rhos))
        reading = noise_of_x0(self.config.prediction_type, tables.levels[index], levels[1])
        return *reading, alpha / alpha_here, *weights

    def _order(self, tables: Tables, index: int) -> int:
        config, count = self._internal_dict, len(tables.timesteps.values)
        left = count - index if config.lower_order_final and count < 15 else 0
        if config.solver_order == 1 or self.lower_order_nums < 1 or left == 1:
            return 1
        return 2 if config.solver_order == 2 or self.lower_order_nums < 2 or left == 2 else 3

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
        if tables is None or len(self.model_outputs) != most:
            return None
        index = self._index(timestep)
        order = self._order(tables, index)
        row: Any = tables.row(order, index, sample.device if graph else None)
        history: list[Any] = self.model_outputs[:-order:-1] if order > 1 else []
        if row is None or any(x is None for x in history):
            return None
        of_sample, of_output, kept, now, *earlier = row
        state = as_state(sample, model_output)
        tensors = [reduce(as_state, history, state), model_output, *history]
        nothing = [0.0] * len(history)
        out, noise, _ = denoised_step(tensors, [of_sample, of_output, *nothing], [kept, 0.0, *earlier], x0_weight=now)
        self.model_outputs[:-1] = self.model_outputs[1:]
        self.model_outputs[-1] = as_dtype(noise, state.dtype)
        if self.lower_order_nums < most:
            self.lower_order_nums += 1
        self._step_index = index + 1
        return as_output(graph, SchedulerOutput, out) if return_dict else (out,)
