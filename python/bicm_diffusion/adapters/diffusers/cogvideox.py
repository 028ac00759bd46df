"""CogVideoX's DDIM, and its stochastic DPM-Solver++ of the second order, whose caller keeps the last x0."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_ddim_cogvideox import DDIMSchedulerOutput as DDIMOutput
from diffusers.schedulers.scheduling_dpm_cogvideox import DDIMSchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.alphas import LEAST, Alphas, AlphaTables, reading_of_pair
from bicm_diffusion.adapters.diffusers.arguments import host_value
from bicm_diffusion.adapters.diffusers.drawing import FLOATING, Generators, traced
from bicm_diffusion.adapters.diffusers.outputs import as_dtype, as_output, as_state
from bicm_diffusion.adapters.diffusers.scheduler import fused
from bicm_diffusion.adapters.diffusers.tables import Number, Row, Tables, root
from bicm_kernels import denoised_step


def _log(x: Number) -> Number:
    if isinstance(x, Tensor):
        return x.log()
    return math.log(x) if x else -math.inf


def log_ratio(a: Number) -> Number:
    """Half the logarithm of the signal-to-noise ratio at an alpha-bar."""
    return 0.5 * (_log(a) - _log(1.0 - a))


def second_order_row(a: Number, below: Number, back: Number | None) -> Row:
    """Weights of the sample, of x0 now and one step before, and of noise (DPM-Solver++ eq. 18).

    a, below, back: alpha-bar here, of the step's end and of the step before; None takes the first order.
    """
    here = log_ratio(a)
    h = log_ratio(below) - here
    exp: Any = torch.exp if isinstance(h, Tensor) else math.exp
    expm1: Any = torch.expm1 if isinstance(h, Tensor) else math.expm1
    kept = root((1.0 - below) / (1.0 - a)) * exp(-h)
    gain = -expm1(-2.0 * h)
    first, deviation = gain * root(below), root(1.0 - below) * root(gain)
    if back is None:
        return kept, first, 0.0, deviation
    share = 0.5 * h / (here - log_ratio(back))
    return kept, first * (1.0 + share), -first * share, deviation


class CogVideoXDpm(Alphas):
    _kind: ClassVar[type[Tables]] = AlphaTables
    _beyond = "final_alpha_cumprod"
    _sources = ("alphas_cumprod", "timesteps", _beyond)
    _options = ("num_train_timesteps", "prediction_type")
    _clips = False

    def _weights(self, tables: AlphaTables, at: Any, back: Any, sample: Tensor) -> Any:
        """A step's weights, or None where the original has to run. back: the timestep before, for the second order."""
        if traced():
            return self._made(tables, at, back, sample)
        key = at, back
        if key not in tables.rows:
            try:
                row = self._made(tables, at, back, sample)
            except (ZeroDivisionError, ValueError, OverflowError):
                row = None  # the original gives infinities
            tables.rows[key] = row if row is not None and all(map(math.isfinite, row)) else None
        return tables.rows[key]

    def _made(self, tables: AlphaTables, at: Any, back: Any, sample: Tensor) -> Any:
        """Weights of sample and output in x0, those of the step, and those of the pair that x0 is read from."""
        levels = self._levels_at(at, at - tables.gap, tables, sample)
        before = None if back is None else self._levels_at(back, back, tables, sample)
        if levels is None or (back is not None and before is None):
            return None
        a, below = levels
        row = second_order_row(a, below, None)
        if before is not None:
            second = second_order_row(a, below, before[0])
            # A graph cannot detect the last step, which is of the first order.
            last = at - tables.gap < 0
            row = _either(last, row, second)
        prediction = self.config.prediction_type
        if prediction == "epsilon":
            if not traced() and a < LEAST:
                raise ValueError("no signal")
            return 0.0, 0.0, *row, *reading_of_pair(a)
        reading = (0.0, 1.0) if prediction == "sample" else (root(a), -root(1.0 - a))
        return *reading, *row, 0.0, 0.0

    @fused
    def step(
        self,
        model_output: Tensor,
        old_pred_original_sample: Tensor | None,
        timestep: int,
        timestep_back: int | None,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = False,
    ) -> Any:
        graph = traced()
        if not (sample.is_floating_point() and model_output.is_floating_point()):
            return None  # the original's float64 levels would determine the dtype
        tables = self._ready(graph) if self.num_inference_steps else None
        if tables is None:
            return None
        at: Any = timestep if graph else host_value(timestep, tables.timesteps)
        back: Any = timestep_back if graph or timestep_back is None else host_value(timestep_back, tables.timesteps)
        old = old_pred_original_sample
        if not graph:
            # The original looks up the previous timestep wherever there is one, and counts negative ones from the end.
            known = range(len(tables.levels) - 1)
            if not all(
                isinstance(x, Integral) and x in known for x in (at, *([] if timestep_back is None else [back]))
            ):
                return None
        if not isinstance(at, Tensor) and at - tables.gap < 0:
            old = None
        second = old is not None
        if second and (back is None or not self._fits(old, sample)):
            return None
        row = self._weights(tables, at, back if second else None, sample)
        if row is None:
            return None
        x0_sample, x0_output, kept, now, before, deviation, near, guidance = row
        state = as_state(sample, model_output)
        tensors: list[Any] = [state] if old is None else [as_state(state, old), old]
        weights = [kept, before][: len(tensors)]
        if self._noise == "keyed":
            seed, sample_id = self._key(generator, sample, at)
            keyed: dict[str, Any] = {"noise_weight": deviation, "seed": seed, "step": at, "sample_id": sample_id}
        else:
            keyed = {}
            noise = self._drawn(sample, model_output, generator)
            if second and isinstance(at, Tensor):  # of a graph, which cannot tell the last step
                again = self._drawn_from(at, tables.gap, sample, generator)
                noise = torch.where((at < tables.gap).to(noise.device), noise, again)
            elif second:  # the first was of the original's first order, which it throws away
                noise = self._drawn(sample, model_output, generator)
            tensors.append(noise)
            weights.append(deviation)
        reads = [0.0] * len(tensors)
        prediction = self._internal_dict.prediction_type
        if prediction == "epsilon":
            keyed["guidance_scale"] = guidance
            tensors.append((model_output, state))
            reads.append(near)
        else:
            tensors.append(model_output)
            reads = [x0_sample, *reads[1:], x0_output]
        out, x0, _ = denoised_step(tensors, reads, [*weights, 0.0], x0_weight=now, **keyed)
        x0 = model_output if prediction == "sample" else as_dtype(x0, state.dtype)
        if not return_dict or old is None:
            return out, x0  # a tuple at the first order, whatever is asked for
        return as_output(graph, DDIMSchedulerOutput, out, "pred_original_sample", x0)

    def _fits(self, old: Any, sample: Tensor) -> bool:
        """Whether a launch takes the last x0: to be known before anything is drawn."""
        if not isinstance(old, Tensor) or old.dtype not in FLOATING:
            return False
        return old.shape == sample.shape and old.device == sample.device and old.layout is torch.strided


def _either(first: Any, row: Row, other: Row) -> Row:
    if not isinstance(first, Tensor):
        return row if first else other
    return tuple(torch.where(first, torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(row, other, strict=True))


class CogVideoXDdim(Alphas):
    """DDIM without noise; the original accepts eta and clipping, and ignores both."""

    _beyond = "final_alpha_cumprod"
    _sources = ("alphas_cumprod", "timesteps", _beyond)
    _options = ("num_train_timesteps", "prediction_type")
    _clips = False

    def _ends(self, timestep: Any, tables: AlphaTables) -> tuple[Any, Any]:
        return timestep, timestep - tables.gap

    @fused
    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        graph = traced()
        if not (sample.is_floating_point() and model_output.is_floating_point()):
            return None  # the original's float64 levels would determine the dtype
        tables = self._ready(graph) if self.num_inference_steps else None
        return self._plain(tables, model_output, timestep, sample, graph, DDIMOutput, return_dict)
