"""Schedulers that look up alpha-bar by the timestep: their tables, a step's weights, and the launch of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from bicm_diffusion.adapters.diffusers.arguments import host_value
from bicm_diffusion.adapters.diffusers.drawing import Generators, traced
from bicm_diffusion.adapters.diffusers.log_prob import per_sample, with_log_prob
from bicm_diffusion.adapters.diffusers.outputs import as_output, as_state
from bicm_diffusion.adapters.diffusers.scheduler import Accelerated
from bicm_diffusion.adapters.diffusers.tables import Number, Row, Tables, root, single
from bicm_kernels import denoised_step
from bicm_kernels.inputs import SINGLE, output

PREDICTIONS = ("epsilon", "sample", "v_prediction")


#: Below this alpha-bar, the sample and the noise in it cancel to less than half when x0 is predicted.
CANCELS = 0.25
#: Below this one, the weights that compensate the cancellation leave float32's range.
LEAST = 1e-30


def reading(prediction: str, a: Number) -> tuple[Number, Number, Number, Number]:
    """Weights of the sample and the model's output in x0, then in the predicted noise; a is alpha-bar."""
    ra, rb = root(a), root(1.0 - a)
    if prediction == "epsilon":
        return 1.0 / ra, -rb / ra, 0.0, 1.0
    if prediction == "sample":
        return 0.0, 1.0, 1.0 / rb, -ra / rb
    return ra, -rb, rb, ra


def reading_of_pair(a: Number) -> tuple[Number, Number]:
    """Weight and scale of the pair of noise and sample in x0: w·(m + g·(s - m)) is (s - rb·m)/ra.

    Its terms are no larger than x0 itself, so that nothing is lost where sample and noise cancel.
    """
    share = a / (1.0 + root(1.0 - a))  # 1 - rb
    return share / root(a), 1.0 / share


def quotient(a: Number, below: Number, rounds: bool) -> Number:
    """alpha of one step; rounded to float32 where the original is: of a short step, 1 - alpha has few digits left."""
    return single(a / below) if rounds else a / below


def ddim_row(
    prediction: str, a: Number, below: Number, eta: float, *, rounds: bool, clips: bool, rederives: bool
) -> Row:
    """x0's weights of sample and output, then the result's, of x0 and of noise (DDIM eq. 12 and 16).

    The last two numbers are for levels where sample and noise cancel, see `reading_of_pair`.
    """
    x0_sample, x0_output, eps_sample, eps_output = reading(prediction, a)
    deviation = eta * root((1.0 - below) / (1.0 - a) * (1.0 - quotient(a, below, rounds))) if eta else 0.0
    kept, direction = root(below), root(1.0 - below - deviation * deviation)
    ra, rb = root(a), root(1.0 - a)
    near: tuple[Number, Number] = reading_of_pair(a) if prediction == "epsilon" else (0.0, 0.0)
    if clips and rederives:
        return x0_sample, x0_output, direction / rb, 0.0, kept - direction * ra / rb, deviation, *near
    if clips:
        return x0_sample, x0_output, direction * eps_sample, direction * eps_output, kept, deviation, *near
    sample = kept * x0_sample + direction * eps_sample
    output = kept * x0_output + direction * eps_output
    return x0_sample, x0_output, sample, output, 0.0, deviation, *near


@dataclass
class AlphaTables(Tables):
    #: How many training timesteps are between two steps.
    gap: int = 0
    #: The bound at which x0 is clipped, if any.
    clip: float | None = None
    #: Whether x0 is what the model predicts.
    gives_output: bool = False
    #: Whether a number of steps is set.
    is_set: bool = False
    #: By the timestep, steps without noise as they are launched: weights in x0 and in the result, of x0 and of a pair.
    plain: dict[int, tuple[Row, Row, Number, Number | None]] = field(default_factory=dict)


class Alphas(Accelerated):
    """Schedulers that look up alpha-bar by the timestep itself."""

    _kind: ClassVar[type[Tables]] = AlphaTables
    alphas_cumprod: Tensor
    #: The attribute that holds the level beyond the schedule's end.
    _beyond: ClassVar[str]
    #: Whether x0 may be clipped.
    _clips: ClassVar[bool] = True
    _options: ClassVar[tuple[str, ...]] = ("num_train_timesteps", "prediction_type", "clip_sample", "clip_sample_range")

    def _fill(self, tables: AlphaTables) -> None:
        tables.clip = float(self.config.clip_sample_range) if self._clips and self.config.clip_sample else None
        tables.gives_output = self.config.prediction_type == "sample"
        tables.is_set = bool(self.num_inference_steps)
        tables.gap = self.config.num_train_timesteps // self.num_inference_steps if self.num_inference_steps else 0

    def _host_levels(self) -> list[float]:
        return [*self.alphas_cumprod.tolist(), float(getattr(self, self._beyond))]

    def _uncovered(self) -> str | None:
        if self.config.prediction_type not in PREDICTIONS:
            return f"prediction_type={self.config.prediction_type!r}"
        return None

    def _levels_at(
        self, timestep: Any, other: Any, tables: AlphaTables, sample: Tensor
    ) -> tuple[Number, Number] | None:
        """Alpha-bar at two timesteps; None for a missing one; negative ones are beyond the schedule's end."""
        if traced():
            beyond = getattr(self, self._beyond).double().reshape(1)
            levels = torch.cat([self.alphas_cumprod.double(), beyond]).to(sample.device)
            if not isinstance(timestep, Tensor):
                return levels[max(timestep, -1)], levels[max(other, -1)]
            both = torch.stack([timestep, other]).to(levels.device).clamp(min=-1) % len(levels)
            here, there = levels.index_select(0, both).unbind()
            return here, there
        whole = isinstance(timestep, int | Integral) and isinstance(other, int | Integral)
        if not whole or max(timestep, other) >= len(tables.levels) - 1:
            return None
        return tables.levels[max(int(timestep), -1)], tables.levels[max(int(other), -1)]

    def _ends(self, timestep: Any, tables: AlphaTables) -> tuple[Any, Any]:
        """The timesteps of the current state and of the next one."""
        raise NotImplementedError

    def _row_at(
        self, tables: AlphaTables, timestep: Any, sample: Tensor, graph: bool, eta: float = 0.0, rederives: bool = False
    ) -> Any:
        """A step's weights, or None where the original has to run."""
        kept = not graph and type(timestep) is int and type(eta) in (float, int)
        key = timestep, eta, bool(rederives)
        row = tables.rows.get(key) if kept else None
        if row is not None:
            return row
        levels = self._levels_at(*self._ends(timestep, tables), tables, sample)
        if levels is None or not (graph or timestep >= 0):
            return None
        row = self._row(levels, eta, rederives)
        if kept:
            tables.rows[key] = row
        return row

    def _row(self, levels: tuple[Number, Number], eta: float, rederives: bool) -> Any:
        config = self.config
        try:
            row: Row | None = ddim_row(
                config.prediction_type,
                *levels,
                eta,
                rounds=self.alphas_cumprod.dtype is torch.float32,
                clips=self._clips and config.clip_sample,
                rederives=rederives,
            )
        except (ZeroDivisionError, ValueError, OverflowError):
            row = None  # a level without signal or without noise: the original gives infinities
        if not traced():
            predicts_noise = config.prediction_type == "epsilon"
            if predicts_noise and levels[0] < LEAST:
                row = None
            elif row is not None and not (predicts_noise and levels[0] < CANCELS):
                row = row[:6]
            return row
        assert row is not None
        if config.prediction_type != "epsilon":
            return row[:6]
        # A graph cannot choose the table row to read: it selects between weights.
        x0_sample, x0_output, *rest, near, guidance = map(torch.as_tensor, row)
        cancels, zero = torch.as_tensor(levels[0]) < CANCELS, torch.zeros_like(near)
        plain = [torch.where(cancels, zero, x) for x in (x0_sample, x0_output)]
        return *plain, *rest, torch.where(cancels, near, zero), torch.where(cancels, guidance, zero)

    def _plain(
        self,
        tables: AlphaTables | None,
        output: Tensor,
        timestep: Any,
        sample: Tensor,
        graph: bool,
        cls: Any,
        return_dict: bool,
    ) -> Any:
        """A step without noise, or None where the original has to run."""
        if tables is None:
            return None
        at = timestep if graph else host_value(timestep, tables.timesteps)
        row = self._row_at(tables, at, sample, graph)
        if row is None:
            return None
        out, x0 = self._two(tables, as_state(sample, output), output, row)
        return as_output(graph, cls, out, "pred_original_sample", x0) if return_dict else (out, x0)

    def _launched(
        self,
        tables: AlphaTables | None,
        known: int,
        timestep: Any,
        sample: Tensor,
        model_output: Tensor,
        cls: Any,
        return_dict: bool,
    ) -> Any:
        """A step without noise, of float32 tensors; None where no such step is known."""
        if not known & SINGLE or tables is None or not tables.is_set:
            return None
        at = timestep if type(timestep) is int else host_value(timestep, tables.timesteps)
        plain = tables.plain.get(at)
        if plain is None:
            plain = self._plain_step(tables, at, sample)
            if plain is None:
                return None
        x0_weights, weights, of_x0, guidance = plain
        tensors: list[Any] = [sample, model_output]
        if guidance is not None:
            tensors.append((model_output, sample))
        out, x0, _ = denoised_step(
            tensors, x0_weights, weights, x0_weight=of_x0, clip=tables.clip, guidance_scale=guidance
        )
        return output(cls, "prev_sample", out, "pred_original_sample", x0) if return_dict else (out, x0)

    def _plain_step(self, tables: AlphaTables, timestep: Any, sample: Tensor) -> Any:
        """A row of `AlphaTables.plain`, which is made here."""
        row = self._row_at(tables, timestep, sample, graph=False) if type(timestep) is int else None
        if row is None:
            return None
        x0_sample, x0_output, of_sample, of_output, of_x0, _, *near = row
        plain: Any = (x0_sample, x0_output), (of_sample, of_output), of_x0, None
        if near:
            plain = (0.0, 0.0, near[0]), (of_sample, of_output, 0.0), of_x0, near[1]
        tables.plain[timestep] = plain
        return plain

    def _two(
        self, tables: AlphaTables, state: Tensor, output: Tensor, row: Row, noise: Tensor | None = None, **keyed: Any
    ) -> tuple[Tensor, Tensor]:
        """The next state and x0, from noise that was drawn already or that is keyed, where there is any."""
        x0_sample, x0_output, of_sample, of_output, of_x0, deviation, *near = row
        tensors: list[Any] = [state, output]
        x0_weights, weights = [x0_sample, x0_output], [of_sample, of_output]
        if noise is not None:
            tensors.append(noise)
            x0_weights.append(0.0)
            weights.append(deviation)
        elif keyed:
            keyed["noise_weight"] = deviation
        if near:
            if not traced():
                x0_weights[:2] = [0.0, 0.0]
            tensors.append((output, state))
            x0_weights.append(near[0])
            weights.append(0.0)
            keyed["guidance_scale"] = near[1]
        out, x0, _ = denoised_step(tensors, x0_weights, weights, x0_weight=of_x0, clip=tables.clip, **keyed)
        # The prediction is x0 itself: it keeps its dtype.
        return out, x0.to(output.dtype) if tables.gives_output else x0

    def _with_log_prob(
        self,
        rows: list[Row],
        model_output: Tensor,
        sample: Tensor,
        prev_sample: Tensor | None,
        generator: Generators,
        at: list[int],
    ) -> tuple[Tensor, Tensor]:
        """A step of rows as `ddim_row` makes them, one or one for each sample, and its log-probability.

        A clipped x0 is no affine map: then the mean is formed first, and the step is one around it.
        """
        columns: Any = per_sample([[float(x) for x in row[:6]] for row in rows], sample)
        x0_sample, x0_output, of_sample, of_output, of_x0, deviation = columns
        clip = float(self.config.clip_sample_range) if self._clips and self.config.clip_sample else None
        tensors, weights = [sample, model_output], [of_sample, of_output]
        if clip is not None:
            both = [x0_sample, x0_output], [of_sample, of_output]
            mean, _, _ = denoised_step(
                [as_state(sample, model_output), model_output], *both, x0_weight=of_x0, clip=clip
            )
            tensors, weights = [mean], [1.0]
        return with_log_prob(self, tensors, weights, deviation, prev_sample, generator, model_output, at, sample.dtype)
