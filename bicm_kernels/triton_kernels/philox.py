"""Philox4x32-10 and the numbers made of its bits: csrc/core/philox.h and normal.h in Triton.

Noise is the same bits on every backend, so these are exactly those headers' float32 operations in order; a
launch must switch contraction of multiply and add off. The coefficients are the headers', to the last digit;
they are literals because Triton compares every global constant again at each launch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from bicm_kernels.triton_kernels.rounding import root, wrapping_product


@triton.jit
def philox(x0, x1, x2, x3, k0, k1):
    """Philox4x32-10 (Salmon, Moraes, Dror & Shaw, SC 2011) on uint32 tensors that broadcast."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(x0, 0xD2511F53), wrapping_product(x0, 0xD2511F53)
        high1, low1 = tl.umulhi(x2, 0xCD9E8D57), wrapping_product(x2, 0xCD9E8D57)
        x0 = high1 ^ x1 ^ k0
        x1 = low1
        x2 = high0 ^ x3 ^ k1
        x3 = low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return x0, x1, x2, x3


@triton.jit
def low_word(x):
    """The low 32 bits of an int64."""
    return x.to(tl.uint32)


@triton.jit
def high_word(x):
    """The high 32 bits of an int64."""
    return (x >> 32).to(tl.uint32)


@triton.jit
def uniform_from_bits(bits):
    """u = fl32(fl32(r) + 0.5) 2^-32, so 0 < u <= 1."""
    return (bits.to(tl.float32) + 0.5) * 2.0**-32


@triton.jit
def minus_two_log(u):
    """-2 log(u) for normal u > 0; exactly 0 at 1. The factor is folded into the coefficients."""
    bits = u.to(tl.int32, bitcast=True)
    above = bits - 0x3F3504F3
    f = (bits - (above & -0x800000)).to(tl.float32, bitcast=True) - 1.0
    e = (above >> 23).to(tl.float32)
    f2 = f * f
    high = (f * 0.15272878110408783 + -0.25524434447288513) * f2 + (f * 0.26319220662117004 + -0.28403159976005554)
    low = (f * 0.332468181848526 + -0.4000248312950134) * f2 + (f * 0.5000163912773132 + -0.6666666269302368)
    p = high * (f2 * f2) + low
    tail = (f2 * (f * p) + e * 0.0004243888834025711) + f2
    return (tail - (f + f)) + e * -1.38671875


@triton.jit
def cos_sin_turns(u):
    """(cos 2 pi u, sin 2 pi u) for u in [0, 1]."""
    turns = u * 4.0
    shifted = turns + 12582912.0
    quadrant = shifted.to(tl.int32, bitcast=True)
    r = turns - (shifted - 12582912.0)
    t = r * r
    s = t * -0.004685892257839441 + 0.07971251010894775
    s = s * t + -0.645966649055481
    s = s * t + 1.5707963705062866
    s = s * r
    c = t * 0.0008944863802753389 + -0.020855596289038658
    c = c * t + 0.25366854667663574
    c = c * t + -1.2337005138397217
    c = c * t + 1.0
    odd = (quadrant & 1) != 0
    cosine = tl.where(odd, s, c).to(tl.int32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)
    sine = tl.where(odd, c, s).to(tl.int32, bitcast=True) ^ ((quadrant & 2) << 30)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(first, second):
    """Two normal numbers: radius from the first word, angle from the second; cosine, then sine."""
    radius = root(minus_two_log(uniform_from_bits(first)))
    cosine, sine = cos_sin_turns(uniform_from_bits(second))
    return radius * cosine, radius * sine
