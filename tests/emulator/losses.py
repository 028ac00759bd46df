"""Pseudo-Huber losses to run, and the same in NumPy: residuals in the compute type, the rest in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import bicm_emulator
import numpy as np

from . import model
from .problems import Shape, values
from .tensors import Tensor

WIDE = np.longdouble
TIMES = {"t": 3.7, "u": 0.21, "sigma_data": 0.5, "sigma_min": 0.002}


@dataclass
class Loss:
    """The arguments of `bicm_emulator.pseudo_huber`; with `x`, of a consistency loss."""

    prediction: Tensor
    target: Tensor
    x: Tensor | None = None
    c: float | Tensor | None = None
    weight: float | Tensor | None = None
    kind: str = "vector"
    reduction: str = "mean"
    parameterization: str = "bcm"
    scaled: bool = False
    times: dict[str, Any] = field(default_factory=lambda: dict(TIMES))
    merge: bool = True
    weighs: bool = False  # a number of each element

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x in (self.prediction, self.target, self.x) if x is not None]

    @property
    def compute(self) -> np.dtype:
        return np.dtype("f8" if any(x.dtype == "float64" for x in self.inputs) else "f4")

    @property
    def batch(self) -> int:
        return self.target.bits.shape[0]

    @property
    def elements(self) -> int:
        return int(np.prod(self.target.bits.shape[1:]))

    def arguments(self) -> dict[str, Any]:
        names = (
            "prediction",
            "target",
            "x",
            "c",
            "weight",
            "kind",
            "reduction",
            "parameterization",
            "scaled",
            "merge",
            "weighs",
        )
        given = {name: getattr(self, name) for name in names} | self.times
        return {name: x.argument if isinstance(x, Tensor) else x for name, x in given.items()}

    def run(self, target: str) -> tuple[np.ndarray, np.ndarray]:
        """The loss, by CUDA alone, and the samples' sums."""
        loss = np.full((self.batch,) if self.reduction == "none" else (), 5.0, self.compute)
        sums = np.full((self.batch,), 7.0)
        bicm_emulator.pseudo_huber(target, loss, sums, self.arguments())
        return loss, sums

    def differentiate(self, target: str, sums: np.ndarray, upstream: object, wanted: list[bool]) -> list[Tensor]:
        outs = [Tensor.empty(x.bits.shape, x.dtype) for x in self.inputs]
        given = [out.argument if need else None for out, need in zip(outs, wanted, strict=True)]
        bicm_emulator.pseudo_huber_gradient(target, given, sums, upstream, self.arguments())
        assert all(out.guards_intact() for out in outs)
        return [out for out, need in zip(outs, wanted, strict=True) if need]

    def run_with_gradients(self, target: str, wanted: list[bool]) -> tuple[np.ndarray, np.ndarray, list[Tensor]]:
        """The loss, by CUDA alone, the sums, and the gradients for an upstream of 1."""
        loss = np.full((self.batch,) if self.reduction == "none" else (), 5.0, self.compute)
        sums, outs = np.full((self.batch,), 7.0), [Tensor.empty(x.bits.shape, x.dtype) for x in self.inputs]
        given = [out.argument if need else None for out, need in zip(outs, wanted, strict=True)]
        bicm_emulator.pseudo_huber_with_gradient(target, loss, given, sums, self.arguments())
        assert all(out.guards_intact() for out in outs)
        return loss, sums, [out for out, need in zip(outs, wanted, strict=True) if need]

    def number(self, value: object, dtype: Any) -> np.ndarray:
        if isinstance(value, Tensor):
            value = value.values
        return np.broadcast_to(np.asarray(value, dtype), (self.batch,))

    def residual(self) -> np.ndarray:
        """(B, d) in the compute type."""
        prediction, target, *x = (tensor.values.astype(self.compute) for tensor in self.inputs)
        column = (-1, *[1] * (target.ndim - 1))
        if x:
            names = {"bcm": ("t", "u"), "cm": ("t", "sigma_min"), "edm": ("t", "zero")}[self.parameterization]
            levels = [self.number((self.times | {"zero": 0.0})[n], self.compute) for n in (*names, "sigma_data")]
            form = model.cm if self.parameterization == "cm" else model.bcm
            c_skip, c_out = (weight.reshape(column) for weight in form(*levels, scaled=self.scaled))
            prediction = c_skip * x[0] + c_out * prediction
        return (prediction - target).reshape(self.batch, self.elements)

    def transition(self) -> np.ndarray:
        return self.number(0.00054 * np.sqrt(self.elements) if self.c is None else self.c, np.float64)

    def kept(self, sums: np.ndarray) -> np.ndarray:
        """What the samples' sums say, in a type with wider exponents than float64: below 0 is minus a norm or a sum."""
        wide = -sums.astype(WIDE)
        unit = np.where(wide >= 1.0, WIDE(2.0) ** 500, WIDE(2.0) ** -430)
        large = wide * WIDE(2.0) ** 500 if self.kind == "elementwise" else (wide * unit) ** 2
        return np.where(sums < 0, large, -wide)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """The loss and what the sums say, with wide exponents from the residual on."""
        with np.errstate(all="ignore"):
            r, c = self.residual().astype(WIDE), self.transition().astype(WIDE)
            squares = r * r
            terms = WIDE(1.0)
            if self.weighs:
                terms = self.weight.values.astype(self.compute).astype(WIDE).reshape(self.batch, self.elements)
            if self.kind != "elementwise":
                sums = (terms * squares).sum(1)
                distance = distances(sums, c) if self.kind == "vector" else sums
            else:
                sums = (terms * distances(squares, c[:, None])).sum(1)
                distance = sums / WIDE(self.elements)
            weighted = self.number(1.0 if self.weight is None or self.weighs else self.weight, WIDE) * distance
            if self.reduction == "none":
                return weighted.astype(np.float64), sums
            loss = weighted.sum() / (WIDE(self.batch) if self.reduction == "mean" else 1.0)
            return loss.astype(np.float64), sums


def distances(squares: np.ndarray, c: np.ndarray) -> np.ndarray:
    root = np.sqrt(squares + c * c) + c
    return np.where(np.isinf(squares), squares, squares / np.where(root == 0, WIDE(3.0), root))


def pseudo_huber(shape: Shape, first: str = "float32", second: str = "float32", **options: Any) -> Loss:
    return Loss(Tensor.of(values(0, shape), first), Tensor.of(values(1, shape), second), **options)


def consistency(shape: Shape, state: str = "float32", network: str = "float32", **options: Any) -> Loss:
    return Loss(
        Tensor.of(values(0, shape), network),
        Tensor.of(values(1, shape), state),
        Tensor.of(values(2, shape), state),
        **options,
    )


CHUNK = bicm_emulator.SUM_CHUNK
SIZES = (1, 7, 8, 33, 1025, CHUNK, CHUNK + 1, 3 * CHUNK + 77)
MAKERS: dict[str, Callable[..., Loss]] = {"pseudo_huber": pseudo_huber, "consistency": consistency}
KINDS = {"vector": None, "elementwise": 0.3, "squared": None}
