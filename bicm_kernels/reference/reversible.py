"""Bit-exact reversible updates in PyTorch: fixed-point integers, and a buffer for remainders.

The least integer of a state's dtype represents NaN. An element whose exact result, or one of the integers on
the way to it, is outside the dtype's other values becomes it and stays it; ``overflow`` records it per sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bicm_kernels.reference.arithmetic import check_sequence, like_first, per_sample
from bicm_kernels.reference.multistep import Number, TensorOrPair, fold, guide

Integer = int | Tensor
Ratio = tuple[Integer, Integer]

F64 = torch.float64
#: Numerators and denominators are in [1, MAX_RATIO].
MAX_RATIO = 2**20
_LARGEST = {torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}
_MISSING = -(2**63)


def _decoded(q: Tensor, fraction_bits: int) -> Tensor:
    """q 2^-fraction_bits in float64, rounded once; NaN for an element that overflowed."""
    missing = q == -_LARGEST[q.dtype] - 1
    return torch.where(missing, torch.nan, q.to(F64) * 2.0**-fraction_bits)


def _operand(x: Tensor, fraction_bits: int) -> Tensor:
    return x if x.is_floating_point() else _decoded(x, fraction_bits)


def _rounded(x: Tensor, fraction_bits: int) -> Tensor:
    """rint(2^fraction_bits x) as int64; NaN and what int64 cannot hold become missing."""
    scaled = x * 2.0**fraction_bits
    inside = scaled.abs() < 2.0**63
    return torch.where(inside, torch.where(inside, scaled, 0.0).round().to(torch.int64), _MISSING)


def _bound(x: Tensor, largest: int) -> Tensor:
    """x, or missing where it is outside [-largest, largest]."""
    return torch.where((x >= -largest) & (x <= largest), x, _MISSING)


def _plus(x: Tensor, y: Tensor, largest: int) -> Tensor:
    """x + y, where each is missing or in int64's range and the sum must be in [-largest, largest]."""
    total = x + y
    wrapped = ((x ^ total) & (y ^ total)) < 0
    return _bound(torch.where(wrapped | (x == _MISSING) | (y == _MISSING), _MISSING, total), largest)


def _divide(x: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """Quotient and remainder towards minus infinity."""
    quotient = torch.div(x, by, rounding_mode="floor")
    return quotient, x - quotient * by


def _multiply_add(x: Tensor, by: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """x by + rest with 0 <= rest < by, and whether it stays in int64's range, checked before the product is formed."""
    largest = torch.full_like(by, _LARGEST[torch.int64])
    high, high_rest = _divide(largest, by)
    low, low_rest = _divide(-largest, by)
    fits = (x <= high - (rest > high_rest).to(x.dtype)) & (x >= low + (rest < low_rest).to(x.dtype))
    return x * by + rest, fits


def _scale(q: Tensor, info: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """q n/m and the buffer that undoes it (Maclaurin, Duvenaud & Adams 2015); from m/n it is the exact inverse.

    B <- B m + (Z mod m);  Z <- floor(Z/m) n + (B mod n);  B <- floor(B/n).
    """
    quotient, remainder = _divide(q, m)
    buffer, fits = _multiply_add(info, m, remainder)
    kept, rest = _divide(buffer, n)
    scaled, also_fits = _multiply_add(quotient, n, rest)
    return torch.where(fits & also_fits & (q != _MISSING), scaled, _MISSING), kept


def _integer(value: Integer, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.ones((), dtype=torch.int64, device=like.device) * value
    value = value.to(like.device)
    return value.reshape(-1, *[1] * (like.dim() - 1)) if value.dim() == 1 else value


def _finish(result: Tensor, first: Tensor, overflow: Tensor | None, mark: Integer) -> Tensor:
    """The result in the first state's dtype and layout; records the samples in which an element is missing."""
    missing = result == _MISSING
    result = torch.where(missing, -_LARGEST[first.dtype] - 1, result)
    if overflow is not None:
        new = missing.unsqueeze(-1).flatten(1).any(1) & (overflow == 0)
        overflow.copy_(torch.where(new, _integer(mark, overflow), overflow))
    return like_first(result, first)


def _step(
    last: Tensor,
    increment: Tensor,
    info: Tensor,
    ratio: Ratio,
    inverse: bool,
    overflow: Tensor | None,
    mark: Integer,
) -> tuple[Tensor, Tensor]:
    """mul(last) + increment, or its inverse div(last - increment)."""
    largest = _LARGEST[last.dtype]
    state = torch.where(last == -largest - 1, _MISSING, last.to(torch.int64))
    if all(isinstance(x, int) for x in ratio) and ratio[0] == ratio[1]:
        return _finish(_plus(state, -increment if inverse else increment, largest), last, overflow, mark), info
    n, m = (_integer(x, last) for x in ratio)
    valid = (n >= 1) & (n <= MAX_RATIO) & (m >= 1) & (m <= MAX_RATIO)
    unit = (n == m) | ~valid
    n, m = (torch.where(unit, 1, x) for x in (n, m))
    if inverse:
        subtracted = _plus(state, -increment, largest)
        scaled, kept = _scale(subtracted, info, m, n)
        result = torch.where(unit, subtracted, scaled)
    else:
        scaled, kept = _scale(state, info, n, m)
        result = _plus(torch.where(unit, state, scaled), increment, largest)
    result = torch.where(valid, result, _MISSING)
    kept = torch.where(unit | (result == _MISSING), info, kept)
    return _finish(result, last, overflow, mark), like_first(kept, info)


def _affine(
    last: Tensor,
    tensors: Sequence[TensorOrPair],
    weights: Sequence[Tensor],
    guidance_scale: Number | None,
    fraction_bits: int,
) -> Tensor:
    """rint(2^fraction_bits sum of w_k x_k), in float64 and from the left."""
    operands: list[TensorOrPair] = [
        _operand(x, fraction_bits)
        if isinstance(x, Tensor)
        else (_operand(x[0], fraction_bits), _operand(x[1], fraction_bits))
        for x in tensors
    ]
    return _rounded(fold(guide(operands, guidance_scale, F64), weights), fraction_bits)


def fixed_point_encode(
    x: Tensor,
    *,
    fraction_bits: int = 32,
    dtype: torch.dtype = torch.int64,
    overflow: Tensor | None = None,
    mark: Integer = 1,
) -> Tensor:
    """rint(2^fraction_bits x)."""
    result = _bound(_rounded(x.to(F64), fraction_bits), _LARGEST[dtype])
    return _finish(result, torch.empty_like(x, dtype=dtype), overflow, mark)


def fixed_point_decode(q: Tensor, *, fraction_bits: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    """q 2^-fraction_bits; halves are rounded through float32."""
    result = _decoded(q, fraction_bits)
    if dtype in (torch.float16, torch.bfloat16):
        result = result.float()
    return like_first(result, torch.empty_like(q, dtype=dtype))


def _affine_step(
    last: Tensor,
    tensors: Sequence[TensorOrPair],
    weights: Sequence[Number],
    info: Tensor,
    inverse: bool,
    ratio: Ratio,
    fraction_bits: int,
    guidance_scale: Number | None,
    overflow: Tensor | None,
    mark: Integer,
) -> tuple[Tensor, Tensor]:
    check_sequence("tensors", tensors)
    table = [per_sample(weight, last, F64) for weight in weights]
    increment = _affine(last, tensors, table, guidance_scale, fraction_bits)
    return _step(last, increment, info, ratio, inverse, overflow, mark)


def exact_affine_step(
    q_last: Tensor,
    tensors: Sequence[TensorOrPair],
    weights: Sequence[Number],
    info: Tensor,
    *,
    ratio: Ratio = (1, 1),
    fraction_bits: int = 32,
    guidance_scale: Number | None = None,
    overflow: Tensor | None = None,
    mark: Integer = 1,
) -> tuple[Tensor, Tensor]:
    """mul(q_last, n/m) + rint(2^fraction_bits sum of w_k x_k)."""
    return _affine_step(q_last, tensors, weights, info, False, ratio, fraction_bits, guidance_scale, overflow, mark)


def exact_affine_inverse_step(
    q_next: Tensor,
    tensors: Sequence[TensorOrPair],
    weights: Sequence[Number],
    info: Tensor,
    *,
    ratio: Ratio = (1, 1),
    fraction_bits: int = 32,
    guidance_scale: Number | None = None,
    overflow: Tensor | None = None,
    mark: Integer = 1,
) -> tuple[Tensor, Tensor]:
    """div(q_next - rint(2^fraction_bits sum of w_k x_k), n/m)."""
    return _affine_step(q_next, tensors, weights, info, True, ratio, fraction_bits, guidance_scale, overflow, mark)


def _bdia_step(
    last: Tensor,
    q: Tensor,
    eps: TensorOrPair,
    info: Tensor,
    inverse: bool,
    coefficients: Sequence[Number],
    gamma: Ratio,
    fraction_bits: int,
    guidance_scale: Number | None,
    overflow: Tensor | None,
    mark: Integer,
) -> tuple[Tensor, Tensor]:
    a, b, a_last, b_last = (per_sample(x, last, F64) for x in coefficients)
    n, m = (_integer(x, last).to(F64) for x in gamma)
    weights = [a - (n / m) / a_last, b + (n / m) * (b_last / a_last)]
    increment = _affine(last, [q, eps], weights, guidance_scale, fraction_bits)
    return _step(last, increment, info, gamma, inverse, overflow, mark)


def bdia_exact_step(
    q_last: Tensor,
    q: Tensor,
    eps: TensorOrPair,
    info: Tensor,
    *,
    a: Number,
    b: Number,
    a_last: Number,
    b_last: Number,
    gamma: Ratio = (1, 1),
    fraction_bits: int = 32,
    guidance_scale: Number | None = None,
    overflow: Tensor | None = None,
    mark: Integer = 1,
) -> tuple[Tensor, Tensor]:
    """BDIA eq. 24 on integers: mul(Z_{i+1}) + rint(2^fb ((a - gamma/a_last) z + (b + gamma b_last/a_last) eps))."""
    coefficients = (a, b, a_last, b_last)
    return _bdia_step(q_last, q, eps, info, False, coefficients, gamma, fraction_bits, guidance_scale, overflow, mark)


def bdia_exact_inverse_step(
    q_next: Tensor,
    q: Tensor,
    eps: TensorOrPair,
    info: Tensor,
    *,
    a: Number,
    b: Number,
    a_last: Number,
    b_last: Number,
    gamma: Ratio = (1, 1),
    fraction_bits: int = 32,
    guidance_scale: Number | None = None,
    overflow: Tensor | None = None,
    mark: Integer = 1,
) -> tuple[Tensor, Tensor]:
    """BDIA eq. 28 on integers: div(q_{i-1} - the same increment, gamma)."""
    coefficients = (a, b, a_last, b_last)
    return _bdia_step(q_next, q, eps, info, True, coefficients, gamma, fraction_bits, guidance_scale, overflow, mark)
