"""float16 and bfloat16: exact to float32, and rounded once to nearest even on the way back."""

from __future__ import annotations

import bicm_emulator
import numpy as np
import pytest

from .model import Problem
from .tensors import Tensor, bfloat16_bits, from_bits, same_bits, to_bits

HALVES = ("float16", "bfloat16")
ALL = np.arange(2**16, dtype=np.uint16)
FLOATS = 200_000 if bicm_emulator.SANITIZED else 4_000_000


def half_tensor(bits: np.ndarray, dtype: str) -> Tensor:
    tensor = Tensor.empty((1, bits.size), dtype)
    tensor.bits[0] = bits
    return tensor


def rounded(target: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """Through a kernel: 1 x, stored as a half."""
    out = Tensor.empty((1, values.size), dtype)
    Problem([Tensor.of(values[None], "float32")], [1.0], out).run(target)
    return out.bits[0]


def floats_around_ties(dtype: str) -> np.ndarray:
    """Every half, the midpoints to the next one, and the floats beside both."""
    values = from_bits(ALL, dtype)
    values = values[np.isfinite(values)].astype(np.float64)
    ordered = np.unique(values)
    middles = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32)
    exact = ordered.astype(np.float32)
    beside = [np.nextafter(x, np.float32(side)) for x in (exact, middles) for side in (-np.inf, np.inf)]
    edges = np.array([65504, 65519.996, 65520, 3.3895314e38, 3.4e38, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    return np.concatenate([exact, middles, *beside, edges])


def random_floats(seed: int) -> np.ndarray:
    bits = np.random.default_rng(seed).integers(0, 2**32, FLOATS, dtype=np.uint32)
    return bits.view(np.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_widening_is_exact(target: str, dtype: str) -> None:
    expected = from_bits(ALL, dtype)
    assert same_bits(bicm_emulator.widen(ALL, dtype).view(np.uint32), expected.view(np.uint32), "float32")
    out = Tensor.empty((1, ALL.size), "float32")
    Problem([half_tensor(ALL, dtype)], [1.0], out).run(target)
    assert same_bits(out.bits[0], expected.view(np.uint32), "float32")


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_survives_the_round_trip(target: str, dtype: str) -> None:
    out = Tensor.empty((1, ALL.size), dtype)
    Problem([half_tensor(ALL, dtype)], [1.0], out).run(target)
    assert same_bits(out.bits[0], ALL, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_nearest_even(target: str, dtype: str) -> None:
    with np.errstate(all="ignore"):
        values = np.concatenate([floats_around_ties(dtype), random_floats(1)])
    expected = to_bits(values, dtype)
    assert same_bits(bicm_emulator.narrow(values, dtype), expected, dtype)
    assert same_bits(rounded(target, values, dtype), expected, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_float64_reaches_a_half_through_float32(target: str, dtype: str) -> None:
    values = np.random.default_rng(2).standard_normal((1, 5000))
    out = Tensor.empty((1, 5000), dtype)
    Problem([Tensor.of(values, "float64")], [1.0], out).run(target)
    assert same_bits(out.bits, to_bits(values.astype(np.float32), dtype), dtype)


def test_the_bfloat16_model_breaks_ties_to_even() -> None:
    one = 0x3F80
    halfway = np.array([one << 16 | 0x8000, one << 16 | 0x18000], np.uint32).view(np.float32)
    assert bfloat16_bits(halfway).tolist() == [one, one + 2]
    assert bfloat16_bits(np.array([3.4e38], np.float32)).tolist() == [0x7F80]
