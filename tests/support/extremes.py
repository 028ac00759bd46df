"""Residuals whose squares leave a dtype, and what their losses and slopes are, with fifty digits and any exponent."""

from __future__ import annotations

import math
import struct
from decimal import Context, Decimal
from itertools import chain

#: A residual, one sample, and c.
Case = tuple[list[float], float]
INFINITY, NAN = math.inf, math.nan

# In every dtype whose exponents are those of float32.
SINGLES: list[Case] = [
    *(([1e30, 1e30], c) for c in (0.0, 0.1, 1e25)),
    *(([1e30, -2.0, 0.0], c) for c in (0.0, 0.5)),
    ([3e38, -3e38, 3e38], 0.0),
    ([3e38] * 40, 1.0),
    ([2e19, 3e19, -1e10], 0.25),
    ([1.0, -2e18, 3.0], 3e18),
    ([1.0, 2.0], 1e30),
    ([1e-7, -2e-7], 1e20),
    ([1e25, 3.0], 1e25),
    ([7e18, 1e19], 1.3e19),
    ([1e30, 1e-30, 0.0], 0.0),
]
SINGLE_TINY: list[Case] = [
    *(([3e-42, 4e-42], c) for c in (0.0, 1e-44, 1e-42, 1e-38)),
    *(([1e-21, -2e-21], c) for c in (0.0, 1e-22, 1e-6, 0.03)),
    *(([1e-30, 1.0, 0.0, -1e-30], c) for c in (0.0, 1e-25)),
    ([3e-42, 1e30, -1.0], 0.0),
    ([0.0, 3e-42], 0.0),
    ([0.0, 0.0], 0.0),
    ([0.0, -0.0], 1e-40),
    ([1e-42] * 40, 0.0),
]
DOUBLES: list[Case] = [
    *(([1e200, 1e200], c) for c in (0.0, 0.1, 1e195, 1e250)),
    *(([1e200, -2.0, 0.0], c) for c in (0.0, 0.5)),
    ([1.5e308, -1.5e308], 0.0),
    ([1.5e308] * 40, 1.0),
    ([1e154, 2e154, -1e100], 0.25),
    ([1.0, 2.0], 1e200),
    ([1e190, 1e150], 1e200),
    ([1.0, -2.0], 1e308),
    ([1e200, 1e-200, 0.0], 0.0),
]
DOUBLE_TINY: list[Case] = [
    *(([3e-322, 4e-322], c) for c in (0.0, 1e-320)),
    *(([1e-200, -2e-200], c) for c in (0.0, 1e-201, 1e-150, 1e-100)),
    *(([1e-200, 1.0, 0.0, -1e-200], c) for c in (0.0, 1e-195)),
    ([1e-160, 1e-161], 1e-5),
    ([3e-322, 1e200, -1.0], 0.0),
    ([0.0, 3e-322], 0.0),
    ([0.0, 0.0], 1e-320),
    ([1e-300] * 40, 0.0),
]
SPECIAL: list[Case] = [
    (r, c)
    for r in ([INFINITY, 1.0], [-INFINITY, INFINITY, 0.0], [NAN, 1.0], [2.0, INFINITY, NAN], [INFINITY])
    for c in (0.0, 0.5)
] + [([1.0, 2.0], INFINITY)]


def _single(case: Case) -> Case:
    """The nearest float32 numbers, because c is rounded to the compute type on some backends."""
    r, c = case
    *r, c = struct.unpack(f"{len(r) + 1}f", struct.pack(f"{len(r) + 1}f", *r, c))
    return r, c


SINGLES, SINGLE_TINY = [[*map(_single, cases)] for cases in (SINGLES, SINGLE_TINY)]

CASES: dict[str, list[Case]] = {
    "float16": [([6e-8, 0.0, -1e-7], 0.0), ([65504.0, -65504.0], 0.0), *SPECIAL],
    "bfloat16": [*SINGLES, *SINGLE_TINY, *SPECIAL],
    "float32": [*SINGLES, *SINGLE_TINY, *SPECIAL],
    "float64": [*SINGLES, *SINGLE_TINY, *DOUBLES, *DOUBLE_TINY, *SPECIAL],
}
NAMED = list(chain.from_iterable([(dtype, case) for case in cases] for dtype, cases in CASES.items()))

_CONTEXT = Context(prec=50, Emax=10**6, Emin=-(10**6))


def title(case: Case) -> str:
    """What pytest calls a case."""
    r, c = case
    return f"{'x'.join(map(str, r[:3]))}{'...' if len(r) > 3 else ''} c={c}"


def _length(numbers: list[Decimal]) -> Decimal:
    total = Decimal(0)
    for x in numbers:
        total = _CONTEXT.add(total, _CONTEXT.multiply(x, x))
    return _CONTEXT.sqrt(total)


def _distance(numbers: list[Decimal], c: Decimal) -> tuple[Decimal, list[Decimal]]:
    """sqrt(s + c^2) - c of finite numbers, and its derivatives; both 0 at s = c = 0."""
    if not any(numbers):
        return Decimal(0), [Decimal(0)] * len(numbers)
    norm, length = _length(numbers), _length([*numbers, c])
    value = _CONTEXT.divide(_CONTEXT.multiply(norm, norm), _CONTEXT.add(length, c))
    return value, [_CONTEXT.divide(x, length) for x in numbers]


def _one(r: list[float], c: float) -> tuple[Decimal, list[Decimal]]:
    if any(map(math.isnan, r)):
        return Decimal(NAN), [Decimal(NAN)] * len(r)
    if c == INFINITY:
        return Decimal(0), [Decimal(0)] * len(r)
    if any(map(math.isinf, r)):
        return Decimal(INFINITY), [Decimal(NAN) if math.isinf(x) else Decimal(0) for x in r]
    return _distance([Decimal(x) for x in r], Decimal(c))


def _square(r: list[float]) -> tuple[Decimal, list[Decimal]]:
    """The sum of the squares, and twice the residual."""
    slopes = [_CONTEXT.multiply(Decimal(x), 2) for x in r]
    if not all(map(math.isfinite, r)):
        return Decimal(NAN if any(map(math.isnan, r)) else INFINITY), slopes
    length = _length([Decimal(x) for x in r])
    return _CONTEXT.multiply(length, length), slopes


def exactly(r: list[float], c: float, kind: str) -> tuple[Decimal, list[Decimal]]:
    """A sample's distance, and its derivatives in the residual.

    An infinite residual makes the distance infinite, its own derivative NaN, which stops an optimiser's step under
    GradScaler, and those of the others 0; a NaN makes all NaN that it is part of. Of a square each derivative is that
    of its own residual alone, and c is not looked at.
    """
    if kind == "squared":
        return _square(r)
    if kind == "vector":
        return _one(r, c)
    each = [_one([x], c) for x in r]
    total = Decimal(0)
    for value, _ in each:
        total = _CONTEXT.add(total, value)
    return _CONTEXT.divide(total, len(r)), [_CONTEXT.divide(slope[0], len(r)) for _, slope in each]
