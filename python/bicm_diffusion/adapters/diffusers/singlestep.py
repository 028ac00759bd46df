"""Singlestep DPM-Solver and DPM-Solver++ of orders one to three."""

from __future__ import annotations

import math
from functools import partial, reduce
from itertools import pairwise
from typing import Any, ClassVar

from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.dpmsolver import MOST_TERMS, SOLVERS, gains
from bicm_diffusion.adapters.diffusers.drawing import Generators, traced
from bicm_diffusion.adapters.diffusers.levels import (
    PREDICTIONS,
    Level,
    level_of,
    log_ratio,
    near_x0,
    reading_noise,
    reading_x0,
    step_of_no_length,
)
from bicm_diffusion.adapters.diffusers.outputs import as_dtype, as_output, as_state
from bicm_diffusion.adapters.diffusers.scheduler import fused
from bicm_diffusion.adapters.diffusers.sigmas import Counted
from bicm_diffusion.adapters.diffusers.tables import Row, Tables
from bicm_kernels import affine_step, denoised_step

ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver")


def noise_gains(to: Level, here: Level, h: float, *, order: int) -> Row:
    """The same as `gains`, of the predicted noise (DPM-Solver eq. 3.4)."""
    (alpha, sigma), (alpha_here, _) = to, here
    rise = math.expm1(h)
    slope = -sigma * (rise / h - 1.0) if order > 1 else 0.0
    curve = -sigma * ((rise - h) / h**2 - 0.5) if order == 3 else 0.0
    return alpha / alpha_here, -sigma * rise, slope, curve, 0.0


def single_row(levels: list[Level], *, heun: bool, algorithm: str) -> Row:
    """Weights of the state at the first step's start, of the current and earlier predictions, and of noise.

    levels: the target, the current one, and the earlier ones; the last is the level at which the first step began.
    """
    order = len(levels) - 1
    if order > 1 and any(step_of_no_length(*pair) for pair in pairwise(levels)):
        raise ZeroDivisionError
    to, *lambdas = (log_ratio(level) for level in levels)
    h = to - lambdas[-1]
    if algorithm == "dpmsolver":
        kept, first, slope, curve, deviation = noise_gains(levels[0], levels[-1], h, order=order)
    else:
        noisy = algorithm == ALGORITHMS[1]
        kept, first, slope, curve, deviation = gains(levels[0], levels[-1], h, order=order, noisy=noisy)
    if order == 1:
        return kept, first, 0.0, 0.0, deviation
    near = (lambdas[0] - lambdas[-1]) / h
    if order == 2:
        change = (slope if heun else 0.5 * first) / near
        return kept, change, first - change, 0.0, deviation
    far = (lambdas[1] - lambdas[-1]) / h
    if heun:
        # D1 = (near·a - far·b)/(near - far) and D2 = 2 (b - a)/(near - far), of the slopes a and b.
        a, b = (near * slope - 2.0 * curve) / (near - far), (2.0 * curve - far * slope) / (near - far)
    else:
        a, b = 0.0, slope
    return kept, b / near, a / far, first - a / far - b / near, deviation


def _cycled(orders: list[int], length: int, index: int) -> int:
    """orders[index], by comparisons that hold for many steps: reading a list would make a graph for each index."""
    regular = 0
    while regular < len(orders) and orders[regular] == regular % length + 1:
        regular += 1
    if index < regular:
        for order in range(1, length + 1):
            if index % length == order - 1:
                return order
    return orders[index]


class DpmSolverSinglestep(Counted):
    model_outputs: list[Any]
    order_list: list[int]
    sample: Any

    _options: ClassVar[tuple[str, ...]] = (
        "prediction_type",
        "thresholding",
        "algorithm_type",
        "solver_order",
        "solver_type",
        "use_flow_sigmas",
        "variance_type",
    )

    def _uncovered(self) -> str | None:
        config = self.config
        known = PREDICTIONS[:3] if config.algorithm_type == "dpmsolver" else PREDICTIONS
        if config.prediction_type not in known:
            return f"prediction_type={config.prediction_type!r}"
        if config.thresholding:
            return "thresholding"
        if config.algorithm_type not in ALGORITHMS:
            return f"algorithm_type={config.algorithm_type!r}"
        if config.solver_type not in SOLVERS:
            return f"solver_type={config.solver_type!r}"
        return None if config.solver_order in (1, 2, 3) else f"solver_order={config.solver_order!r}"

    def _fill(self, tables: Tables) -> None:
        count = min(len(tables.timesteps.values), len(tables.levels) - 1)
        for order in range(1, self.config.solver_order + 1):
            tables.put(order, partial(self._row_of, tables, order=order), count)

    def _row_of(self, tables: Tables, index: int, order: int) -> Row:
        """Weights of sample and output in the prediction, those of the step, and the sum of the first two."""
        if index < order - 1:
            raise ValueError(f"step {index} has no {order - 1} before it")
        config, sigma = self.config, tables.levels[index]
        levels = [level_of(tables.levels[k], config.use_flow_sigmas) for k in range(index + 1, index - order, -1)]
        if config.algorithm_type == "dpmsolver":
            reading, near = reading_noise(config.prediction_type, levels[1]), 0.0
        else:
            reading = reading_x0(config.prediction_type, sigma, levels[1])
            near = near_x0(config.prediction_type, levels[1], config.use_flow_sigmas)
        return *reading, *single_row(levels, heun=config.solver_type == "heun", algorithm=config.algorithm_type), near

    def _order(self, index: int) -> int:
        """The scheduled order, limited by the number of outputs available."""
        orders = self.order_list
        order = _cycled(orders, self._internal_dict.solver_order, index) if traced() else orders[index]
        while order > 1 and self.model_outputs[-order + 1] is None:
            order -= 1
        return order

    @fused
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        graph = traced()
        tables = self._ready(graph) if self.num_inference_steps is not None else None
        config = self._internal_dict
        if tables is None or len(self.model_outputs) != config.solver_order:
            return None
        output = model_output
        if config.variance_type in ("learned", "learned_range") and config.prediction_type == "epsilon":
            output = model_output[:, :3]
        index = self._index(timestep)
        if not 0 <= index < len(self.order_list):
            return None
        order = self._order(index)
        row: Any = tables.row(order, index, sample.device if graph else None)
        history: list[Any] = self.model_outputs[:-order:-1] if order > 1 else []
        began = sample if order == 1 else self.sample
        if row is None or began is None or any(x is None for x in history):
            return None
        of_sample, of_output, kept, now, before, earlier, deviation, near = row
        state = as_state(sample, output)
        # The prediction may be the output itself, in its own dtype.
        plain = config.algorithm_type == "dpmsolver"
        alone = config.prediction_type == ("epsilon" if plain else "sample")
        own = output if alone else state
        wide = reduce(as_state, (own, *history), began)
        tensors: list[Any] = [wide, *history]
        weights, keyed = [kept, before, earlier][: len(tensors)], {}
        if config.algorithm_type == ALGORITHMS[1]:
            if any(x.shape != sample.shape for x in (began, *history)):
                return None
            keyed = self._noisy(tensors, weights, deviation, index, generator, output, sample, own.dtype)
        late: Tensor | None = None
        if alone:
            out, converted = affine_step([*tensors, output], [*weights, now], **keyed), output
        else:
            if config.prediction_type == "epsilon":
                # x0 = near (m + g (s - m)), in terms no larger than itself.
                keyed["guidance_scale"] = of_sample / near
                terms: list[Any] = [(output, state)]
                reading = [near]
            else:
                terms, reading = [state, output], [of_sample, of_output]
                # A kernel takes five terms; the sixth is added afterwards.
                late = tensors.pop() if len(tensors) + len(terms) > MOST_TERMS else None
            nothing = [0.0] * len(terms)
            out, converted, _ = denoised_step(
                [*tensors, *terms],
                [*[0.0] * len(tensors), *reading],
                [*weights[: len(tensors)], *nothing],
                x0_weight=now,
                **keyed,
            )
        if late is not None:
            out = affine_step([out, late], [1.0, deviation])
        self.model_outputs[:-1] = self.model_outputs[1:]
        self.model_outputs[-1] = as_dtype(converted, own.dtype)
        if order == 1:
            self.sample = sample
        self._step_index = index + 1
        return as_output(graph, SchedulerOutput, out) if return_dict else (out,)
