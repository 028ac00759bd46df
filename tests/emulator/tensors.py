"""Tensors for the kernels: a dtype, a memory layout, and memory around them that must stay as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import bicm_emulator
import numpy as np

DTYPES = ("float16", "bfloat16", "float32", "float64")
INTEGERS = {"int32": np.uint32, "int64": np.uint64}
STORAGE = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32, "float64": np.uint64} | INTEGERS
GUARD = 67  # elements after a tensor
# Inputs end where their memory ends when the address sanitizer is there to see a read beyond it.
INPUT_GUARD = 0 if bicm_emulator.SANITIZED else GUARD


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 by comparing the distances to both neighbours; the even one wins a tie."""
    bits = values.astype(np.float32).view(np.uint32)
    low = bits & np.uint32(0xFFFF0000)
    high = low + np.uint32(0x10000)
    exact = values.astype(np.float64)
    below = low.view(np.float32).astype(np.float64)
    # The neighbour of the largest finite number stands for 2^128, which is infinity in the format.
    largest = (high & np.uint32(0x7FFFFFFF)) == 0x7F800000
    above = np.where(largest, np.copysign(2.0**128, exact), high.view(np.float32).astype(np.float64))
    with np.errstate(invalid="ignore"):
        to_below, to_above = np.abs(exact - below), np.abs(above - exact)
    even = (low >> np.uint32(16)) & np.uint32(1) == 0
    chosen = np.where((to_below < to_above) | ((to_below == to_above) & even), low, high)
    chosen = np.where(np.isinf(values), bits, chosen)
    chosen = np.where(np.isnan(values), np.uint32(0x7FC00000), chosen)
    return (chosen >> np.uint32(16)).astype(np.uint16)


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values of the compute type rounded once to a dtype; float64 reaches the halves through float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "bfloat16":
            return bfloat16_bits(values.astype(np.float32))
        if dtype == "float16":
            return values.astype(np.float32).astype(np.float16).view(np.uint16)
        return np.ascontiguousarray(values.astype(dtype)).view(STORAGE[dtype])


def from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The values of stored bits, in float32 (float64 for float64)."""
    bits = np.ascontiguousarray(bits)
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(dtype)


def same_bits(a: np.ndarray, b: np.ndarray, dtype: str) -> bool:
    """Whether stored bits are equal; any NaN equals any NaN."""
    nan = np.isnan(from_bits(a, dtype)) & np.isnan(from_bits(b, dtype))
    return a.shape == b.shape and bool(np.all((a == b) | nan))


Place = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def strided(flat: np.ndarray, shape: tuple[int, ...], strides: list[int]) -> np.ndarray:
    item = flat.itemsize
    return np.lib.stride_tricks.as_strided(flat, shape, [stride * item for stride in strides])


def row_major(shape: tuple[int, ...], step: int = 1, padding: int = 0) -> list[int]:
    """Strides of a row-major tensor: `step` between elements, `padding` elements after each sample."""
    strides = [step]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    strides[0] += padding
    return strides[: len(shape)]


def permuted(shape: tuple[int, ...]) -> list[int]:
    """Strides of a tensor whose sample dimensions lie in memory in the opposite order."""
    strides, expected = [], 1
    for size in shape[1:]:
        strides.append(expected)
        expected *= size
    return [expected, *strides]


def broadcast(shape: tuple[int, ...]) -> list[int]:
    """Strides of a tensor expanded along its first sample dimension."""
    strides = row_major(shape)
    strides[1:2] = [0] * len(strides[1:2])
    return strides


LAYOUTS: dict[str, Callable[[tuple[int, ...]], list[int]]] = {
    "contiguous": row_major,
    "padded": lambda shape: row_major(shape, padding=3),
    "padded to 16 bytes": lambda shape: row_major(shape, padding=-int(np.prod(shape[1:])) % 8 + 8),
    "permuted": permuted,
    "every second": lambda shape: row_major(shape, step=2),
}
INPUT_LAYOUTS = {**LAYOUTS, "expanded": broadcast, "one sample": lambda shape: [0, *row_major(shape)[1:]]}


@dataclass
class Tensor:
    """A view into guarded memory; `offset` moves it away from the allocator's alignment, in elements."""

    dtype: str
    memory: np.ndarray
    bits: np.ndarray
    touched: np.ndarray

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], dtype: str, layout: str = "contiguous", offset: int = 0, guard: int = GUARD
    ) -> Tensor:
        strides = INPUT_LAYOUTS[layout](shape)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        # A multiple of 16 bytes before the tensor keeps offset 0 aligned.
        before = 8 * 9 + offset
        memory = np.full(before + max(extent, 0) + guard, 0x5A5A, dtype=STORAGE[dtype])
        touched = np.zeros(memory.shape, dtype=bool)
        if 0 not in shape:
            strided(touched[before:], shape, strides)[...] = True
        return cls(dtype, memory, strided(memory[before:], shape, strides), touched)

    @classmethod
    def of(cls, values: np.ndarray, dtype: str, layout: str = "contiguous", offset: int = 0) -> Tensor:
        tensor = cls.empty(values.shape, dtype, layout, offset, INPUT_GUARD)
        # Where a layout folds elements onto each other, the last one written stays.
        tensor.bits[...] = to_bits(values, dtype)
        return tensor

    @property
    def argument(self) -> np.ndarray | tuple[np.ndarray, str]:
        """What the module takes: bfloat16 has no NumPy dtype."""
        return (self.bits, self.dtype) if self.dtype == "bfloat16" else self.bits.view(self.dtype)

    @property
    def values(self) -> np.ndarray:
        return from_bits(self.bits, self.dtype)

    def fresh(self) -> Tensor:
        """The same layout and contents in memory of its own."""
        memory = self.memory.copy()
        start = (self.bits.__array_interface__["data"][0] - self.memory.ctypes.data) // memory.itemsize
        strides = [stride // memory.itemsize for stride in self.bits.strides]
        return Tensor(self.dtype, memory, strided(memory[start:], self.bits.shape, strides), self.touched)

    def guards_intact(self, before: Tensor | None = None) -> bool:
        """Whether all memory outside the tensor is as it was."""
        expected = 0x5A5A if before is None else before.memory[~self.touched]
        return bool(np.all(self.memory[~self.touched] == expected))


class _Far:
    def __init__(self, row: np.ndarray, first: int) -> None:
        shape, address = (1, 2**33), row.ctypes.data - row.itemsize * first
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": row.dtype.str, "data": (address, False)}


def far(row: np.ndarray, first: int) -> np.ndarray:
    """A dense tensor of 2^33 elements of which only those of `row` exist, from `first` on."""
    return np.asarray(_Far(row, first))
