"""Gaussian policies to run on emulated CUDA and on the CPU, and the same in NumPy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import bicm_emulator
import numpy as np

from .problems import NOISE, Shape, values
from .tensors import Tensor

CHUNK = bicm_emulator.GAUSSIAN_CHUNK
SIZES = (1, 7, 8, 33, 1025, CHUNK, CHUNK + 1, 3 * CHUNK + 77)
WEIGHTS = [0.9, -0.3, 1.7, 0.01, -2.5]


@dataclass
class Policy:
    """The arguments of `bicm_emulator.gaussian`."""

    inputs: list[Tensor]
    next: Tensor | None = None
    references: list[Tensor] = field(default_factory=list)
    conditional: Tensor | None = None
    guidance_scale: float | Tensor | None = None
    std: float | Tensor = 0.4
    steps: bool = False
    adds_up: bool = False
    upstream: Any = 1.0
    merge: bool = True
    weights: list[Any] | None = None

    @property
    def operands(self) -> list[Tensor]:
        """In the order of gradients."""
        given = self.references or [x for x in [self.next] if x is not None]
        return [*given, *self.inputs, *([] if self.conditional is None else [self.conditional])]

    @property
    def compute(self) -> np.dtype:
        return np.dtype("f8" if any(x.dtype == "float64" for x in self.operands) else "f4")

    @property
    def batch(self) -> int:
        return self.inputs[0].bits.shape[0]

    def arguments(self) -> dict[str, Any]:
        def given(x: Any) -> Any:
            return x.argument if isinstance(x, Tensor) else x

        return {
            "inputs": [x.argument for x in self.inputs],
            "references": [x.argument for x in self.references],
            "weights": [given(w) for w in self.weights or WEIGHTS[: len(self.inputs)]],
            **{
                name: given(getattr(self, name))
                for name in (*("next", "conditional", "guidance_scale", "std", "steps", "adds_up"), "upstream", "merge")
            },
            **NOISE,
        }

    def run(self, target: str, wanted: list[bool] | None = None) -> tuple[np.ndarray, list[Tensor]]:
        """The numbers of samples; with `wanted`, gradients of the operands, for the upstream."""
        results = np.full((self.batch,), 7.0, self.compute)
        outs, given = self._outs(wanted)
        bicm_emulator.gaussian(target, results, given, self.arguments())
        assert all(out.guards_intact() for out in outs)
        return results, outs

    def differentiate(self, target: str, wanted: list[bool]) -> list[Tensor]:
        outs, given = self._outs(wanted)
        bicm_emulator.gaussian_gradient(target, given, self.arguments())
        assert all(out.guards_intact() for out in outs)
        return outs

    def _outs(self, wanted: list[bool] | None) -> tuple[list[Tensor], list[Any]]:
        if wanted is None:
            return [], []
        made = [
            Tensor.empty(x.bits.shape, x.dtype) if need else None for x, need in zip(self.operands, wanted, strict=True)
        ]
        return [x for x in made if x is not None], [None if x is None else x.argument for x in made]

    def number(self, value: Any) -> np.ndarray:
        value = value.values if isinstance(value, Tensor) else value
        number = np.asarray(value).astype(self.compute).astype(np.float64)
        return np.broadcast_to(number, (self.batch,)).reshape(-1, *[1] * (self.inputs[0].bits.ndim - 1))

    def mean(self, tensors: list[Tensor]) -> np.ndarray:
        x = [tensor.values.astype(np.float64) for tensor in tensors]
        if self.conditional is not None and tensors is self.inputs:
            x[-1] = x[-1] + self.number(self.guidance_scale) * (self.conditional.values.astype(np.float64) - x[-1])
        weights = self.weights or WEIGHTS[: len(tensors)]
        return sum(self.number(w) * y for w, y in zip(weights, x, strict=True))

    def expected(self) -> np.ndarray:
        """The numbers of samples in float64."""
        s = self.number(self.std).reshape(self.batch)
        other = self.mean(self.references) if self.references else self.next.values.astype(np.float64)
        squares = ((other - self.mean(self.inputs)) ** 2).reshape(self.batch, -1)
        with np.errstate(all="ignore"):
            distance = (squares.sum(1) if self.adds_up else squares.mean(1)) / (2 * s * s)
            constant = np.log(s) + 0.5 * np.log(2 * np.pi)
            constant = squares.shape[1] * constant if self.adds_up else constant
            return np.where(s == 0, 0.0, distance if self.references else -distance - constant)


def step(shape: Shape, state: str = "float32", network: str = "float32", **options: Any) -> Policy:
    """A step of two tensors into a next state."""
    inputs = [Tensor.of(values(0, shape), state), Tensor.of(values(1, shape), network)]
    return Policy(inputs, Tensor.empty(shape, state), steps=True, **options)


def density(shape: Shape, state: str = "float32", network: str = "float32", **options: Any) -> Policy:
    inputs = [Tensor.of(values(0, shape), state), Tensor.of(values(1, shape), network)]
    return Policy(inputs, Tensor.of(values(2, shape), state), **options)


def divergence(shape: Shape, state: str = "float32", network: str = "float32", **options: Any) -> Policy:
    inputs = [Tensor.of(values(0, shape), state), Tensor.of(values(1, shape), network)]
    return Policy(inputs, references=[inputs[0], Tensor.of(values(3, shape), network)], **options)
