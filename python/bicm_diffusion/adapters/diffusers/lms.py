"""Linear multistep: the polynomial through the last derivatives, integrated in closed form instead of by quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, ClassVar

from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.drawing import traced
from bicm_diffusion.adapters.diffusers.euler import euler_weights
from bicm_diffusion.adapters.diffusers.outputs import as_dtype, as_output, as_state
from bicm_diffusion.adapters.diffusers.scheduler import fused
from bicm_diffusion.adapters.diffusers.sigmas import Sigmas, SigmaTables
from bicm_diffusion.adapters.diffusers.tables import Row, Tables
from bicm_kernels import affine_step

#: The default of `step`; its rows exist before a graph is made. For higher orders the original runs.
ORDER = 4


def multistep_row(levels: list[float]) -> Row:
    """Integrals of Lagrange's polynomials from the second level to the first (Adams-Bashforth on any grid).

    levels: the target, the current one, and the earlier ones, as many as the order, which is at most four.
    """
    to, *nodes = levels
    middle, half = (nodes[0] + to) / 2.0, (to - nodes[0]) / 2.0
    weights = []
    for k, own in enumerate(nodes):
        others = [x for j, x in enumerate(nodes) if j != k]
        # Two-point Gauss quadrature is exact up to degree three.
        values = [math.prod((middle + half * x - b) / (own - b) for b in others) for x in (-(3**-0.5), 3**-0.5)]
        weights.append(half * sum(values))
    return tuple(weights)


@dataclass
class LmsTables(SigmaTables):
    #: The orders that rows were made for.
    orders: set[int] = field(default_factory=set)


class Lms(Sigmas):
    derivatives: list[Any]

    _kind: ClassVar[type[Tables]] = LmsTables
    _options = ("prediction_type",)
    #: The orders that steps were called with, so that a graph finds their rows.
    _orders: tuple[int, ...] = (ORDER,)

    def _uncovered(self) -> str | None:
        prediction = self.config.prediction_type
        return None if prediction in ("epsilon", "sample", "v_prediction") else f"prediction_type={prediction!r}"

    def _scale(self, sigma: float) -> float:
        return 1.0 / math.sqrt(sigma * sigma + 1.0)

    def _fill(self, tables: LmsTables) -> None:
        self._fill_scales(tables)
        for order in self._orders:
            self._put(tables, order)

    def _put(self, tables: LmsTables, order: int) -> None:
        tables.orders.add(order)
        count = min(len(tables.timesteps.values), len(tables.levels) - 1)
        tables.put(order, partial(self._row_of, tables, order=order), count)

    def _row_of(self, tables: LmsTables, index: int, order: int) -> Row:
        """Weights of sample and output in x0, in the derivative, and of the derivatives in the result."""
        sigma = tables.levels[index]
        x0_sample, x0_output, *_ = euler_weights(self.config.prediction_type, sigma, sigma, sigma)
        used = min(index + 1, order)
        weights = multistep_row([tables.levels[k] for k in range(index + 1, index - used, -1)])
        derivative = (1.0 - x0_sample) / sigma, -x0_output / sigma
        return x0_sample, x0_output, *derivative, *weights, *[0.0] * (order - used)

    @fused
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = ORDER,
        return_dict: bool = True,
    ) -> Any:
        graph = traced()
        tables = self._ready(graph)
        if tables is None or not self.is_scale_input_called:
            return None
        if type(order) is not int or not 1 <= order <= ORDER:
            if graph:
                return None
            raise TypeError(f"order={order!r}")
        index = self._index(timestep)
        if order not in tables.orders:
            if graph:
                return None
            self._orders = (*self._orders, order)
            self._put(tables, order)
        row: Any = tables.row(order, index, sample.device if graph else None)
        kept = self.derivatives if len(self.derivatives) < order else self.derivatives[1:]
        used = min(index + 1, order)
        # The original pairs the available ones, newest first.
        history: list[Any] = kept[::-1][: used - 1]
        if row is None or len(kept) >= order:
            return None
        state = as_state(sample, model_output)
        wide = reduce(as_state, history, state)
        x0_sample, x0_output, of_sample, of_output, now, *earlier = row
        weights = [1.0 + now * of_sample, now * of_output, *earlier[: len(history)]]
        derivative = affine_step([state, model_output], [of_sample, of_output])
        scale = self._next_scale(tables, index, wide.dtype, sample, model_output, graph)
        terms = [wide, model_output, *history], [x0_sample, x0_output], weights
        out, x0 = self._advance(terms, index, wide.dtype, scale)
        x0 = model_output if self._internal_dict.prediction_type == "sample" else as_dtype(x0, state.dtype)
        self.derivatives.append(derivative)
        if len(self.derivatives) > order:
            self.derivatives.pop(0)
        cls = LMSDiscreteSchedulerOutput
        return as_output(graph, cls, out, "pred_original_sample", x0) if return_dict else (out, x0)
