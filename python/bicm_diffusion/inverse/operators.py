"""Common measurement operators: down-sampling, a mask, a blur. Each element of a result is a separate sum.

They are functions x0 -> prediction of y, independent of the batch. A classifier needs no wrapper: pass
`operator=classifier.eval()` with `distance="cross_entropy"` and y its classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.inverse.problem import check_count
from bicm_kernels import affine_step


@dataclass(frozen=True)
class Downsample:
    """The mean of each factor × factor block of the last two dimensions, (…, H, W) to (…, H/factor, W/factor).

    The largest eigenvalue of A·Aᵀ is 1/factor²: with the distance "half_squared", factor² is a natural step size.
    Raises ValueError where H or W is not a multiple of the factor.

    >>> Downsample(2)(torch.arange(8.0).reshape(1, 1, 2, 4))
    tensor([[[[2.5000, 4.5000]]]])
    """

    factor: int

    def __post_init__(self) -> None:
        check_count("factor", self.factor)

    def __call__(self, x0: Tensor) -> Tensor:
        """Return the means."""
        n = self.factor
        if x0.dim() < 3 or x0.shape[-1] % n or x0.shape[-2] % n:
            raise ValueError(f"x0: expected (B, …, H, W), H and W multiples of {n}, got shape {tuple(x0.shape)}")
        parts = [x0[..., row::n, column::n] for row in range(n) for column in range(n)]
        return _sum(parts, [1.0 / (n * n)] * len(parts))

    def adjoint(self, y: Tensor) -> Tensor:
        """Return Aᵀy: every mean spread over its block."""
        n = self.factor
        return (y * (1.0 / (n * n))).repeat_interleave(n, -2).repeat_interleave(n, -1)


@dataclass(frozen=True, eq=False)
class Mask:
    """Inpainting: the elements where the mask is True, the others 0. A·Aᵀ is a projector: a natural step size is 1.

    mask: bool, of the shape of x0 or broadcast to it. Raises TypeError for another kind of mask.

    >>> Mask(torch.tensor([True, False]))(torch.ones(1, 2))
    tensor([[1., 0.]])
    """

    mask: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {described(self.mask)}")

    def __call__(self, x0: Tensor) -> Tensor:
        """Return the masked sample."""
        return torch.where(self.mask, x0, 0.0)

    adjoint = __call__


@dataclass(frozen=True)
class Blur:
    """A separable blur of the last two dimensions with the same weights in both dimensions, zero-padded.

    weights: an odd number of floats, as `gaussian_weights` makes them. Raises ValueError for an even number.

    >>> Blur((0.25, 0.5, 0.25))(torch.ones(1, 1, 3, 3))[0, 0, 1]
    tensor([0.7500, 1.0000, 0.7500])
    """

    weights: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.weights) % 2 == 0:
            raise ValueError(f"weights: expected an odd number of them, got {len(self.weights)}")

    def __call__(self, x0: Tensor) -> Tensor:
        """Return the blurred sample."""
        return self._along(self._along(x0, -1, self.weights), -2, self.weights)

    def adjoint(self, y: Tensor) -> Tensor:
        """Return Aᵀy: the blur with its weights in reverse."""
        back = self.weights[::-1]
        return self._along(self._along(y, -1, back), -2, back)

    def _along(self, x: Tensor, dim: int, weights: Sequence[float]) -> Tensor:
        reach, size = len(weights) // 2, x.shape[dim]
        padding = [reach, reach] if dim == -1 else [0, 0, reach, reach]
        padded = torch.nn.functional.pad(x, padding)
        return _sum([padded.narrow(dim, k, size) for k in range(len(weights))], weights)


def gaussian_weights(deviation: float, reach: int) -> tuple[float, ...]:
    """Return 2·reach + 1 weights of a Gaussian in pixels that sum to 1.

    >>> [round(w, 3) for w in gaussian_weights(1.0, 1)]
    [0.274, 0.452, 0.274]
    """
    found = [math.exp(-0.5 * (k / deviation) ** 2) for k in range(-reach, reach + 1)]
    return tuple(w / sum(found) for w in found)


def _sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_k·x_k, a left fold, five tensors per launch."""
    total, rest = affine_step(parts[:5], weights[:5]), range(5, len(parts), 4)
    for k in rest:
        total = affine_step([total, *parts[k : k + 4]], [1.0, *weights[k : k + 4]])
    return total
