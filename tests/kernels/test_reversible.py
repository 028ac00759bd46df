"""Exact reversible updates: arithmetic against Python's integers, exact inverses, overflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bicm_kernels as bk
from bicm_kernels import reference
from tests.support.tensors import BF16, F16, F32, F64, random

LARGEST, MISSING, MAX_RATIO = 2**63 - 1, -(2**63), 2**20
Element = tuple[int, int]

ratios = st.integers(1, MAX_RATIO) | st.sampled_from([1, 2, 3, 9, 10, 24, 25, 1000, MAX_RATIO - 1, MAX_RATIO])
# Sizes of every magnitude, and the ends of the range.
integers = st.integers(-LARGEST, LARGEST) | st.integers(-1000, 1000) | st.sampled_from([LARGEST, -LARGEST])
magnitudes = st.integers(0, 62).flatmap(lambda bits: st.integers(-(2**bits), 2**bits))
# What float64 holds exactly below 2^63.
increments = st.builds(lambda x, shift: x << shift, st.integers(-(2**53), 2**53), st.integers(0, 9))


def multiply(z: int, buffer: int, n: int, m: int) -> Element | None:
    """mul in Python's integers; None where one of them leaves the range."""
    buffer = buffer * m + z % m
    scaled = z // m * n + buffer % n
    return (scaled, buffer // n) if max(abs(buffer), abs(scaled)) <= LARGEST else None


def step(z: int, buffer: int, increment: int, n: int, m: int, inverse: bool) -> Element | None:
    """A step of one element in Python's integers."""
    if inverse:
        z -= increment
        if abs(z) > LARGEST:
            return None
        return (z, buffer) if n == m else multiply(z, buffer, m, n)
    moved = (z, buffer) if n == m else multiply(z, buffer, n, m)
    if moved is None or abs(moved[0] + increment) > LARGEST:
        return None
    return moved[0] + increment, moved[1]


def run(q: Tensor, x: Tensor, info: Tensor, n: Any, m: Any, *, inverse: bool = False, module: Any = bk) -> Any:
    """A step whose increments are the numbers x themselves."""
    op = module.exact_affine_inverse_step if inverse else module.exact_affine_step
    return op(q, [x], [1.0], info, ratio=(n, m), fraction_bits=0)


# --- arithmetic, against Python's integers ----------------------------------------------------------------------------


@given(st.lists(st.tuples(integers | magnitudes, integers | magnitudes, increments), min_size=1), ratios, ratios)
def test_every_step_is_pythons(elements: list[tuple[int, int, int]], n: int, m: int) -> None:
    z, buffers, added = (torch.tensor([column]) for column in zip(*elements, strict=True))
    for inverse in (False, True):
        expected = [step(*element, n, m, inverse) or (MISSING, element[1]) for element in elements]
        for module in (bk, reference):
            results = run(z, added.double(), buffers, n, m, inverse=inverse, module=module)
            assert list(zip(*(x[0].tolist() for x in results), strict=True)) == expected


@given(st.lists(st.tuples(integers, st.integers(0, LARGEST), increments), min_size=1), ratios, ratios)
def test_what_fits_comes_back(elements: list[tuple[int, int, int]], n: int, m: int) -> None:
    z, buffers, added = (torch.tensor([column]) for column in zip(*elements, strict=True))
    there, kept = run(z, added.double(), buffers, n, m)
    back, info = run(there, added.double(), kept, n, m, inverse=True)
    fits = there != MISSING
    assert torch.equal(back[fits], z[fits])
    assert torch.equal(info[fits], buffers[fits])
    assert torch.equal(back[~fits], there[~fits])


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 641, 1000, 65537, 2**19 + 1, MAX_RATIO - 1, MAX_RATIO])
def test_division_at_its_edges(divisor: int) -> None:
    # Multiples of the divisor and their neighbours, up to the ends of int64.
    wholes = [0, 1, 2, 3, 2**31, 2**32, 2**52, 2**53, LARGEST // divisor - 1, LARGEST // divisor]
    z = [sign * whole * divisor + k for whole in wholes for sign in (1, -1) for k in (-2, -1, 0, 1, 2)]
    z = [x for x in z if abs(x) <= LARGEST]
    for n, m in ((1, divisor), (divisor, 1), (divisor, 3)):
        expected = [step(x, 0, 0, n, m, inverse=False) or (MISSING, 0) for x in z]
        results = run(torch.tensor([z]), torch.zeros(1, len(z)), torch.zeros(1, len(z), dtype=torch.int64), n, m)
        assert list(zip(*(x[0].tolist() for x in results), strict=True)) == expected


def test_a_known_table() -> None:
    q, info = torch.tensor([[7, -7, 8, -1, 0]]), torch.tensor([[0, 0, 5, 5, 0]])
    scaled, kept = run(q, torch.zeros(1, 5), info, 2, 3)
    assert scaled.tolist() == [[5, -6, 5, -1, 0]]
    assert kept.tolist() == [[0, 1, 8, 8, 0]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_encoding_rounds_to_even(dtype: torch.dtype, each_backend: str) -> None:
    x = torch.tensor([[0.5, 1.5, -0.5, -1.5, 2.5, -0.0, 3.49999]], dtype=F64)
    q = bk.fixed_point_encode(x, fraction_bits=0, dtype=dtype)
    assert q.tolist() == [[0, 2, 0, -2, 2, 0, 3]]
    assert q.dtype == dtype


@given(st.floats(width=64), st.integers(0, 62))
def test_encoding_is_pythons(x: float, bits: int) -> None:
    scaled = x * 2.0**bits
    expected = round(scaled) if abs(scaled) < 2.0**63 else MISSING
    for module in (bk, reference):
        q = module.fixed_point_encode(torch.tensor([x], dtype=F64), fraction_bits=bits)
        assert q.item() == expected
        back = module.fixed_point_decode(q, fraction_bits=bits, dtype=F64).item()
        assert back == float(expected) / 2.0**bits if expected != MISSING else back != back


@given(integers)
def test_decoding_rounds_once(q: int) -> None:
    for module in (bk, reference):
        assert module.fixed_point_decode(torch.tensor([q]), fraction_bits=0, dtype=F64).item() == float(q)


# --- round trips ------------------------------------------------------------------------------------------------------


def trip(q: Tensor, network: Callable[[Tensor, int], Tensor], steps: int, gamma: Element, *, first: str) -> Any:
    """BDIA there and back; the pair of states and the buffer on the way, and the overflow's notes."""
    overflow, info, pair = torch.zeros(len(q), dtype=torch.int64), torch.zeros_like(q), (q, q + 1000)
    path = []
    order = {"sample": (False, True), "invert": (True, False)}[first]
    for inverse in order:
        op = bk.bdia_exact_inverse_step if inverse else bk.bdia_exact_step
        for k in range(steps):
            time = steps - k if inverse != order[0] else k + 1
            z = bk.fixed_point_decode(pair[1])
            eps = network(z, time)
            numbers = {"a": 1 - 0.01 * time / steps, "b": 0.1, "a_last": 1.01, "b_last": -0.05}
            state, info = op(pair[0], pair[1], eps, info, **numbers, gamma=gamma, overflow=overflow, mark=k + 1)
            pair = pair[1], state
        path.append((*pair, info, overflow.clone()))
        pair = pair[::-1]
    return path


def network(dtype: torch.dtype) -> Callable[[Tensor, int], Tensor]:
    return lambda z, time: torch.tanh(z.to(dtype) * 0.5 + 0.01 * time)


@pytest.mark.parametrize("gamma", [(1, 1), (24, 25), (9, 10), (1, 2)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_sampling_and_inverting_returns_every_bit(gamma: Element, dtype: torch.dtype, each_backend: str) -> None:
    q = bk.fixed_point_encode(random(3, 5))
    there, back = trip(q, network(dtype), 60, gamma, first="sample")
    assert not there[3].any()
    assert not back[3].any()
    assert (there[2] > 0).any() == (gamma != (1, 1))
    assert torch.equal(back[1], q)
    assert torch.equal(back[0], q + 1000)
    assert not back[2].any()


@pytest.mark.parametrize("gamma", [(1, 1), (24, 25), (9, 10)])
def test_inverting_and_sampling_returns_every_bit(gamma: Element) -> None:
    q = bk.fixed_point_encode(random(3, 5))
    there, back = trip(q, network(F32), 50, gamma, first="invert")
    assert not there[2].any()
    assert torch.equal(back[1], q)
    assert torch.equal(back[0], q + 1000)
    assert not back[2].any()


def test_seventy_halvings_overflow(each_backend: str) -> None:
    q = bk.fixed_point_encode(random(3, 64))
    there, _ = trip(q, network(F32), 70, (1, 2), first="sample")
    assert ((there[3] > 60) & (there[3] <= 70)).all()
    assert bk.fixed_point_decode(there[1]).isnan().any(1).all()


def test_undoing_unmade_halvings_overflows_too(each_backend: str) -> None:
    there, _ = trip(bk.fixed_point_encode(random(3, 64)), network(F32), 40, (1, 2), first="invert")
    assert there[3].all()


# --- overflow ---------------------------------------------------------------------------------------------------------

ONE = torch.ones(1, 1)
Q = torch.tensor([[10]])
OVERFLOWS: dict[str, Callable[[Tensor], Any]] = {
    "buffer times m": lambda f: bk.exact_affine_step(Q, [ONE], [1.0], Q * 2**58, ratio=(1, 4), overflow=f),
    "state times n": lambda f: bk.exact_affine_step(Q * 2**59, [ONE], [1.0], 0 * Q, ratio=(2, 1), overflow=f),
    "state plus increment": lambda f: bk.exact_affine_step(
        Q - 11 + 2**63 - 1, [ONE], [8.0], 0 * Q, fraction_bits=0, overflow=f
    ),
    "state minus increment": lambda f: bk.exact_affine_inverse_step(
        10 - Q - LARGEST, [ONE], [8.0], 0 * Q, fraction_bits=0, overflow=f
    ),
    "increment": lambda f: bk.exact_affine_step(Q, [ONE], [2.0**31], 0 * Q, overflow=f),
    "NaN": lambda f: bk.exact_affine_step(Q, [ONE * torch.nan], [1.0], 0 * Q, overflow=f),
    "infinity": lambda f: bk.exact_affine_step(Q, [ONE * torch.inf], [1.0], 0 * Q, overflow=f),
    "missing before": lambda f: bk.exact_affine_step(0 * Q + MISSING, [ONE], [1.0], 0 * Q, overflow=f),
    "missing operand": lambda f: bk.exact_affine_step(Q, [0 * Q + MISSING], [1.0], 0 * Q, overflow=f),
    "32 bits": lambda f: bk.exact_affine_step(
        torch.tensor([[2**31 - 5]], dtype=torch.int32), [ONE], [5.0], 0 * Q, fraction_bits=0, overflow=f
    ),
    "no ratio": lambda f: bk.exact_affine_step(Q, [ONE], [1.0], 0 * Q, ratio=(torch.tensor([0]), 1), overflow=f),
    "large ratio": lambda f: bk.exact_affine_step(
        Q, [ONE], [1.0], 0 * Q, ratio=(1, torch.tensor(MAX_RATIO + 1)), overflow=f
    ),
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_nothing_wraps_silently(name: str, each_backend: str) -> None:
    overflow = torch.zeros(1, dtype=torch.int64)
    state, info = OVERFLOWS[name](overflow)
    assert overflow.tolist() == [1]
    assert state.item() == torch.iinfo(state.dtype).min
    assert bk.fixed_point_decode(state, fraction_bits=0).isnan().all()
    assert info.item() in (0, 10 * 2**58)


@pytest.mark.parametrize("x", [1e10, -1e10, 2.0**31, torch.inf, -torch.inf, torch.nan])
def test_what_cannot_be_encoded_is_noted(x: float, each_backend: str) -> None:
    overflow = torch.tensor([0, 0, 9])
    q = bk.fixed_point_encode(torch.tensor([[1.0], [x], [x]]), overflow=overflow, mark=4)
    assert q.tolist() == [[2**32], [MISSING], [MISSING]]
    assert overflow.tolist() == [0, 4, 9]
    narrow = bk.fixed_point_encode(torch.tensor([[x]]), fraction_bits=0, dtype=torch.int32)
    assert narrow.item() == -(2**31)


def test_the_first_mark_stays(each_backend: str) -> None:
    overflow = torch.zeros(3, dtype=torch.int64)
    x = torch.zeros(3, 2000)
    q = torch.zeros(3, 2000, dtype=torch.int64)
    for k in range(3):
        x[k, 700 * k] = torch.nan
        q, _ = bk.exact_affine_step(q, [x], [1.0], 0 * q, overflow=overflow, mark=torch.tensor([1, 20, 300]) + k)
    assert overflow.tolist() == [1, 21, 302]
    assert (q == MISSING).sum().item() == 3
