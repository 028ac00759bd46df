"""States that lose nothing: two integer states on a fixed-point grid and the buffer that keeps what divisions drop."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bicm_diffusion.rational import MAX_DENOMINATOR, nearest
from bicm_diffusion.samplers.loop import Loop, Output, Row, traced
from bicm_diffusion.samplers.prediction import Number
from bicm_kernels import (
    affine_step,
    exact_affine_inverse_step,
    exact_affine_step,
    fixed_point_decode,
    fixed_point_encode,
)

Integer: TypeAlias = int | Tensor
Ratio: TypeAlias = tuple[Integer, Integer]
#: A factor of a step: a float, (B,) floats, a Fraction, or numerator and denominator (ints or (B,) int64 tensors).
Factor: TypeAlias = float | Tensor | Fraction | Ratio

#: Where the float path is expected to lose more than this, in units of the image, it says so.
VISIBLE = 1e-3


class InexactInversionWarning(UserWarning):
    """A floating-point inversion is expected to lose what the eye sees; the exact one loses nothing."""


class StatePair(NamedTuple):
    """Two neighbouring states of a trajectory: where it stands, and where it stood one index earlier.

    A trajectory of two states can be retraced only from both.
    """

    z: Tensor
    previous: Tensor


@dataclass(frozen=True)
class ExactPair:
    """Two states of a trajectory as integers, from which every bit of it can be retraced.

    q, previous_q: (B, …) int64, states in units of unit and previous_unit (1, or alpha) on a grid of 2^-32.
    info: (B, …) int64, the buffer that keeps what divisions drop; all zeros at the end where the trajectory began.
    overflow: (B,) int64, 0 where all went well, else the number i of the step between the indices i - 1 and i.
    dtype: of z and previous, the states in floating point.
    """

    q: Tensor
    previous_q: Tensor
    info: Tensor
    overflow: Tensor
    unit: Number
    previous_unit: Number
    dtype: torch.dtype

    @property
    def z(self) -> Tensor:
        """The state where the trajectory stands, (B, …) in `dtype`."""
        return decode(self.q, self.unit, torch.float64).to(self.dtype)

    @property
    def previous(self) -> Tensor:
        """The state beside it, (B, …) in `dtype`."""
        return decode(self.previous_q, self.previous_unit, torch.float64).to(self.dtype)

    def __iter__(self) -> Iterator[Tensor]:
        """Unpack into z and previous, as a pair of floats unpacks."""
        return iter((self.z, self.previous))

    def check(self) -> None:
        """Raise OverflowError where a sample left the range of its integers; reads the device."""
        steps = self.overflow.tolist()
        wrong = [b for b, step in enumerate(steps) if step]
        if not wrong:
            return
        raise OverflowError(
            f"sample {wrong[0]} left the range of its integers in the step between indices {steps[wrong[0]] - 1} and "
            f"{steps[wrong[0]]} ({len(wrong)} of {len(steps)} samples did): a factor n/m costs log2(m/n) bits a step, "
            "so take fewer steps or a factor nearer to 1, or exact=False; a model that returns NaN or infinity ends "
            "here too"
        )


def decode(q: Tensor, unit: Number, dtype: torch.dtype) -> Tensor:
    """Return unit·q in floating point."""
    z = fixed_point_decode(q, dtype=dtype)
    return z if isinstance(unit, float) and unit == 1.0 else affine_step([z], [unit])


class Grid:
    """The arithmetic of one exact run: integer states, one buffer, one note of overflows."""

    def __init__(self, loop: Loop, like: Tensor, start: ExactPair | None = None) -> None:
        self.loop, self.dtype = loop, like.dtype if start is None else start.dtype
        self.info = torch.zeros_like(like, dtype=torch.int64) if start is None else start.info
        self.overflow = like.new_zeros(like.shape[:1], dtype=torch.int64) if start is None else start.overflow.clone()

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
        tensors: list[Any],
        weights: Row,
        *,
        ratio: Ratio = (1, 1),
        inverse: bool = False,
        mark: int,
        guided: bool = True,
    ) -> Tensor:
        """Return ratio·last + Σ w_k·x_k, or the state that such a step came from."""
        step = exact_affine_inverse_step if inverse else exact_affine_step
        guidance = self.loop.guidance_scale if guided else None
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

    def pair(self, q: Tensor, previous_q: Tensor, unit: Number, previous_unit: Number) -> ExactPair:
        """Return the states, once nothing overflowed; a traced loop leaves it to `ExactPair.check`."""
        pair = ExactPair(q, previous_q, self.info, self.overflow, unit, previous_unit, self.dtype)
        if not traced() and not _capturing(q):
            pair.check()
        return pair


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def rational(name: str, factor: Factor) -> Ratio:
    """Return a factor as numerator and denominator: the nearest fraction with a denominator up to 1024.

    A tensor of floats is read on the host, once; numerators and denominators given as tensors are not.
    """
    if isinstance(factor, tuple):
        return factor
    if isinstance(factor, Tensor):
        pairs = [_fraction(name, x) for x in factor.double().flatten().tolist()]
        if factor.dim() == 0:
            return pairs[0]
        numerators, denominators = zip(*pairs, strict=True)
        return torch.tensor(numerators, device=factor.device), torch.tensor(denominators, device=factor.device)
    return (factor.numerator, factor.denominator) if isinstance(factor, Fraction) else _fraction(name, factor)


def _fraction(name: str, factor: float) -> tuple[int, int]:
    n, m = nearest(factor)
    if n < 1:
        raise ValueError(
            f"{name}: an exact step needs a factor of at least 1/{MAX_DENOMINATOR}, got {factor}; exact=False takes it"
        )
    return n, m


def value(factor: Factor) -> Number:
    """Return a factor as a float or (B,) float64 tensor."""
    if isinstance(factor, tuple):
        n, m = factor
        return (n.double() if isinstance(n, Tensor) else n) / (m.double() if isinstance(m, Tensor) else m)
    return factor.double() if isinstance(factor, Tensor) else float(factor)


def rounded(x: Number, dtype: torch.dtype) -> Number:
    """Return x with as many bits as a step of such states computes with.

    A step's weights must agree with each other more closely than with what was asked for: a factor that the step itself
    rounds, after the others were made from it, would pull every state the same way.
    """
    if dtype == torch.float64:
        return x
    spread = x * (2.0**29 + 1.0)
    return spread - (spread - x)


def warn_of_loss(method: str, steps: int, growth: Number, dtype: torch.dtype) -> None:
    """Warn where a floating-point inversion is expected to lose what can be seen.

    Rounding enters in every step and grows with every later one: the loss is about N·eps·growth, where growth is the
    product of the steps' 1/factor.
    """
    if traced() or isinstance(growth, Tensor):
        return
    loss = steps * torch.finfo(dtype).eps * growth
    if loss > VISIBLE:
        warnings.warn(
            f"{method} in {dtype} over {steps} steps with exact=False: a round trip from noise loses about {loss:.0e} "
            f"(rounding grows {growth:.1g}-fold on the way back); exact=True loses nothing",
            InexactInversionWarning,
            stacklevel=4,
        )
