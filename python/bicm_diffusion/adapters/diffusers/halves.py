"""Steps in two halves: the slope that the first half leaves to the second, kept as the tensors that it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.adapters.diffusers.arguments import plain
from bicm_diffusion.adapters.diffusers.sigmas import Counted
from bicm_diffusion.adapters.diffusers.tables import version_of
from bicm_kernels import affine_step

#: Names of rows: of a step's first half, and of its second one.
FIRST, SECOND = "first", "second"


def kept_sample(kept: Any, state: Tensor) -> Tensor | None:
    """The sample that a first half began with; None where the original has to go on from it."""
    if not isinstance(kept, Tensor) or not plain(kept) or kept.shape != state.shape or kept.device != state.device:
        return None
    return kept if torch.promote_types(kept.dtype, state.dtype) is state.dtype else None


@dataclass
class Halfway:
    """What a first half left behind.

    dt: the scheduler's; written: how often, as PyTorch counts it; length: its value.
    quotients: (a, b, c) whose (a - b)/c is the slope, a/c where b is None; none where the slope was made at once.
    """

    dt: Any
    written: int | None
    length: Any
    sample: Tensor
    quotients: Sequence[tuple[Tensor, Tensor | None, float]]
    versions: dict[int, int]

    def unchanged(self, *tensors: Tensor | None) -> bool:
        return all(x is None or x._version == self.versions[id(x)] for x in tensors)

    def slope(self) -> Tensor:
        """The slope, from tensors that nobody wrote to since."""
        for a, b, c in self.quotients:
            if c and self.unchanged(a, b):
                return affine_step([a], [1.0 / c]) if b is None else affine_step([a, b], [1.0 / c, -1.0 / c])
        raise RuntimeError(
            "prev_derivative: expected the sample, the result or x0 of a step's first half as they were, but they were "
            "written to; accelerate_scheduler(..., foresee=False) keeps a slope of its own"
        )


class Slopes(Counted):
    """Schedulers whose second half takes the mean of two slopes (Heun's method)."""

    #: What `prev_derivative` is made of where it is no attribute.
    _halfway: Halfway | None = None
    #: What a first half returned, where it and its sample stand for the slope, in graphs too.
    _ended: Tensor | None = None
    sample: Any
    dt: Any
    prev_derivative: Any

    def __getattr__(self, name: str) -> Any:
        halfway = self.__dict__.get("_halfway") if name == "prev_derivative" else None
        if halfway is None:
            return super().__getattr__(name)  # type: ignore[misc]
        self.prev_derivative = slope = halfway.slope()
        return slope

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._halfway is not None:
            getattr(self, "prev_derivative")  # noqa: B009 (a copy's tensors have other versions)
        return super().__reduce_ex__(protocol)

    def _fill_lengths(self, tables: Any) -> None:
        """What `dt` is after a first half: differences of levels, in their dtype, where they lie."""
        lengths = (self.sigmas[1:] - self.sigmas[:-1]).detach()
        tables.traced["lengths"], tables.lengths = lengths, list(lengths.unbind())

    def _may_hold(self, graph: bool, *tensors: Tensor) -> bool:
        """Whether a slope may be made later of what it comes from: only where PyTorch counts what is written to it."""
        if not self._foresight or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return False
        return graph or not (torch.is_inference_mode_enabled() or any(x.is_inference() for x in tensors))

    def _leave(self, dt: Any, length: float, out: Tensor, quotients: Sequence[Any], slope: Tensor | None) -> None:
        """End a first half. quotients: what the slope can be made of later, where it was not made already."""
        versions = {id(x): x._version for a, b, _ in quotients for x in (a, b) if x is not None}
        self._halfway = Halfway(dt, version_of(dt), length, self.sample, quotients, versions)
        self.dt, self._ended = dt, out if slope is None else None
        if slope is None:
            self.__dict__.pop("prev_derivative", None)
        else:
            self.prev_derivative = slope

    def _length(self) -> float | None:
        """The length of the step whose second half is due; None where `dt` is not what that left."""
        halfway = self._halfway
        if halfway is None or halfway.dt is not self.dt or version_of(self.dt) != halfway.written:
            return None
        return float(halfway.length)

    def _earlier(
        self, kept: Tensor, state: Tensor | None, dtype: torch.dtype, half: Any, graph: bool
    ) -> tuple[list[Any], list[Any], float] | None:
        """What is added to half of the second slope: tensors, their weights, and a weight of the state itself.

        half: half the step's length. None where the original has to go on.
        """
        ended, halfway = self._ended, self._halfway
        if not graph and ended is not None:
            # As the first half left it, and nobody wrote to it.
            later = halfway is not None and "prev_derivative" not in self.__dict__ and kept is halfway.sample
            ended = ended if later and halfway.unchanged(kept, ended) else None  # type: ignore[union-attr]
        if ended is not None:
            # x + h/2·d is the mean of x and of Euler's result, x + h·d.
            return ([kept], [0.5], 0.5) if state is ended else ([kept, ended], [0.5, 0.5], 0.0)
        slope = self.prev_derivative
        if not isinstance(slope, Tensor) or not plain(slope) or slope.dtype is not dtype:
            return None
        return [kept, slope], [1.0, half], 0.0

    def _done(self) -> None:
        self.prev_derivative = self.dt = self.sample = self._halfway = self._ended = None
