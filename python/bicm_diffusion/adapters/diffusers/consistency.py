"""Consistency models' multistep sampling and latent consistency models: denoise, clip and renoise in one launch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar

from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeSchedulerOutput
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.alphas import LEAST, PREDICTIONS, reading, reading_of_pair
from bicm_diffusion.adapters.diffusers.arguments import host_value, is_whole
from bicm_diffusion.adapters.diffusers.drawing import Generators
from bicm_diffusion.adapters.diffusers.outputs import as_output, as_state
from bicm_diffusion.adapters.diffusers.scheduler import GRAPH, on_tables
from bicm_diffusion.adapters.diffusers.sigmas import ROWS, Counted, Sigmas, SigmaTables
from bicm_diffusion.adapters.diffusers.tables import Number, Row, Tables, is_double, single
from bicm_kernels import add_noise, affine_step, denoised_step
from bicm_kernels.inputs import ALIKE, output

#: The standard deviation of the data that latent consistency models are written for.
LCM_SIGMA_DATA = 0.5
#: Below this alpha-bar, a clipped x0 is read from the pair of noise and sample, where it loses less by rounding.
PAIR_BELOW = 0.75


@dataclass
class ConsistencyTables(SigmaTables):
    #: The bound at which x0 is clipped, if any.
    clip: float | None = None


@dataclass
class LatentTables(Tables):
    clip: float | None = None
    #: How many steps, from the first, read a clipped x0 from the pair of noise and sample.
    paired: int = 0
    #: Steps without clipping or keyed noise: weights in x0 and in the result, of x0 in it, and whether it is the last.
    plain: dict[int, tuple[Row, Row, Number, bool]] = field(default_factory=dict)


class ConsistencyModel(Sigmas):
    _kind: ClassVar[type[Tables]] = ConsistencyTables
    _options = ("sigma_data", "sigma_min", "sigma_max", "s_noise", "num_train_timesteps", "clip_denoised")

    def _scale(self, sigma: float) -> float:
        return 1.0 / math.sqrt(sigma * sigma + self.config.sigma_data**2)

    def _fill(self, tables: ConsistencyTables) -> None:
        super()._fill(tables)
        tables.clip = 1.0 if self.config.clip_denoised else None
        for (_, index), row in tables.rows.items():
            if row is not None:
                c_skip, c_out, deviation = row
                one = len(tables.timesteps.values) == 1  # which draws no noise
                x0_weights, weights = ((c_skip, c_out, 0.0), (0.0, 0.0, deviation))
                plain = (x0_weights[:2], weights[:2]) if one else (x0_weights, weights)
                tables.plain[index] = *plain, None, tables.scale_after(index)

    def _row(self, tables: ConsistencyTables, index: int) -> Row:
        """c_skip, c_out and the deviation of fresh noise (consistency models, appendix C and algorithm 1)."""
        config, sigma = self.config, tables.levels[index]
        data, low = config.sigma_data, config.sigma_min
        passed = sigma - low
        below = tables.levels[index + 1] if index + 1 < config.num_train_timesteps else tables.levels[-1]
        level = min(max(below, low), config.sigma_max)
        fresh = config.s_noise * math.sqrt(level**2 - low**2)
        return data**2 / (passed**2 + data**2), passed * data / math.sqrt(sigma**2 + data**2), fresh

    @on_tables
    def step(
        self,
        tables: ConsistencyTables | None,
        known: int,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        graph = known == GRAPH
        if tables is None or is_whole(timestep) or not self.is_scale_input_called:
            return None
        index = self._index(timestep)
        plain = tables.plain.get(index) if known & ALIKE and self._noise != "keyed" else None
        if plain is not None:
            tensors = [sample, model_output]
            if len(plain[0]) > 2:
                tensors.append(self._drawn_alike(known, model_output, sample, generator))
            out, _ = self._take(self.__dict__, tables, index, tensors, plain, 1.0, tables.clip)
            return output(CMStochasticIterativeSchedulerOutput, "prev_sample", out) if return_dict else (out,)
        row: Any = tables.row(ROWS, index, sample.device if graph else None)
        if row is None:
            return None
        c_skip, c_out, deviation = row
        state = as_state(sample, model_output)
        tensors, weights = [state, model_output], [0.0, 0.0]
        keyed: dict[str, Any] = {}
        if len(tables.timesteps.values) > 1:
            keyed = self._noisy(tensors, weights, deviation, index, generator, model_output, sample)
        scale = self._next_scale(tables, index, state.dtype, sample, model_output, graph)
        terms = tensors, [c_skip, c_out], weights
        out, _ = self._advance(terms, index, state.dtype, scale, x0_weight=1.0, clip=tables.clip, **keyed)
        return as_output(graph, CMStochasticIterativeSchedulerOutput, out) if return_dict else (out,)


def _denoising(row: Any, *, shares: bool) -> Any:
    """Weights of sample and output in the denoised sample; shares: as the kernel rounds them to float32."""
    x0_sample, x0_output, skip, out, *_ = row
    exact = out * x0_sample + skip
    if not shares:
        return exact, out * x0_output
    # The two terms may cancel: they share the rounding of the first weight.
    shared = single(exact)
    return shared, out * x0_output * (shared / exact)


class LatentConsistencyModel(Counted):
    _kind: ClassVar[type[Tables]] = LatentTables
    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    _sources = ("alphas_cumprod", "timesteps", "final_alpha_cumprod")
    _options = ("prediction_type", "thresholding", "clip_sample", "clip_sample_range", "timestep_scaling")

    def _host_levels(self) -> list[float]:
        return self.alphas_cumprod.tolist()

    def _uncovered(self) -> str | None:
        if self.config.thresholding:
            return "thresholding"
        if self.config.prediction_type not in PREDICTIONS:
            return f"prediction_type={self.config.prediction_type!r}"
        return None

    def _fill(self, tables: LatentTables) -> None:
        self.sigma_data = LCM_SIGMA_DATA  # the original sets it in its first step
        tables.clip = float(self.config.clip_sample_range) if self.config.clip_sample else None
        if self.config.clip_sample and self.config.prediction_type == "epsilon":
            times, levels = tables.timesteps.values, tables.levels
            clear = (k for k, t in enumerate(times) if 0 <= t < len(levels) and levels[int(t)] >= PAIR_BELOW)
            tables.paired = next(clear, len(times))
        tables.put(ROWS, lambda index: self._row(tables, index), len(tables.timesteps.values))
        if self.config.clip_sample or self.num_inference_steps is None:
            return
        for (_, index), row in tables.rows.items():
            if row is not None:
                weights = _denoising(row, shares=self.config.prediction_type != "sample")
                last = index == self.num_inference_steps - 1
                kept, deviation = row[4:]
                x0_weights = weights if last else (*weights, 0.0)
                tables.plain[index] = x0_weights, (0.0, 0.0, deviation), kept, last

    def _row(self, tables: LatentTables, index: int) -> Row:
        """Weights of sample and output in x0, c_skip and c_out, then of the denoised sample and of fresh noise.

        In the first `paired` steps the first two are the weight and the scale of the pair that x0 is read from.
        """
        times = tables.timesteps.values
        here, below = int(times[index]), int(times[min(index + 1, len(times) - 1)])
        if max(here, below) >= len(tables.levels):
            raise ValueError("more timesteps than betas that were given")  # as the original does
        level = tables.levels[below] if below >= 0 else float(self.final_alpha_cumprod)
        scaled = here * self.config.timestep_scaling
        total = scaled**2 + LCM_SIGMA_DATA**2
        a = tables.levels[here]
        if index < tables.paired:
            if a < LEAST:
                raise ValueError("no signal")  # the weights leave float32's range
            of_sample, of_output = reading_of_pair(a)
        else:
            of_sample, of_output, *_ = reading(self.config.prediction_type, a)
        skip, out = LCM_SIGMA_DATA**2 / total, scaled / math.sqrt(total)
        return float(of_sample), float(of_output), skip, out, math.sqrt(level), math.sqrt(1.0 - level)

    @on_tables
    def step(
        self,
        tables: LatentTables | None,
        known: int,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        graph = known == GRAPH
        if tables is None or self.num_inference_steps is None:
            return None
        index = self._index(timestep)
        row: Any = tables.row(ROWS, index, sample.device if graph else None)
        if not graph and row is not None:
            # The original looks up alpha-bar by the timestep argument, for every step.
            value = host_value(timestep, tables.timesteps)
            if not isinstance(value, Integral) or value != tables.timesteps.values[index]:
                return None
        if row is None:
            return None
        plain = tables.plain.get(index) if known & ALIKE and self._noise != "keyed" else None
        if plain is not None:
            x0_weights, all_weights, of_x0, is_last = plain
            if is_last:
                previous = denoised = affine_step([sample, model_output], x0_weights)
            else:
                tensors = [sample, model_output, self._drawn_alike(known, model_output, sample, generator)]
                previous, denoised, _ = denoised_step(tensors, x0_weights, all_weights, x0_weight=of_x0)
            self._step_index = index + 1
            if not return_dict:
                return previous, denoised
            return output(LCMSchedulerOutput, "prev_sample", previous, "denoised", denoised)
        x0_sample, x0_output, skip, out, kept, deviation = row
        state, config = as_state(sample, model_output), self._internal_dict
        if config.clip_sample:
            terms: list[Any] = [state, model_output]
            reads, keyed = [x0_sample, x0_output], {}
            if index < tables.paired:
                terms, reads, keyed = [state, (model_output, state)], [0.0, x0_sample], {"guidance_scale": x0_output}
            denoised, _, _ = denoised_step(terms, reads, [skip, 0.0], x0_weight=out, clip=tables.clip, **keyed)
            following = self._renoised(denoised, None, (1.0, 0.0), index, (kept, deviation), model_output, generator)
        else:
            weights = _denoising(row, shares=config.prediction_type != "sample" and not is_double(state))
            following = self._renoised(state, model_output, weights, index, (kept, deviation), model_output, generator)
            denoised = following[1]
        self._step_index = index + 1
        previous = following[0]
        return (
            as_output(graph, LCMSchedulerOutput, previous, "denoised", denoised)
            if return_dict
            else (previous, denoised)
        )

    def _renoised(
        self,
        state: Tensor,
        output: Tensor | None,
        weights: tuple[Any, Any],
        index: int,
        levels: tuple[Any, Any],
        like: Tensor,
        generator: Generators,
    ) -> tuple[Tensor, Tensor]:
        """The next state and the denoised sample; at the last step they are the same."""
        kept, deviation = levels
        tensors = [state] if output is None else [state, output]
        x0_weights = list(weights[: len(tensors)])
        assert self.num_inference_steps is not None
        if index == self.num_inference_steps - 1:
            last = state if output is None else affine_step(tensors, x0_weights)
            return last, last
        if self._noise == "keyed":
            seed, sample_id = self._key(generator, like, index)
            if output is None:
                renoised = add_noise(state, deviation, scale=kept, seed=seed, step=index, sample_id=sample_id)
                return renoised, state
            result = denoised_step(
                tensors,
                x0_weights,
                [0.0] * len(tensors),
                x0_weight=kept,
                noise_weight=deviation,
                seed=seed,
                step=index,
                sample_id=sample_id,
            )
            return result[0], result[1]
        noise = self._drawn(like, state, generator, state.dtype)
        if output is None:
            return affine_step([state, noise], [kept, deviation]), state
        result = denoised_step(
            [*tensors, noise], [*x0_weights, 0.0], [0.0] * len(tensors) + [deviation], x0_weight=kept
        )
        return result[0], result[1]
