"""A benchmark case: one op and the usual PyTorch code for it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

import bicm_kernels as bk

Shape = tuple[int, ...]
Results = Tensor | tuple[Tensor | None, ...]

SAMPLE: Shape = (3, 32, 32)
SEED = 1

#: The error allowed, relative to the largest value: eager PyTorch rounds every intermediate result.
STATE = torch.int64
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, STATE: 1e-9}


@dataclass(frozen=True)
class Case:
    """One row of the comparison: ``ours`` and ``eager`` take the same tensors and the same Python numbers.

    ``reads`` and ``writes`` count the full tensors that any implementation must read and write. Where
    ``noise`` is "added", ``eager`` takes the noise's function as ``draw``; where it is "alone", only
    noise is returned. Where it ``trains``, the functions return a loss and are measured
    with the backward pass down to the gradient of the first tensor. ``per_sample`` (B,) tensors follow the others, and
    then ``states`` fixed-point states (int64), of which ``state_passes`` have to be read or written.

    Where ``eager`` is a peer's own function, ``package`` names the module that it comes from, without which the case
    is skipped. A run of several steps counts its ``passes`` over full tensors instead; it is not compiled
    (``compiles``), because torch.compile would fuse its steps across the network that the benchmark leaves out.
    ``temporaries``: see `sizes.needed`.
    """

    name: str
    ours: Callable[..., Results]
    eager: Callable[..., Results]
    tensors: int
    reads: int
    writes: int
    coefficients: Mapping[str, Any] = field(default_factory=dict)
    noise: Literal["none", "added", "alone"] = "none"
    trains: bool = False
    per_sample: int = 0
    states: int = 0
    state_passes: int = 0
    package: str = ""
    passes: int = 0
    compiles: bool = True
    temporaries: int = 0

    @property
    def installed(self) -> bool:
        """Whether the peer's package can be imported."""
        return not self.package or importlib.util.find_spec(self.package) is not None

    @property
    def copies(self) -> int:
        """The copies, each of a step's bytes, that make up the bound."""
        return max(1, self.passes // 4)

    def least_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """Minimum bytes to be read and written."""
        passes = self.passes or self.reads + self.writes
        return math.prod(shape) * (passes * dtype.itemsize + self.state_passes * STATE.itemsize)

    def inputs(self, shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """Seeded standard normal tensors."""
        generator = torch.Generator().manual_seed(SEED)
        tensors = [torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for _ in range(self.tensors)]
        numbers = [torch.linspace(1.0 + k, 2.0 + k, shape[0], device=device) for k in range(self.per_sample)]
        states = [torch.randint(-(2**34), 2**34, shape, generator=generator).to(device) for _ in range(self.states)]
        return [*tensors, *numbers, *states]

    def measured(self, function: Callable[..., Results]) -> Callable[..., Results | None]:
        """The timed function: itself, or for a loss a step that computes the gradient and returns nothing.

        Gradients must be enabled where it trains: a context in the step would be timed with it.
        """
        if not self.trains:
            return function

        def step(first: Tensor, *rest: Tensor, **coefficients: Any) -> None:
            first.requires_grad_().grad = None
            loss = function(first, *rest, **coefficients)
            assert isinstance(loss, Tensor)
            loss.backward()

        return step

    def error(self, shape: Shape, dtype: torch.dtype, device: str = "cpu") -> float:
        """The difference of ours and eager, in units of the tolerance for rounding, or for chance in noise alone."""
        inputs = self.inputs(shape, dtype, device)
        extra = {"draw": keyed_noise} if self.noise == "added" else {}
        ours = opened(self.ours(*inputs, **self.coefficients))
        eager = opened(self.eager(*inputs, **self.coefficients, **extra))
        pairs = [(x.detach(), y.detach()) for x, y in zip(ours, eager, strict=True)]
        if self.noise == "alone":
            return max(moments_apart(x, y) for x, y in pairs)
        # A loss of halves is float32, but not more accurate.
        return max(values_apart(x, y) / TOLERANCE[STATE if y.dtype == STATE else dtype] for x, y in pairs)


def shape_of(elements: int) -> Shape:
    """The batch of 3x32x32 images with this number of elements."""
    batch, rest = divmod(elements, math.prod(SAMPLE))
    if rest or batch < 1:
        raise ValueError(f"elements must be a multiple of {math.prod(SAMPLE)}, got {elements}")
    return (batch, *SAMPLE)


def column(numbers: Tensor, x: Tensor) -> Tensor:
    """A number per sample, shaped to multiply samples of any number of axes."""
    return numbers.reshape(-1, *[1] * (x.dim() - 1))


def keyed_noise(x: Tensor) -> Tensor:
    """The noise drawn by every case, so that eager code gets the same."""
    return bk.normal(x.shape, seed=SEED, dtype=x.dtype, device=x.device)


def opened(results: Results) -> tuple[Tensor, ...]:
    """The tensors among the results as a tuple."""
    return (results,) if isinstance(results, Tensor) else tuple(x for x in results if x is not None)


def values_apart(x: Tensor, y: Tensor) -> float:
    """The largest difference relative to the largest value."""
    largest = y.double().abs().max()
    return float((x.double() - y.double()).abs().max() / largest)


def moments_apart(x: Tensor, y: Tensor) -> float:
    """The larger difference of mean and standard deviation, in units of eight standard errors."""
    x, y = x.double(), y.double()
    allowed = 8 / math.sqrt(x.numel())
    return max(float((x.mean() - y.mean()).abs()), float((x.std() - y.std()).abs())) / allowed
