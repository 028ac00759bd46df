// From random bits to uniform and normal numbers, generic over a lane type F (float, or a vector of floats); LaneOps
// of that type implements the few operations that operators cannot express. No operation may be contracted or
// reordered: every backend performs exactly these float32 operations, so that noise is the same bits everywhere.
#pragma once

#include "philox.h"

BICM_NAMESPACE_BEGIN

template <class F>
struct LaneOps;
template <>
struct LaneOps<float> {
  using Int = int32_t;
  using Word = uint32_t;
  BICM_HD static float to_float(uint32_t x) { return static_cast<float>(x); }
  BICM_HD static float to_float(int32_t x) { return static_cast<float>(x); }
  // a b + c, where a b is exact: rounded once or twice, it is the same number.
  BICM_HD static float add_exact(float a, float b, float c) { return a * b + c; }
  BICM_HD static float where_odd(uint32_t bits, float yes, float no) { return bits & 1u ? yes : no; }
  // Where the top bit of `bits` is set.
  BICM_HD static float flip_sign(float x, uint32_t bits) {
    return bit_cast<float>(bit_cast<uint32_t>(x) ^ (bits & 0x80000000u));
  }
#if defined(__CUDA_ARCH__)
  BICM_HD static float square_root(float x) { return __fsqrt_rn(x); }
#else
  BICM_HD static float square_root(float x) { return __builtin_sqrtf(x); }
#endif
};

// 2^32 u, for u in (0, 1], i.e. u from 2^-33 to exactly 1. A power of two rounds nothing, so code that scales u
// afterwards may omit it here.
template <class F>
BICM_HD F scaled_uniform_from_bits(typename LaneOps<F>::Word bits) {
  return LaneOps<F>::to_float(bits) + 0.5f;
}
// 4 u, in quarter turns, of the same bits.
template <class F>
BICM_HD F quarters_from_bits(typename LaneOps<F>::Word bits) {
  return LaneOps<F>::add_exact(LaneOps<F>::to_float(bits), 0x1p-30f, 0x1p-31f);
}
template <class F>
BICM_HD F uniform_from_bits(typename LaneOps<F>::Word bits) {
  return scaled_uniform_from_bits<F>(bits) * 0x1p-32f;
}

// -2 log(u) for normal u > 0, given 2^Scale u: u = 2^e m with m in [sqrt(1/2), sqrt(2)), f = m - 1, log m = f - f^2/2 +
// f^3 P(f) with P minimax for the relative error of log m. The factor is in the coefficients and adds no rounding.
// Exactly 0 at 1. The halves of P are short dependency chains that a processor computes in parallel.
template <int Scale, class F>
BICM_HD F minus_two_log(F scaled) {
  using I = typename LaneOps<F>::Int;
  const I above = bit_cast<I>(scaled) - (0x3F3504F3 + Scale * 0x800000);
  const F f = bit_cast<F>((above & 0x7FFFFF) + 0x3F3504F3) - 1.0f;
  const F e = LaneOps<F>::to_float(above >> 23);
  const F f2 = f * f;
  const F high = (f * 0x1.38c9dep-3f + -0x1.055ec6p-2f) * f2 + (f * 0x1.0d8242p-2f + -0x1.22d92ep-2f);
  const F low = (f * 0x1.54728ap-2f + -0x1.99a01cp-2f) * f2 + (f * 0x1.000226p-1f + -0x1.555554p-1f);
  const F p = high * (f2 * f2) + low;
  // 2 ln 2 in two parts: the first has few enough bits that its product with e is exact.
  const F tail = (f2 * (f * p) + e * 0x1.bd0106p-12f) + f2;
  return LaneOps<F>::add_exact(e, -0x1.63p+0f, LaneOps<F>::add_exact(f, -2.0f, tail));
}

// (cos, sin) of a number of quarter turns in [0, 4]: it is q + r with q whole and |r| <= 1/2, both exact; minimax
// polynomials of sin(pi/2 r)/r and (cos(pi/2 r) - 1)/r^2 in r^2, then the quadrant.
template <class F>
BICM_HD void cos_sin_quarters(F quarters, F& cosine, F& sine) {
  using W = typename LaneOps<F>::Word;
  const F shifted = quarters + 0x1.8p23f;
  const W quadrant = bit_cast<W>(shifted);
  const F r = quarters - (shifted - 0x1.8p23f);
  const F t = r * r;
  F s = t * -0x1.33183ap-8f + 0x1.4680a0p-4f;
  s = s * t + -0x1.4abc24p-1f;
  s = s * t + 0x1.921fb6p+0f;
  s = s * r;
  F c = t * 0x1.d4f7eep-11f + -0x1.55b2b6p-6f;
  c = c * t + 0x1.03c1b0p-2f;
  c = c * t + -0x1.3bd3ccp+0f;
  c = c * t + 1.0f;
  // The quadrant's second bit, as a sign.
  cosine = LaneOps<F>::flip_sign(LaneOps<F>::where_odd(quadrant, s, c), (quadrant + 1u) << 30);
  sine = LaneOps<F>::flip_sign(LaneOps<F>::where_odd(quadrant, c, s), quadrant << 30);
}

// Box-Muller on lanes (0, 1) and (2, 3): radius from the first, angle from the second; cosine, then sine.
template <class F>
BICM_HD void normals_from_bits(const Quad<typename LaneOps<F>::Word>& bits, F normal[4]) {
  BICM_UNROLL(2)
  for (int pair = 0; pair < 4; pair += 2) {
    const F radius = LaneOps<F>::square_root(minus_two_log<32>(scaled_uniform_from_bits<F>(bits.lane[pair])));
    F cosine, sine;
    cos_sin_quarters(quarters_from_bits<F>(bits.lane[pair + 1]), cosine, sine);
    normal[pair] = radius * cosine;
    normal[pair + 1] = radius * sine;
  }
}

BICM_NAMESPACE_END
