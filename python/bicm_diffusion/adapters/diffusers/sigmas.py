"""Schedulers that count their steps: rows of weights by the count, and the launch of such a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor

from bicm_diffusion.adapters.diffusers.drawing import Generators, traced
from bicm_diffusion.adapters.diffusers.scheduler import Accelerated, dynamo, fused
from bicm_diffusion.adapters.diffusers.tables import Row, Tables
from bicm_kernels import affine_step, denoised_step
from bicm_kernels.inputs import foreseen

ROWS = "rows"

#: A step's weights in x0 and in the result, the scale of a guided pair, and that of the input that may be made ahead.
PlainStep = tuple[Row, Row, float | None, float | None]
HALVES = frozenset(dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype) and dtype.itemsize <= 2)


@dataclass
class SigmaTables(Tables):
    #: The scale of the model's input at each level.
    scales: list[float] = field(default_factory=list)
    #: The index of the last step, after which no input is scaled.
    last: int = 0
    #: Steps without keyed noise, as they are launched.
    plain: dict[Any, PlainStep] = field(default_factory=dict)

    def scale_after(self, index: int) -> float | None:
        """The scale of the next evaluation's input, where there is one."""
        return self.scales[index + 1] if index < self.last else None


def foreseen_first(scale: Callable[..., Any]) -> Any:
    """Return the input that the last step precomputed, if it did; otherwise call the method."""

    @wraps(scale)
    def scale_model_input(self: Sigmas, *args: Any, **kwargs: Any) -> Any:
        if not dynamo():
            scaled = foreseen(self.__dict__, args[0] if args else kwargs.get("sample"))
            if scaled is not None:
                return scaled
        return scale(self, *args, **kwargs)

    return scale_model_input


class Counted(Accelerated):
    """Schedulers that look up their weights by the number of steps taken."""

    def _row(self, tables: Any, index: int) -> Row:
        """A step's weights. If they raise an arithmetic error or are not finite, the original step runs."""
        raise NotImplementedError

    def _fill(self, tables: Any) -> None:
        count = min(len(tables.timesteps.values), len(tables.levels) - 1)
        tables.put(ROWS, lambda index: self._row(tables, index), count)

    def _noisy(
        self,
        tensors: list[Any],
        weights: list[Any],
        deviation: Any,
        index: int,
        generator: Generators,
        like: Tensor,
        sample: Tensor,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """Add noise to a step's tensors and their weights in the result, or return the arguments of keyed noise."""
        if self._noise == "keyed":
            seed, sample_id = self._key(generator, sample, index)
            return {"noise_weight": deviation, "seed": seed, "step": index, "sample_id": sample_id}
        tensors.append(self._drawn(like, sample, generator, dtype))
        weights.append(deviation)
        return {}

    def _take(
        self,
        own: dict[str, Any],
        tables: Any,
        index: int,
        tensors: list[Any],
        plain: PlainStep,
        x0_weight: float = 0.0,
        clip: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`_advance` without keyed noise, of float32 tensors that nothing is recorded of."""
        x0_weights, weights, guidance, scale = plain
        if scale is not None and not own.get("_foresees", True):
            scale = None
        out, x0, scaled = denoised_step(
            tensors,
            x0_weights,
            weights,
            x0_weight=x0_weight,
            clip=clip,
            next_scale=scale,
            guidance_scale=guidance,
        )
        own["_step_index"] = index = index + 1
        if scaled is not None:
            self._keep(own, tables, index, out, scaled)
        return out, x0

    def _keep(self, own: dict[str, Any], tables: Any, index: int, out: Tensor, scaled: Tensor) -> None:
        """Keep the next evaluation's input."""
        try:
            own["_pending"] = ref(out), out._version, index, scaled, tables.inputs
        except RuntimeError:  # inference tensors have no version counter: precompute no other one
            own["_foresees"] = False

    def _advance(
        self,
        terms: tuple[list[Any], list[Any], list[Any]],
        index: int,
        result: torch.dtype,
        scale: float | None = None,
        x0_weight: Any = 0.0,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Launch the step, count it, and keep the next evaluation's input if the launch computed it.

        terms: tensors, and the weights in x0 of the first of them, in the result of all.
        """
        tensors, x0_weights, weights = terms
        if len(x0_weights) < len(tensors):
            x0_weights += [0.0] * (len(tensors) - len(x0_weights))
        if options:
            options["next_scale"] = scale
            out, x0, scaled = denoised_step(tensors, x0_weights, weights, x0_weight=x0_weight, **options)
        else:  # passing a dictionary costs time in every step
            out, x0, scaled = denoised_step(tensors, x0_weights, weights, x0_weight=x0_weight, next_scale=scale)
        self._step_index = index = index + 1
        if scaled is not None:
            self._keep(self.__dict__, self._tables, index, out, scaled)
        return out if out.dtype is result else out.to(result), x0


class Sigmas(Counted):
    """Those that scale the model's input by the level."""

    _kind: ClassVar[type[Tables]] = SigmaTables
    _looks_up = False
    #: Whether the original remembers that an input was scaled.
    _remembers: ClassVar[bool] = True
    is_scale_input_called: bool

    def _scale(self, sigma: float) -> float:
        raise NotImplementedError

    def _fill(self, tables: Any) -> None:
        self._fill_scales(tables)
        super()._fill(tables)

    def _fill_scales(self, tables: SigmaTables) -> None:
        tables.scales = [self._scale(x) for x in tables.levels]
        tables.traced["scales"] = torch.tensor(tables.scales, dtype=torch.float64)
        tables.last = min(len(tables.timesteps.values), len(tables.scales) - 1) - 1

    def _next_scale(
        self, tables: Any, index: int, result: torch.dtype, sample: Tensor, output: Tensor, graph: bool
    ) -> Any:
        """The scale of the input that a step may make ahead; None where it may not."""
        if graph or index >= tables.last or result in HALVES or not self._foresees:
            return None  # a half has to be rounded before it is scaled, as the original does
        if torch.is_grad_enabled() and (sample.requires_grad or output.requires_grad):
            return None
        return tables.scales[index + 1]

    def _present_scale(self, tables: Any, index: int, graph: bool) -> Any:
        """The scale of the requested input, in a graph as a tensor; None if the original has to run."""
        return tables.traced["scales"][index] if graph else tables.scales[index]

    @foreseen_first
    @fused
    def scale_model_input(self, sample: Tensor, timestep: Any) -> Any:
        graph = traced()
        tables = self._ready(graph)
        if tables is None:
            return None
        index = self._index(timestep)
        scale = self._present_scale(tables, index, graph)
        if scale is None:
            return None
        scaled = affine_step([sample], [scale.to(sample.device) if graph else scale])
        if self._remembers:
            self.is_scale_input_called = True
        return scaled
