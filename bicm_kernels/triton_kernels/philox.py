"""Philox4x32-10 and the numbers made of its bits: csrc/core/philox.h and normal.h in Triton.

Noise is the same bits on every backend, so these are exactly those headers' float32 operations in order. A
launch must switch contraction of multiply and add off.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

MULTIPLIER_0 = tl.constexpr(0xD2511F53)
MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
WEYL_0 = tl.constexpr(0x9E3779B9)
WEYL_1 = tl.constexpr(0xBB67AE85)

LOG_0 = tl.constexpr(float.fromhex("0x1.555554p-2"))
LOG_1 = tl.constexpr(float.fromhex("-0x1.000226p-2"))
LOG_2 = tl.constexpr(float.fromhex("0x1.99a01cp-3"))
LOG_3 = tl.constexpr(float.fromhex("-0x1.54728ap-3"))
LOG_4 = tl.constexpr(float.fromhex("0x1.22d92ep-3"))
LOG_5 = tl.constexpr(float.fromhex("-0x1.0d8242p-3"))
LOG_6 = tl.constexpr(float.fromhex("0x1.055ec6p-3"))
LOG_7 = tl.constexpr(float.fromhex("-0x1.38c9dep-4"))
LN2_HIGH = tl.constexpr(float.fromhex("0x1.63p-1"))
LN2_LOW = tl.constexpr(float.fromhex("-0x1.bd0106p-13"))

SINE_0 = tl.constexpr(float.fromhex("0x1.921fb6p+0"))
SINE_1 = tl.constexpr(float.fromhex("-0x1.4abc24p-1"))
SINE_2 = tl.constexpr(float.fromhex("0x1.4680a0p-4"))
SINE_3 = tl.constexpr(float.fromhex("-0x1.33183ap-8"))
COSINE_1 = tl.constexpr(float.fromhex("-0x1.3bd3ccp+0"))
COSINE_2 = tl.constexpr(float.fromhex("0x1.03c1b0p-2"))
COSINE_3 = tl.constexpr(float.fromhex("-0x1.55b2b6p-6"))
COSINE_4 = tl.constexpr(float.fromhex("0x1.d4f7eep-11"))
ROUNDER = tl.constexpr(float.fromhex("0x1.8p23"))  # adding it leaves the nearest integer in the low bits
UNIT = tl.constexpr(2.0**-32)


@triton.jit
def philox(x0, x1, x2, x3, k0, k1):
    """Philox4x32-10 (Salmon, Moraes, Dror & Shaw, SC 2011) on uint32 tensors that broadcast."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(x0, MULTIPLIER_0), tl.mul(x0, MULTIPLIER_0, sanitize_overflow=False)
        high1, low1 = tl.umulhi(x2, MULTIPLIER_1), tl.mul(x2, MULTIPLIER_1, sanitize_overflow=False)
        x0 = high1 ^ x1 ^ k0
        x1 = low1
        x2 = high0 ^ x3 ^ k1
        x3 = low0
        k0 = tl.add(k0, WEYL_0, sanitize_overflow=False)
        k1 = tl.add(k1, WEYL_1, sanitize_overflow=False)
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
    return (bits.to(tl.float32) + 0.5) * UNIT


@triton.jit
def log_of(u):
    """log(u) for normal u > 0; exactly 0 at 1."""
    bits = u.to(tl.int32, bitcast=True)
    above = bits - 0x3F3504F3
    f = (bits - (above & -0x800000)).to(tl.float32, bitcast=True) - 1.0
    e = (above >> 23).to(tl.float32)
    p = f * LOG_7 + LOG_6
    p = p * f + LOG_5
    p = p * f + LOG_4
    p = p * f + LOG_3
    p = p * f + LOG_2
    p = p * f + LOG_1
    p = p * f + LOG_0
    f2 = f * f
    tail = (f2 * (f * p) + e * LN2_LOW) - f2 * 0.5
    return (f + tail) + e * LN2_HIGH


@triton.jit
def cos_sin_turns(u):
    """(cos 2 pi u, sin 2 pi u) for u in [0, 1]."""
    turns = u * 4.0
    shifted = turns + ROUNDER
    quadrant = shifted.to(tl.int32, bitcast=True)
    r = turns - (shifted - ROUNDER)
    t = r * r
    s = t * SINE_3 + SINE_2
    s = s * t + SINE_1
    s = s * t + SINE_0
    s = s * r
    c = t * COSINE_4 + COSINE_3
    c = c * t + COSINE_2
    c = c * t + COSINE_1
    c = c * t + 1.0
    odd = (quadrant & 1) != 0
    cosine = tl.where(odd, s, c).to(tl.int32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)
    sine = tl.where(odd, c, s).to(tl.int32, bitcast=True) ^ ((quadrant & 2) << 30)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(first, second):
    """Two normal numbers: radius from the first word, angle from the second; cosine, then sine."""
    radius = tl.sqrt_rn(log_of(uniform_from_bits(first)) * -2.0)
    cosine, sine = cos_sin_turns(uniform_from_bits(second))
    return radius * cosine, radius * sine
