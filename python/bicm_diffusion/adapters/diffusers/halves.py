"""Steps in two halves: the first half's slope, kept for the second as the tensors that it is computed from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bicm_diffusion.adapters.diffusers.arguments import plain
from bicm_diffusion.adapters.diffusers.sigmas import Counted
from bicm_kernels import affine_step

#: Names of rows: of a step's first half, and of its second one.
FIRST, SECOND = "first", "second"


def kept_sample(kept: Any, state: Tensor) -> Tensor | None:
    """The sample that a first half began with; None where the original has to continue from it."""
    if type(kept) is not Tensor and not (isinstance(kept, Tensor) and plain(kept)):
        return None
    if kept.dtype is not state.dtype and torch.promote_types(kept.dtype, state.dtype) is not state.dtype:
        return None
    return kept if kept.shape == state.shape and kept.device == state.device else None


class Halfway(NamedTuple):
    """What a first half left behind, with how often each tensor had been written to.

    dt: the scheduler's; length: its value. sample, out: its input and result. other: a tensor that the slope can be
    made of, x0 or the output, and from_other: its quotients (divisor with the sample, with out, alone).
    """

    dt: Tensor
    dt_version: int
    length: float
    sample: Tensor | None = None
    sample_version: int = 0
    out: Tensor | None = None
    out_version: int = 0
    other: Tensor | None = None
    other_version: int = 0
    from_other: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def slope(self) -> Tensor:
        """The slope, from tensors that were not written to since."""
        beside_sample, beside_out, alone = self.from_other
        sample = _unchanged(self.sample, self.sample_version)
        out = _unchanged(self.out, self.out_version)
        other = _unchanged(self.other, self.other_version)
        for a, b, c in ((out, sample, self.length), (sample, other, beside_sample), (out, other, beside_out)):
            if c and a is not None and b is not None:
                return affine_step([a, b], [1.0 / c, -1.0 / c])
        if alone and other is not None:
            return affine_step([other], [1.0 / alone])
        raise RuntimeError(
            "prev_derivative: expected the sample, the result or x0 of a step's first half unchanged, but they were "
            "written to; accelerate_scheduler(..., foresee=False) stores the slope itself"
        )


def _unchanged(x: Tensor | None, version: int) -> Tensor | None:
    return x if x is not None and x._version == version else None


class Slopes(Counted):
    """Schedulers whose second half takes the mean of two slopes (Heun's method)."""

    #: The tensors that `prev_derivative` is computed from where it is no attribute.
    _halfway: Halfway | None = None
    #: The result of a first half, where it and its sample determine the slope, in graphs too.
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

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self._halfway = self._ended = None

    def _fill_lengths(self, tables: Any) -> None:
        """`dt` after a first half: differences of levels, in their dtype and on their device."""
        lengths = (self.sigmas[1:] - self.sigmas[:-1]).detach()
        tables.traced["lengths"], tables.lengths = lengths, list(lengths.unbind())

    def _may_hold(self, graph: bool, sample: Tensor, output: Tensor) -> bool:
        """Whether a slope may be computed later from its tensors: only where PyTorch counts writes to them."""
        if not self._foresight or (torch.is_grad_enabled() and (sample.requires_grad or output.requires_grad)):
            return False
        return graph or not (torch.is_inference_mode_enabled() or sample.is_inference() or output.is_inference())

    def _hold(
        self, dt: Tensor, length: float, out: Tensor, other: Tensor, from_other: tuple[float, float, float]
    ) -> None:
        """End a first half; its slope is kept as the tensors that it is computed from."""
        sample = self.sample
        self._halfway = Halfway(
            dt, dt._version, length, sample, sample._version, out, out._version, other, other._version, from_other
        )
        self.dt, self._ended = dt, out
        self.__dict__.pop("prev_derivative", None)

    def _leave(self, dt: Tensor, length: float, slope: Tensor) -> None:
        """End a first half, with a slope of its own."""
        self._halfway = Halfway(dt, 0 if dt.is_inference() else dt._version, length)
        self.dt, self._ended, self.prev_derivative = dt, None, slope

    def _length(self) -> float | None:
        """The length of the step whose second half is due; None where `dt` is not what that left."""
        halfway, dt = self._halfway, self.dt
        if halfway is None or halfway.dt is not dt:
            return None
        return halfway.length if dt.is_inference() or dt._version == halfway.dt_version else None

    def _earlier(
        self, kept: Tensor, state: Tensor | None, dtype: torch.dtype, half: Any, graph: bool
    ) -> tuple[list[Any], list[Any], float] | None:
        """The terms added to half of the second slope: tensors, their weights, and a weight of the state itself.

        half: half the step's length. None where the original has to continue.
        """
        ended, halfway = self._ended, self._halfway
        if not graph and ended is not None:
            # As the first half left it, and nobody wrote to it.
            known = halfway is not None and halfway.sample is kept and "prev_derivative" not in self.__dict__
            if not known or kept._version != halfway.sample_version or ended._version != halfway.out_version:  # type: ignore[union-attr]
                ended = None
        if ended is not None:
            # x + h/2·d is the mean of x and of Euler's result, x + h·d.
            return ([kept], [0.5], 0.5) if state is ended else ([kept, ended], [0.5, 0.5], 0.0)
        slope = self.prev_derivative
        if not isinstance(slope, Tensor) or not plain(slope) or slope.dtype is not dtype:
            return None
        return [kept, slope], [1.0, half], 0.0

    def _done(self) -> None:
        self.prev_derivative = self.dt = self.sample = self._halfway = self._ended = None
