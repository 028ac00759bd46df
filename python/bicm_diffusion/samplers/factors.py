"""Factors of a step, gamma or p: conversion to numbers, and to fractions for integer states."""

from __future__ import annotations

from fractions import Fraction
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.rational import MAX_DENOMINATOR, nearest
from bicm_diffusion.samplers.prediction import Number

Integer: TypeAlias = int | Tensor
Ratio: TypeAlias = tuple[Integer, Integer]
#: A factor of a step: a float, (B,) floats, a Fraction, or numerator and denominator (ints or (B,) int64 tensors).
Factor: TypeAlias = float | Tensor | Fraction | Ratio

#: Of a fraction's numerator and denominator in an exact step.
MAX_TERM = 2**20


def check_factor(name: str, factor: Any, *, lowest: float | None, batch: int) -> None:
    """Raise unless a factor is a number in (0, 1], or in [lowest, 1]; tensors are not read."""
    fraction = isinstance(factor, tuple | list)
    terms: tuple[Any, ...] = tuple(factor) if fraction else (factor,)
    if fraction and len(terms) != 2:
        raise ValueError(f"{name}: expected a number or a fraction (n, m), got {len(terms)} numbers")
    for term in terms:
        if isinstance(term, Tensor):
            _check_tensor(name, term, batch, integers=fraction)
        elif not isinstance(term, Integral if fraction else Real):
            expected = "an int or an int64 tensor in (n, m)" if fraction else "a number, a fraction (n, m) or a tensor"
            raise TypeError(f"{name}: expected {expected}, got {described(term)}")
    if any(isinstance(term, Tensor) for term in terms):
        return
    n, m = terms if fraction else (factor.numerator, factor.denominator) if isinstance(factor, Fraction) else (1, 1)
    if not (0 <= n <= MAX_TERM and 1 <= m <= MAX_TERM):
        raise ValueError(f"{name}: expected n and m of n/m in [1, 2**20], got {factor}")
    number = value(factor)
    if not (number > 0.0 or number == lowest) or number > 1.0:
        raise ValueError(f"{name}: expected a value in {'(' if lowest is None else '['}0, 1], got {factor}")


def _check_tensor(name: str, term: Tensor, batch: int, *, integers: bool) -> None:
    if term.dtype != torch.int64 if integers else not term.is_floating_point():
        raise TypeError(f"{name}: expected {'int64' if integers else 'floating'} tensors, got {term.dtype}")
    if term.dim() > 1 or (term.dim() == 1 and len(term) != batch):
        raise ValueError(f"{name}: expected a 0-d or a ({batch},) tensor, got shape {tuple(term.shape)}")


def rational(name: str, factor: Factor) -> Ratio:
    """Return a factor as numerator and denominator: the nearest fraction with a denominator up to 1024.

    A tensor of floats is read on the host, once; numerators and denominators given as tensors are not.
    """
    if isinstance(factor, tuple | list):
        if isinstance(factor[0], int) and factor[0] < 1:
            raise ValueError(_too_small(name, factor))
        return factor[0], factor[1]
    if isinstance(factor, Tensor):
        pairs = [_fraction(name, x) for x in factor.double().flatten().tolist()]
        if factor.dim() == 0:
            return pairs[0]
        numerators, denominators = zip(*pairs, strict=True) if pairs else ((), ())
        return (
            torch.tensor(numerators, dtype=torch.int64, device=factor.device),
            torch.tensor(denominators, dtype=torch.int64, device=factor.device),
        )
    return (factor.numerator, factor.denominator) if isinstance(factor, Fraction) else _fraction(name, factor)


def _fraction(name: str, factor: float) -> tuple[int, int]:
    if not 0.0 <= factor <= 1.0:
        raise ValueError(f"{name}: expected values in [0, 1], got {factor}")
    n, m = nearest(factor)
    if n < 1:
        raise ValueError(_too_small(name, factor))
    return n, m


def _too_small(name: str, factor: object) -> str:
    return f"{name}: an exact step needs a factor of at least 1/{MAX_DENOMINATOR}, got {factor}; pass exact=False"


def value(factor: Factor) -> Number:
    """Return a factor as a float or (B,) float64 tensor."""
    if isinstance(factor, tuple | list):
        n, m = factor
        return (n.double() if isinstance(n, Tensor) else n) / (m.double() if isinstance(m, Tensor) else m)
    return factor.double() if isinstance(factor, Tensor) else float(factor)


def rounded(x: Number, dtype: torch.dtype) -> Number:
    """Return x rounded to the precision in which a step of such states computes.

    A step's weights must be consistent with each other: if the step rounded a factor
    after the other weights were made from it, the error would accumulate in every state.
    """
    if dtype == torch.float64:
        return x
    spread = x * (2.0**29 + 1.0)
    return spread - (spread - x)
