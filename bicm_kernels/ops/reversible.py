"""Bit-exact reversible updates: integer states on a fixed-point grid, and a buffer for the remainders of divisions.

Floating-point inverses are not exact: their error grows as gamma^-N. Here both directions round the same increment
to the same integer, one adds it and the other subtracts it, and a rational factor n/m keeps its remainders in an
information buffer, so that a round trip returns every bit (given a network that returns the same bits twice).

Overflow never wraps around. The least integer of a state's dtype represents NaN: an element that leaves the
range, or is computed from NaN or infinity, becomes it, stays it in later steps and decodes to NaN. ``overflow``, a (B,)
int64 tensor of zeros, records it per sample without a device sync: where a sample of the result holds such an
element and the entry is still 0, the entry becomes ``mark`` (the step's number, say).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bicm_kernels.ops.arguments import Integer, Number
from bicm_kernels.ops.reversible_dispatch import (
    AFFINE_INVERSE_STEP,
    AFFINE_STEP,
    BDIA_INVERSE_STEP,
    BDIA_STEP,
    DECODE,
    ENCODE,
    Pair,
)

TensorOrPair = Tensor | tuple[Tensor, Tensor]
Ratio = tuple[Integer, Integer]


def fixed_point_encode(
    x: Tensor,
    *,
    fraction_bits: int = 32,
    dtype: torch.dtype = torch.int64,
    overflow: Tensor | None = None,
    mark: Integer = 1,
) -> Tensor:
    """Numbers as integers on a grid of 2^-fraction_bits: rint(2^fraction_bits x), halves to even.

    Args:
        x: (B, ...), float16, bfloat16, float32 or float64, any strides; |x| < 2^(63 - fraction_bits).
        fraction_bits: places after the binary point, 0 to 62; for an int32 state 0 to 30.
        dtype: torch.int64, or torch.int32 for states whose steps have ratio 1.
        overflow: (B,) int64, gains ``mark`` where a sample holds a number that does not fit, NaN or infinity.
        mark: the value recorded in ``overflow``, at least 1; int, 0-d or (B,) int64 tensor.

    Returns:
        The integers, in the layout of x. A number that does not fit becomes the least integer and decodes to NaN.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device or range; x requires grad, since integers
            have no derivative.

    >>> import torch, bicm_kernels as bk
    >>> bk.fixed_point_encode(torch.tensor([[1.5, -0.125]]), fraction_bits=4)
    tensor([[24, -2]])
    """
    return ENCODE.call(x, fraction_bits, dtype, overflow, mark)


def fixed_point_decode(q: Tensor, *, fraction_bits: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that fixed-point integers represent: q 2^-fraction_bits.

    Args:
        q: (B, ...), int64 or int32, any strides.
        fraction_bits: places after the binary point, 0 to 62; for an int32 state 0 to 30.
        dtype: of the result: float16, bfloat16, float32 or float64.

    Returns:
        The numbers, in the layout of q: rounded to float64 (exact below 2^53), then to the dtype, halves through
        float32. An element that overflowed is NaN.

    Raises:
        TypeError, ValueError: an argument has another type or range.

    >>> import torch, bicm_kernels as bk
    >>> bk.fixed_point_decode(torch.tensor([[24, -2]]), fraction_bits=4)
    tensor([[ 1.5000, -0.1250]])
    """
    return DECODE.call(q, fraction_bits, dtype)


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
    out: Pair | None = None,
) -> Pair:
    """A sampler update that can be undone to the bit: mul(q_last, n/m) + rint(2^fb sum of w_k x_k).

    mul: B <- B m + (Z mod m); Z <- floor(Z/m) n + (B mod n); B <- floor(B/n), with B the element of ``info``. The sum
    is a left fold in float64. B m + (Z mod m), the new Z and the result must stay within 2^63 - 1: see ``overflow``.

    Args:
        q_last: fixed-point state (B, ...), int64, any strides; or int32 where the ratio is 1.
        tensors: 1 to 5 tensors (B, ...): network outputs and states as float16, bfloat16, float32 or float64, or
            fixed-point states of q_last's dtype and fraction_bits, which the kernel decodes; the last may be a pair
            (eps_uncond, eps_cond) with ``guidance_scale``.
        weights: one per tensor; float, 0-d or (B,) tensor.
        info: information buffer (B, ...), int64; zeros before the first step.
        ratio: (n, m), each an int or a 0-d or (B,) int64 tensor, in [1, 2^20]; in lowest terms the buffer grows least,
            by about log2(m/n) bits per step. Where n = m the buffer is not used.
        fraction_bits: places after the binary point, 0 to 62; for an int32 state 0 to 30.
        guidance_scale: s in eps_uncond + s (eps_cond - eps_uncond), which the kernel forms.
        overflow: (B,) int64, zeros at first; where a sample of the result holds an element that left the range, and
            its entry is 0, the entry becomes ``mark``. Without it such elements still decode to NaN.
        mark: the value recorded in ``overflow``, at least 1; int, 0-d or (B,) int64 tensor.
        out: (q_next, info) that receive the results; each exactly one of the tensors, or disjoint from all.

    Returns:
        (q_next, info): the state, in the dtype and layout of q_last, and the buffer; the one given where n and m are
        the same int.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device or range; one requires grad, since integers
            have no derivative.

    >>> import torch, bicm_kernels as bk
    >>> q, x = torch.tensor([[7, -7]]), torch.ones(1, 2)
    >>> q_next, info = bk.exact_affine_step(q, [x], [0.5], 0 * q, ratio=(2, 3), fraction_bits=1); q_next, info
    (tensor([[ 6, -5]]), tensor([[0, 1]]))
    >>> bk.exact_affine_inverse_step(q_next, [x], [0.5], info, ratio=(2, 3), fraction_bits=1)
    (tensor([[ 7, -7]]), tensor([[0, 0]]))
    """
    return AFFINE_STEP.call(
        q_last, tensors, info, weights, guidance_scale, ratio, fraction_bits, overflow, mark, outs=out
    )


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
    out: Pair | None = None,
) -> Pair:
    """The exact inverse of ``exact_affine_step``: div(q_next - rint(2^fb sum of w_k x_k), n/m).

    div: B <- B n + (Z mod n); Z <- floor(Z/n) m + (B mod m); B <- floor(B/m). Undoing steps that were made empties the
    buffer again; from an empty one, the state grows by m/n per step instead, and the buffer stays empty.

    Args:
        q_next: fixed-point state (B, ...), as q_last of ``exact_affine_step``.
        info: the buffer that step returned; zeros where no step was made.
        tensors, weights, ratio, fraction_bits, guidance_scale, overflow, mark, out: as for ``exact_affine_step``.

    Returns:
        (q_last, info), as ``exact_affine_step``.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device or range; one requires grad, since integers
            have no derivative.

    >>> import torch, bicm_kernels as bk
    >>> q, x = torch.tensor([[6]]), torch.ones(1, 1)
    >>> bk.exact_affine_inverse_step(q, [x], [1.0], 0 * q, fraction_bits=2)
    (tensor([[2]]), tensor([[0]]))
    """
    return AFFINE_INVERSE_STEP.call(
        q_next, tensors, info, weights, guidance_scale, ratio, fraction_bits, overflow, mark, outs=out
    )


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
    out: Pair | None = None,
) -> Pair:
    """One BDIA-DDIM update on integers, z_{i-1} from z_{i+1} and z_i (BDIA eq. 24), that can be undone to the bit.

    mul(Z_{i+1}, gamma) + rint(2^fb ((a - gamma/a_last) z_i + (b + gamma b_last/a_last) eps)), z_i decoded from Z_i and
    all of it in float64; mul as in ``exact_affine_step``.

    Args:
        q_last, q: fixed-point states Z_{i+1} and Z_i, (B, ...), both int64, or both int32 where gamma is 1.
        eps: predicted noise at z_i, float16, bfloat16, float32 or float64, or a pair (eps_uncond, eps_cond) with
            ``guidance_scale``.
        info: information buffer (B, ...), int64; zeros before the first step.
        a, b, a_last, b_last: DDIM's coefficients at i and at i + 1; float, 0-d or (B,) tensor.
        gamma: (n, m), gamma = n/m; each an int or a 0-d or (B,) int64 tensor, in [1, 2^20].
        fraction_bits, guidance_scale, overflow, mark, out: as for ``exact_affine_step``.

    Returns:
        (q_next, info): Z_{i-1}, in the dtype and layout of q_last, and the buffer.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device or range; one requires grad, since integers
            have no derivative.

    >>> import torch, bicm_kernels as bk
    >>> q, eps = torch.tensor([[8]]), torch.ones(1, 1)
    >>> bk.bdia_exact_step(q, q, eps, 0 * q, a=1.0, b=0.5, a_last=1.0, b_last=0.5, fraction_bits=3)
    (tensor([[16]]), tensor([[0]]))
    """
    coefficients = (a, b, a_last, b_last)
    return BDIA_STEP.call(
        q_last, (q, eps), info, coefficients, guidance_scale, gamma, fraction_bits, overflow, mark, outs=out
    )


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
    out: Pair | None = None,
) -> Pair:
    """The exact inverse of ``bdia_exact_step``: z_{i+1} from z_{i-1} and z_i (BDIA eq. 28) with every bit.

    div(Z_{i-1} - the integer that ``bdia_exact_step`` added, gamma); div as in ``exact_affine_inverse_step``.

    Args:
        q_next, q: fixed-point states Z_{i-1} and Z_i, as for ``bdia_exact_step``.
        info: the buffer that step returned; zeros where no step was made.
        eps, a, b, a_last, b_last, gamma, fraction_bits, guidance_scale, overflow, mark, out: as for
            ``bdia_exact_step``.

    Returns:
        (q_last, info): Z_{i+1}, in the dtype and layout of q_next, and the buffer.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device or range; one requires grad, since integers
            have no derivative.

    >>> import torch, bicm_kernels as bk
    >>> q, eps = torch.tensor([[8]]), torch.ones(1, 1)
    >>> bk.bdia_exact_inverse_step(2 * q, q, eps, 0 * q, a=1.0, b=0.5, a_last=1.0, b_last=0.5, fraction_bits=3)
    (tensor([[8]]), tensor([[0]]))
    """
    coefficients = (a, b, a_last, b_last)
    return BDIA_INVERSE_STEP.call(
        q_next, (q, eps), info, coefficients, guidance_scale, gamma, fraction_bits, overflow, mark, outs=out
    )
