"""The arithmetic of an exact run: integer states on a fixed-point grid, and a buffer for remainders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bicm_diffusion.samplers.factors import Ratio
from bicm_diffusion.samplers.guide import opened
from bicm_diffusion.samplers.loop import Loop, Output, traced
from bicm_diffusion.samplers.prediction import Number
from bicm_diffusion.samplers.record import Record, checksum, report_remainder
from bicm_diffusion.samplers.states import ExactPair, decode
from bicm_kernels import affine_step, exact_affine_inverse_step, exact_affine_step, fixed_point_encode

P = TypeVar("P", bound=ExactPair)


class Grid:
    """The arithmetic of one exact run: integer states, one buffer, one overflow record."""

    def __init__(self, loop: Loop, like: Tensor, record: Record, start: ExactPair | None = None) -> None:
        self.loop, self.dtype = loop, like.dtype if start is None else start.dtype
        self.info = torch.zeros_like(like, dtype=torch.int64) if start is None else start.info
        self.overflow = like.new_zeros(like.shape[:1], dtype=torch.int64) if start is None else start.overflow.clone()
        self.record, self.made = record, None if start is None else start.record
        self.host = not traced() and not _capturing(like)

    def begin(self, q: Tensor, previous_q: Tensor) -> None:
        """Record the states that the run begins with."""
        if self.host:
            self.record = replace(self.record, origin=checksum(q, previous_q))

    def encode(self, z: Tensor, unit: Number, mark: int) -> Tensor:
        """Return z/unit on the grid."""
        z = z if isinstance(unit, float) and unit == 1.0 else affine_step([z.double()], [1.0 / unit])
        return fixed_point_encode(z, overflow=self.overflow, mark=mark)

    def evaluate(self, i: int, q: Tensor, unit: Number) -> tuple[Tensor, Output]:
        """Return the state in floating point, and the model's output there."""
        z = decode(q, unit, self.dtype)
        return z, self.loop.evaluate(i, z)

    def step(
        self,
        last: Tensor,
        tensors: Sequence[Any],
        weights: Sequence[Number],
        *,
        ratio: Ratio = (1, 1),
        inverse: bool = False,
        mark: int,
        guided: bool = True,
    ) -> Tensor:
        """Return ratio·last + Σ w_k·x_k, or the state that such a step came from."""
        step = exact_affine_inverse_step if inverse else exact_affine_step
        guidance = self.loop.guidance_scale if guided else None
        if guided and self.loop.guide is not None:
            tensors, (weights,), guidance = opened(tensors, [weights], guidance)
        q, self.info = step(
            last,
            tensors,
            weights,
            self.info,
            ratio=ratio,
            guidance_scale=guidance,
            overflow=self.overflow,
            mark=mark,
        )
        return q

    def pair(self, kind: type[P], q: Tensor, previous_q: Tensor, unit: Number, previous_unit: Number) -> P:
        """Return the states after checking for overflow; in a traced loop `ExactPair.check` does so."""
        units = (unit, previous_unit)
        pair = kind(q, previous_q, self.info, self.overflow, *units, self.dtype, record=self.record)
        if self.host:
            pair.check()
            if self.made is not None:
                report_remainder(self.loop.name, self.made, self.record, q, previous_q)
        return pair


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
