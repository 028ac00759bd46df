"""DPM-Solver++ of orders one to three, with its stochastic form: history, noise and update in one launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.arguments import constant
from bicm_diffusion.adapters.diffusers.drawing import Generators
from bicm_diffusion.adapters.diffusers.euler import edm_denoiser
from bicm_diffusion.adapters.diffusers.levels import (
    LEAST_SIGNAL,
    PREDICTIONS,
    Level,
    level_of,
    log_ratio,
    near_x0,
    reading_x0,
    step_of_no_length,
)
from bicm_diffusion.adapters.diffusers.outputs import as_output, as_state
from bicm_diffusion.adapters.diffusers.scheduler import GRAPH, on_tables
from bicm_diffusion.adapters.diffusers.sigmas import PlainStep, Sigmas, SigmaTables
from bicm_diffusion.adapters.diffusers.tables import Row, Tables
from bicm_kernels import affine_step
from bicm_kernels.inputs import SINGLE, output

#: How many tensors, or pairs of them, a step adds up.
MOST_TERMS = 5

ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++")
SOLVERS = ("midpoint", "heun")


def gains(to: Level, here: Level, h: float, *, order: int, noisy: bool) -> Row:
    """Weights of the state, of x0 and of its first two derivatives over a step of length h, and of noise."""
    (alpha, sigma), (_, sigma_here) = to, here
    if noisy:
        gain = -math.expm1(-2.0 * h)
        slope = alpha * (gain / (-2.0 * h) + 1.0) if order > 1 else 0.0
        curve = alpha * ((gain - 2.0 * h) / (2.0 * h) ** 2 - 0.5) if order == 3 else 0.0
        return sigma / sigma_here * math.exp(-h), alpha * gain, slope, curve, sigma * math.sqrt(gain)
    drop = math.expm1(-h)
    slope = alpha * (drop / h + 1.0) if order > 1 else 0.0
    curve = -alpha * ((drop + h) / h**2 - 0.5) if order == 3 else 0.0
    return sigma / sigma_here, -alpha * drop, slope, curve, 0.0


def solver_row(levels: list[Level], *, order: int, heun: bool, noisy: bool) -> Row:
    """Weights of the sample, of x0 now, one and two steps before, and of noise (DPM-Solver++ eq. 9 to 14).

    levels: the target, the current one, and as many earlier ones as the order needs.
    """
    lambdas = [log_ratio(level) for level in levels]
    h = lambdas[0] - lambdas[1]
    kept, first, slope, curve, deviation = gains(levels[0], levels[1], h, order=order, noisy=noisy)
    if order == 1:
        return kept, first, 0.0, 0.0, deviation
    before = (lambdas[1] - lambdas[2]) / h
    if order == 2:
        change = (slope if heun else 0.5 * first) / before
        return kept, first + change, -change, 0.0, deviation
    earlier = (lambdas[2] - lambdas[3]) / h
    # D1 = (1 + q)·d0 - q·d1 and D2 = (d0 - d1)/(before + earlier), of the slopes d0 and d1.
    share = before / (before + earlier)
    near = slope * (1.0 + share) + curve / (before + earlier)
    far = -slope * share - curve / (before + earlier)
    return kept, first + near / before, far / earlier - near / before, -far / earlier, deviation


@dataclass
class SolverTables(SigmaTables):
    #: Whether the schedule is short enough for lower orders at its end, and whether its last step is of the first.
    short: bool = False
    ends_low: bool = False
    #: How many steps, from the first, predict x0 as a small difference of large terms.
    cancelling: int = 0
    #: The configuration's order, and whether it draws noise, predicts x0, or has outputs that hold a variance too.
    order: int = 1
    noisy: bool = False
    gives_output: bool = False
    learned: bool = False


class _Solver(Sigmas):
    """Shared by both of diffusers' multistep solvers."""

    _kind: ClassVar[type[Tables]] = SolverTables
    model_outputs: list[Tensor | None]
    lower_order_nums: int
    _options: ClassVar[tuple[str, ...]] = (
        "prediction_type",
        "thresholding",
        "algorithm_type",
        "solver_order",
        "solver_type",
        "lower_order_final",
        "euler_at_final",
        "final_sigmas_type",
    )
    #: Whether the original draws its noise in float32 for every dtype of the model's output.
    _noise_dtype: torch.dtype | None = None

    _third_orders: tuple[str, ...] = ALGORITHMS
    #: Whether the model's input is scaled, and whether x0 may be a small difference of large terms.
    _scales = False
    _cancels = False

    def _level(self, sigma: float) -> Level:
        raise NotImplementedError

    def _reading(self, sigma: float) -> tuple[float, float]:
        """Weights of sample and output in x0."""
        raise NotImplementedError

    def _near(self, sigma: float) -> float:
        """The sum of x0's weights of sample and output, where they nearly cancel."""
        return 0.0

    def _uncovered(self) -> str | None:
        config = self.config
        if config.thresholding:
            return "thresholding"
        if config.algorithm_type not in ALGORITHMS:
            return f"algorithm_type={config.algorithm_type!r}"
        if config.solver_type not in SOLVERS:
            return f"solver_type={config.solver_type!r}"
        if config.solver_order not in (1, 2, 3):
            return f"solver_order={config.solver_order!r}"
        if config.solver_order == 3 and config.algorithm_type not in self._third_orders:
            return f"solver_order=3 with algorithm_type={config.algorithm_type!r}"
        return None

    def _row_of_order(self, tables: SolverTables, index: int, order: int) -> Row:
        config = self.config
        if index < order - 1:
            raise ValueError(f"step {index} has no {order - 1} before it")
        here = tables.levels[index]
        x0_sample, x0_output = self._reading(here)
        heun = config.solver_type == "heun"
        levels = [self._level(tables.levels[k]) for k in range(index + 1, index - order, -1)]
        if (order == 3 or (heun and order == 2)) and step_of_no_length(*levels[:2]):
            raise ZeroDivisionError
        kept, now, before, earlier, deviation = solver_row(
            levels, order=order, heun=heun, noisy=config.algorithm_type == ALGORITHMS[1]
        )
        of_sample, of_output = kept + now * x0_sample, now * x0_output
        return x0_sample, x0_output, of_sample, of_output, before, earlier, deviation, self._near(here)

    def _fill(self, tables: SolverTables) -> None:
        if self._scales:
            self._fill_scales(tables)
        config, count = self.config, len(tables.timesteps.values)
        tables.short = bool(config.lower_order_final) and count < 15
        tables.ends_low = tables.short or bool(config.euler_at_final) or config.final_sigmas_type == "zero"
        tables.order, tables.noisy = config.solver_order, config.algorithm_type == ALGORITHMS[1]
        tables.gives_output = config.prediction_type == "sample"
        learned = getattr(config, "variance_type", None) in ("learned", "learned_range")
        tables.learned = learned and config.prediction_type == "epsilon"
        if self.num_inference_steps is None or len(tables.levels) <= count:
            return
        for order in range(1, config.solver_order + 1):
            # Without noise at the end, only the first order is defined, and only it is used.
            tables.put(order, partial(self._row_of_order, tables, order=order), count)
        # The sample and its noise cancel in x0 where the signal is the smaller part.
        if self._cancels and self.config.prediction_type == "epsilon":
            signals = [self._level(sigma)[0] for sigma in tables.levels[:count]]
            tables.cancelling = next((index for index, alpha in enumerate(signals) if alpha >= LEAST_SIGNAL), count)
        for (order, index), row in tables.rows.items():
            if row is not None and not tables.noisy:
                tables.plain[order, index] = self._plain_step(tables, order, index, row)

    def _plain_step(self, tables: SolverTables, order: int, index: int, row: Any) -> PlainStep:
        x0_sample, x0_output, *weights, _, near = row
        scale = tables.scale_after(index) if self._scales else None
        none = (0.0,) * (order - 1)
        if index < tables.cancelling:  # see `_solve`
            return (0.0, 0.0, *none, near), (*weights[: order + 1], 0.0), x0_sample / near, scale
        return (x0_sample, x0_output, *none), tuple(weights[: order + 1]), None, scale

    def _launched(self, tables: SolverTables, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor | None:
        """The next state of a step without noise, of float32 tensors; None where no such step is known."""
        own = self.__dict__
        outputs, fewer, index = own["model_outputs"], own["lower_order_nums"], own["_step_index"]
        if len(outputs) != tables.order:
            return None
        if index is None:
            index = self._index(timestep)
        order = self._order(tables, index)
        plain = tables.plain.get((order, index))
        if plain is None:
            return None
        tensors: list[Any] = [sample, model_output]
        if order > 1:
            for x in outputs[:-order:-1]:
                if x is None or x.dtype is not torch.float32:
                    return None
                tensors.append(x)
        if plain[2] is not None:
            tensors.append((model_output, sample))
        out, x0 = self._take(own, tables, index, tensors, plain)
        del outputs[0]
        outputs.append(model_output if tables.gives_output else x0)
        if fewer < tables.order:
            own["lower_order_nums"] = fewer + 1
        return out

    def _order(self, tables: SolverTables, index: int) -> int:
        order, left = tables.order, len(tables.timesteps.values) - index
        if order == 1 or self.lower_order_nums < 1 or (left == 1 and tables.ends_low):
            return 1
        return 2 if order == 2 or self.lower_order_nums < 2 or (left == 2 and tables.short) else 3

    def _solve(
        self,
        tables: SolverTables | None,
        known: int,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generators,
        variance_noise: Tensor | None,
        return_dict: bool,
    ) -> Any:
        """The step, or None where the original has to run."""
        if known & SINGLE and tables is not None and variance_noise is None and self.num_inference_steps is not None:
            following = self._launched(tables, model_output, timestep, sample)
            if following is not None:
                return output(SchedulerOutput, "prev_sample", following) if return_dict else (following,)
        graph = known == GRAPH
        if tables is None or self.num_inference_steps is None or len(self.model_outputs) != tables.order:
            return None
        index = self._index(timestep)
        order = self._order(tables, index)
        row: Any = tables.row(order, index, sample.device if graph else None)
        history = self.model_outputs[:-order:-1] if order > 1 else []
        dtypes = sample.dtype, model_output.dtype
        if row is None or any(x is None or x.dtype not in dtypes for x in history):
            return None
        x0_sample, x0_output, of_sample, of_output, before, earlier, deviation, near = row
        state = as_state(sample, model_output)
        tensors: list[Any] = [state, model_output, *history]
        config = self._internal_dict
        noisy = config.algorithm_type == ALGORITHMS[1]
        weights = [of_sample, of_output, before, earlier][: 2 + len(history)]
        keyed: dict[str, Any] = {}
        if noisy and self._noise == "keyed" and variance_noise is None:
            seed, sample_id = self._key(generator, sample, index)
            keyed = {"noise_weight": deviation, "seed": seed, "step": index, "sample_id": sample_id}
        elif noisy:
            drawn = variance_noise
            if drawn is None:
                if any(x.shape != sample.shape for x in history):  # type: ignore[union-attr]
                    return None
                drawn = self._drawn(model_output, sample, generator, self._noise_dtype or state.dtype)
            elif not graph:
                constant(drawn)
            tensors.append(drawn.to(sample.device))
            weights.append(deviation)
        x0_weights = [x0_sample, x0_output, *[0.0] * (len(tensors) - 2)]
        late: Tensor | None = None
        if index < tables.cancelling:
            # A kernel takes five terms; the sixth is added afterwards.
            late = tensors.pop() if len(tensors) == MOST_TERMS else None
            # x0 = near·(m + g·(s - m)), in terms no larger than itself.
            keyed["guidance_scale"] = x0_sample / near
            tensors.append((model_output, state))
            x0_weights = [*[0.0] * (len(tensors) - 1), near]
            weights = [*weights[: len(tensors) - 1], 0.0]
        scale = self._next_scale(tables, index, state.dtype, sample, model_output, graph) if self._scales else None
        out, x0 = self._advance((tensors, x0_weights, weights), index, state.dtype, scale, **keyed)
        if late is not None:
            out = affine_step([out, late], [1.0, deviation])
        if config.prediction_type == "sample":
            out, x0 = out.to(model_output.dtype), model_output
        self.model_outputs[:-1] = self.model_outputs[1:]
        self.model_outputs[-1] = x0
        if self.lower_order_nums < config.solver_order:
            self.lower_order_nums += 1
        return as_output(graph, SchedulerOutput, out) if return_dict else (out,)


class DpmSolver(_Solver):
    _options = (*_Solver._options, "use_flow_sigmas", "variance_type")
    _noise_dtype = torch.float32
    _cancels = True

    def _uncovered(self) -> str | None:
        prediction = self.config.prediction_type
        if prediction not in PREDICTIONS:
            return f"prediction_type={prediction!r}"
        return super()._uncovered()

    def _level(self, sigma: float) -> Level:
        return level_of(sigma, self.config.use_flow_sigmas)

    def _reading(self, sigma: float) -> tuple[float, float]:
        return reading_x0(self.config.prediction_type, sigma, self._level(sigma))

    def _near(self, sigma: float) -> float:
        return near_x0(self.config.prediction_type, self._level(sigma), self.config.use_flow_sigmas)

    scale_model_input = DPMSolverMultistepScheduler.scale_model_input

    @on_tables
    def step(
        self,
        tables: SolverTables | None,
        known: int,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        if tables is not None and tables.learned:
            model_output = model_output[:, :3]
        return self._solve(tables, known, model_output, timestep, sample, generator, variance_noise, return_dict)


class EdmDpmSolver(_Solver):
    _options = (*_Solver._options, "sigma_data")
    _third_orders = ("dpmsolver++",)
    _scales = True

    def _uncovered(self) -> str | None:
        prediction = self.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            return f"prediction_type={prediction!r}"
        return super()._uncovered()

    def _level(self, sigma: float) -> Level:
        return 1.0, sigma

    def _scale(self, sigma: float) -> float:
        return 1.0 / math.sqrt(sigma * sigma + self.config.sigma_data**2)

    def _reading(self, sigma: float) -> tuple[float, float]:
        return edm_denoiser(sigma, self.config.sigma_data, self.config.prediction_type)

    @on_tables
    def step(
        self,
        tables: SolverTables | None,
        known: int,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        return self._solve(tables, known, model_output, timestep, sample, generator, None, return_dict)
