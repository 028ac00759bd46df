"""The integer states of one BDIA trajectory, kept by a scheduler in addition to the caller's floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.adapters.diffusers.tables import version_of
from bicm_diffusion.samplers.record import Record, checksum
from bicm_diffusion.samplers.states import ExactPair
from bicm_kernels import (
    affine_step,
    exact_affine_inverse_step,
    exact_affine_step,
    fixed_point_decode,
    fixed_point_encode,
)


class Integers:
    """Two adjacent states on a grid of 2^-32, and the buffer for the remainders of a factor n/m."""

    def __init__(self, sample: Tensor, last: Tensor | None, ratio: tuple[int, int]) -> None:
        self.ratio, self.dtype = ratio, sample.dtype
        self.overflow = sample.new_zeros(sample.shape[:1], dtype=torch.int64)
        self.q = self._encoded(sample)
        self.last_q = None if last is None else self._encoded(last)
        self.info = torch.zeros_like(self.q)
        self.seen, self.version = sample, version_of(sample)
        #: Checksums of the two states that the loop began with.
        self.origin = None if self.last_q is None else checksum(self.last_q, self.q)

    @classmethod
    def turned(cls, pair: ExactPair, ratio: tuple[int, int], inner: Tensor) -> Integers:
        """Return the states of a pair in the order of its retrace; inner: the state that the caller holds."""
        states = cls.__new__(cls)
        states.ratio, states.dtype = ratio, pair.dtype
        states.overflow, states.info = pair.overflow.clone(), pair.info
        states.q, states.last_q = pair.previous_q, pair.q
        states.seen, states.version = inner, -1
        states.origin = checksum(pair.q, pair.previous_q)
        return states

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy's tensors have other versions: its next state is compared by its values.
        self.__dict__.update(state)
        self.version = -1

    def step(
        self,
        sample: Tensor,
        output: Tensor,
        weights: list[float],
        *,
        x0_weights: list[float] | None,
        inverse: bool,
        mark: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the next state, and x0 where it has weights; the first step of a trajectory has no state before it."""
        self._check(sample)
        last, forwards = self.last_q, self.last_q is None or not inverse
        op = exact_affine_step if forwards else exact_affine_inverse_step
        following, self.info = op(
            torch.zeros_like(self.q) if last is None else last,
            [self.q, output],
            weights,
            self.info,
            ratio=(1, 1) if last is None else self.ratio,
            overflow=self.overflow,
            mark=mark,
        )
        x0 = None if x0_weights is None else affine_step([sample, output], x0_weights[:2])
        self.last_q, self.q = self.q, following
        if last is None:
            self.origin = checksum(self.last_q, self.q)
        self.seen = self._decoded(following)
        self.version = version_of(self.seen)
        return self.seen, x0

    def pair(self, record: Record) -> ExactPair:
        """Return the states after the last step."""
        assert self.last_q is not None
        return ExactPair(self.q, self.last_q, self.info, self.overflow, 1.0, 1.0, self.dtype, record=record)

    def _encoded(self, x: Tensor) -> Tensor:
        return fixed_point_encode(x, overflow=self.overflow)

    def _decoded(self, q: Tensor) -> Tensor:
        if not torch.is_inference_mode_enabled():
            return fixed_point_decode(q, dtype=self.dtype)
        # PyTorch does not count writes to inference tensors, and `_check` has to notice them.
        with torch.inference_mode(False), torch.no_grad():
            return fixed_point_decode(q, dtype=self.dtype)

    def _check(self, sample: Tensor) -> None:
        """Raise unless the caller's floats equal the decoded integers."""
        same = sample is self.seen and version_of(sample) == self.version
        # Pipelines copy a loop's start: the first state is compared by its values.
        if not same and not (self.version == -1 and sample.dtype == self.dtype and torch.equal(sample, self.seen)):
            raise ValueError(
                "sample: with exact=True, expected the state that the last step or turn_round returned; for another "
                "image make another scheduler or call set_timesteps(..., inverse=True), and to change states between "
                "steps use exact=False"
            )
