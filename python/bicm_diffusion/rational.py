"""Fractions with small denominators, used as factors in exact steps."""

from __future__ import annotations

import math

#: Exact steps multiply by fractions with denominators up to this one.
MAX_DENOMINATOR = 1024


def nearest(x: float, limit: int = MAX_DENOMINATOR) -> tuple[int, int]:
    """Return numerator and denominator of the fraction nearest to x ≥ 0 with a denominator up to `limit`.

    By continued fractions; x is finite, and what is above 2^60 counts as that.

    >>> nearest(0.96), nearest(math.pi, 150)
    ((24, 25), (355, 113))
    """
    n_last, m_last, n, m = 0, 1, 1, 0
    rest = x
    while True:
        whole = math.floor(min(rest, 2.0**60))
        if m_last + whole * m > limit:
            # The best semiconvergent may be nearer than the last convergent.
            k = (limit - m_last) // m
            between = n_last + k * n, m_last + k * m
            nearer = abs(between[0] / between[1] - x) < abs(n / m - x)
            return between if nearer else (n, m)
        n_last, m_last, n, m = n, m, n_last + whole * n, m_last + whole * m
        part = rest - whole
        if n / m == x or not part or whole >= 2**60:  # rest is rounded: it may be whole where x is not n/m
            return n, m
        rest = 1 / part
