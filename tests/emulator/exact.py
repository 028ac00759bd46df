"""Exact steps to run, and their contract: weights and increments in NumPy's float64, steps in Python's integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import bicm_emulator
import numpy as np

from .model import fold
from .tensors import STORAGE, Tensor, same_bits

LARGEST = {"int32": 2**31 - 1, "int64": 2**63 - 1}
MAX_RATIO = 2**20
Run = Callable[["Exact"], None]


def decoded(x: Tensor, fraction_bits: int) -> np.ndarray:
    """An operand in float64; missing elements of a state are NaN."""
    if x.dtype not in LARGEST:
        return x.values.astype(np.float64)
    q = x.values
    with np.errstate(invalid="ignore"):
        return np.where(q == -LARGEST[x.dtype] - 1, np.nan, q.astype(np.float64) * 2.0**-fraction_bits)


def integer(x: float) -> int | None:
    """x rounded to even; None where int64 cannot hold it."""
    return round(x) if abs(x) < 2.0**63 else None


def bounded(x: int | None, largest: int) -> int | None:
    return None if x is None or abs(x) > largest else x


def multiplied(z: int, buffer: int, n: int, m: int) -> tuple[int, int] | None:
    """z n/m and the buffer that keeps what the division drops (Maclaurin, Duvenaud & Adams 2015)."""
    buffer = buffer * m + z % m
    z = z // m * n + buffer % n
    largest = LARGEST["int64"]
    return (z, buffer // n) if max(abs(buffer), abs(z)) <= largest else None


@dataclass
class Exact:
    """The arguments of `bicm_emulator.reversible`; without `last`, an encoding."""

    inputs: Sequence[Tensor]
    coefficients: Sequence[float | Tensor]
    out: Tensor
    last: Tensor | None = None
    info: Tensor | None = None
    info_out: Tensor | None = None
    form: str = "affine"
    inverse: bool = False
    conditional: Tensor | None = None
    guidance_scale: float | Tensor | None = None
    n: int | np.ndarray = 1
    m: int | np.ndarray = 1
    fraction_bits: int = 32
    overflow: np.ndarray | None = None
    mark: int | np.ndarray = 1
    merge: bool = True
    streams: bool = False

    @property
    def outputs(self) -> list[Tensor]:
        return [x for x in (self.out, self.info_out) if x is not None]

    @property
    def operands(self) -> list[Tensor]:
        return [*self.inputs, *(x for x in (self.conditional, self.last, self.info) if x is not None)]

    def run(self, target: str, units: list[tuple[int, int]] | None = None) -> None:
        def given(value: object) -> object:
            return value.argument if isinstance(value, Tensor) else value

        names = ("last", "info", "info_out", "form", "inverse", "conditional", "guidance_scale", "n", "m")
        names += ("fraction_bits", "overflow", "mark", "merge", "streams")
        bicm_emulator.reversible(
            target,
            given(self.out),
            [given(x) for x in self.inputs],
            [given(x) for x in self.coefficients],
            units=units,
            **{name: given(getattr(self, name)) for name in names},
        )

    def rows(self, value: object) -> np.ndarray:
        """A value for the batch or for every sample, shaped to broadcast over the tensors."""
        value = np.asarray(value.values if isinstance(value, Tensor) else value)
        return value.reshape(-1, *[1] * (self.out.bits.ndim - 1)) if value.ndim == 1 else value

    def increments(self) -> list[int | None]:
        with np.errstate(all="ignore"):
            x = [decoded(tensor, self.fraction_bits) for tensor in self.inputs]
            if self.conditional is not None:
                scale = self.rows(self.guidance_scale).astype(np.float64)
                x[-1] = x[-1] + scale * (decoded(self.conditional, self.fraction_bits) - x[-1])
            weights = [self.rows(c).astype(np.float64) for c in self.coefficients]
            if self.form == "bdia":
                a, b, a_last, b_last = weights
                gamma = self.rows(self.n) / self.rows(self.m)
                weights = [a - gamma / a_last, b + gamma * (b_last / a_last)]
            scaled = fold(x, weights) * 2.0**self.fraction_bits
        return [integer(value) for value in np.broadcast_to(scaled, self.out.bits.shape).ravel().tolist()]

    def element(self, z: int | None, buffer: int, increment: int | None, n: int, m: int) -> tuple[int, int] | None:
        """A step of one element; None is missing."""
        largest = LARGEST[self.out.dtype]
        if z is None or increment is None or not 1 <= n <= MAX_RATIO or not 1 <= m <= MAX_RATIO:
            return None
        if self.inverse:
            z = bounded(z - increment, largest)
            return None if z is None else (z, buffer) if n == m else multiplied(z, buffer, m, n)
        moved = (z, buffer) if n == m else multiplied(z, buffer, n, m)
        z = None if moved is None else bounded(moved[0] + increment, largest)
        return None if z is None else (z, moved[1])

    def expected(self) -> tuple[list[np.ndarray], list[bool]]:
        """The bits of every output, and in which samples something is missing."""
        shape, largest = self.out.bits.shape, LARGEST[self.out.dtype]
        if self.last is None:
            results = [None if bounded(x, largest) is None else (x, 0) for x in self.increments()]
            buffers = [0] * len(results)
        else:
            n, m = (np.broadcast_to(self.rows(x), shape).ravel().tolist() for x in (self.n, self.m))
            z = [None if x == -largest - 1 else x for x in self.last.values.ravel().tolist()]
            buffers = [0] * len(z) if self.info is None else self.info.values.ravel().tolist()
            columns = zip(z, buffers, self.increments(), n, m, strict=True)
            results = [self.element(*column) for column in columns]
        states = [-largest - 1 if x is None else x[0] for x in results]
        kept = [old if x is None else x[1] for x, old in zip(results, buffers, strict=True)]
        bits = [
            np.array(values, dtype=tensor.dtype).view(STORAGE[tensor.dtype]).reshape(shape)
            for values, tensor in zip((states, kept), self.outputs, strict=False)
        ]
        missing = np.array([x is None for x in results], dtype=bool).reshape(shape[0], -1)
        return bits, missing.any(1).tolist()


def check_exact(run: Run, problem: Exact) -> None:
    """Every output has the model's bits, every overflow is noted once, nothing beside the outputs was written."""
    expected, missing = problem.expected()
    notes = None
    if problem.overflow is not None:
        marks = np.broadcast_to(problem.mark, problem.overflow.shape)
        notes = np.where(np.array(missing) & (problem.overflow == 0), marks, problem.overflow)
    before = [tensor.fresh() for tensor in problem.outputs]
    unchanged = [(x, x.fresh()) for x in problem.operands if all(x is not out for out in problem.outputs)]
    run(problem)
    for tensor, bits, old in zip(problem.outputs, expected, before, strict=True):
        assert np.array_equal(tensor.bits, bits)
        assert tensor.guards_intact(old)
    for tensor, old in unchanged:
        assert np.array_equal(tensor.memory, old.memory)
    if notes is not None:
        assert np.array_equal(problem.overflow, notes)


def check_decoded(target: str, q: Tensor, out: Tensor, fraction_bits: int) -> None:
    """Every number has the bits of q 2^-fraction_bits, rounded once (halves: by way of float32)."""
    with np.errstate(over="ignore", invalid="ignore"):
        expected = Tensor.of(decoded(q, fraction_bits), out.dtype).bits
    bicm_emulator.fixed_point_decode(target, out.argument, q.argument, fraction_bits=fraction_bits)
    assert same_bits(out.bits, expected, out.dtype)
    assert out.guards_intact()
