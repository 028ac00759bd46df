// Bit-exact reversible updates: integer states on a fixed-point grid. An increment is formed in float64 and rounded
// once; one direction adds it, the other subtracts it. A rational factor keeps the remainders of its division in a
// buffer.
//
// kMissing represents NaN: an element that leaves the range becomes it and stays it.
#pragma once

#include "keys.h"

namespace bicm {

constexpr int64_t kMaxRatio = int64_t{1} << 20;
constexpr int64_t kLargest = 0x7FFFFFFFFFFFFFFF;
constexpr int64_t kMissing = -kLargest - 1;

// How coefficients become the increment's weights. affine: they are the weights. bdia: (a, b, a_last, b_last) and n/m.
enum class Increment : int32_t { affine, bdia };

struct Reversible {
  Layout layout;

  bool steps;  // a state is given: else the increment is the result, the encoding of the only input
  bool inverse;
  Operand last;

  int32_t terms;
  Operand input[kMaxTerms];
  Increment increment;
  Number coefficient[kMaxTerms];
  int32_t fraction_bits;
  bool guided;  // the last input is the unconditional prediction, `conditional` its partner
  Operand conditional;
  Number guidance_scale;

  bool multiplies;  // by n/m, where `info` keeps the remainders
  Integer n, m;
  Operand info;

  Operand out, info_out;
  int64_t* overflow;  // one per sample, or null
  int64_t overflow_stride;
  Integer mark;
};

struct FixedPointDecode {
  Layout layout;
  Operand q, out;
  int32_t fraction_bits;
};

}  // namespace bicm

BICM_NAMESPACE_BEGIN

// 2^exponent for small exponents.
BICM_HD double power_of_two(int exponent) { return bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52); }

// Rounded to nearest even. Without an instruction for it, both halves are converted exactly through their bits; the
// sum is the only rounding.
BICM_HD double to_double(int64_t x) {
#if defined(__CUDA_ARCH__) || defined(BICM_ISA_AVX512) || defined(__aarch64__)
  return static_cast<double>(x);
#else
  const uint64_t bits = static_cast<uint64_t>(x);
  const double high = bit_cast<double>((bits >> 32) ^ 0x4530000080000000u);         // 2^84 + 2^63 + 2^32 (x >> 32)
  const double low = bit_cast<double>((bits & 0xFFFFFFFFu) | 0x4330000000000000u);  // 2^52 + the low half
  return (high - 0x1.00000801p84) + low;
#endif
}

// rint(x) for |x| < 2^63. Adding 1.5 2^52 rounds to an integer and leaves it in the low bits: once for the multiple of
// 2^32 nearest to x, once for the rest, which is exact.
BICM_HD int64_t to_integer(double x) {
#if defined(__CUDA_ARCH__)
  return __double2ll_rn(x);
#else
  constexpr double magic = 0x1.8p52;
  const double upper = x * 0x1p-32 + magic;
  const double rest = x - (upper - magic) * 0x1p32;
  const uint64_t low = bit_cast<uint64_t>(rest + magic) - bit_cast<uint64_t>(magic);
  return static_cast<int64_t>((bit_cast<uint64_t>(upper) << 32) + low);
#endif
}

BICM_HD int64_t largest_of(DType dtype) { return dtype == DType::int32 ? 0x7FFFFFFF : kLargest; }

// Masks, all ones where the condition holds, because compilers do not vectorise every branch; scalar code is faster
// too.
BICM_HD int64_t mask_of(bool condition) { return -static_cast<int64_t>(condition); }
BICM_HD int64_t choose(int64_t mask, int64_t yes, int64_t no) {
#if defined(BICM_ISA_AVX2) || defined(BICM_ISA_AVX512) || defined(BICM_ISA_NEON)
  return (yes & mask) | (no & ~mask);
#else
  return mask != 0 ? yes : no;
#endif
}

// The number that an element represents: NaN, with all bits set, where it is missing.
BICM_HD double decode(int64_t q, int64_t largest, double unit) {
  return bit_cast<double>(bit_cast<int64_t>(to_double(q) * unit) | mask_of(q == -largest - 1));
}

BICM_HD int64_t encode(double x) {
  const int64_t inside = mask_of((x < 0x1p63) & (x > -0x1p63));
  return choose(inside, to_integer(bit_cast<double>(bit_cast<int64_t>(x) & inside)), kMissing);
}

BICM_HD int64_t within(int64_t x, int64_t largest) {
  return choose(mask_of((x <= largest) & (x >= -largest)), x, kMissing);
}

BICM_HD int64_t negate(int64_t x) { return static_cast<int64_t>(0 - static_cast<uint64_t>(x)); }

// x + y where neither is missing and the sum is within [-largest, largest].
BICM_HD int64_t plus(int64_t x, int64_t y, int64_t largest) {
  const int64_t sum = static_cast<int64_t>(static_cast<uint64_t>(x) + static_cast<uint64_t>(y));
  const int64_t wrapped = ((x ^ sum) & (y ^ sum)) >> 63;
  const int64_t missing = wrapped | mask_of(x == kMissing) | mask_of(y == kMissing);
  return choose(missing, kMissing, within(sum, largest));
}

// A number in [1, 2^20] that integers are divided by and multiplied with.
struct Factor {
  int64_t value;
  uint64_t reciprocal;  // floor((2^64 - 1) / value)
  // kLargest = high value + high_rest; -kLargest = low value + low_rest.
  int64_t high, high_rest, low, low_rest;
};

// One division: floor((2^63 - 1) / value) is half of the reciprocal, rounded down.
BICM_HD Factor make_factor(int64_t value) {
  const uint64_t reciprocal = ~uint64_t{0} / static_cast<uint64_t>(value);
  const int64_t high = static_cast<int64_t>(reciprocal >> 1), high_rest = kLargest - high * value;
  const bool exact = high_rest == 0;
  return {value, reciprocal, high, high_rest, exact ? -high : -high - 1, exact ? 0 : value - high_rest};
}

BICM_HD uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#elif defined(BICM_ISA_AVX2) || defined(BICM_ISA_AVX512)
  // Halves, because vectors multiply 32 bits by 32.
  const uint64_t a_high = a >> 32, a_low = a & 0xFFFFFFFFu, b_high = b >> 32, b_low = b & 0xFFFFFFFFu;
  const uint64_t first = a_high * b_low + (a_low * b_low >> 32);
  const uint64_t second = a_low * b_high + (first & 0xFFFFFFFFu);
  return a_high * b_high + (first >> 32) + (second >> 32);
#else
  __extension__ typedef unsigned __int128 Wide;
  return static_cast<uint64_t>(static_cast<Wide>(a) * b >> 64);
#endif
}

struct Division {
  int64_t quotient, remainder;
};

// Towards minus infinity: floor(x/d) = ~floor(~x/d) for negative x. With r = floor((2^64 - 1)/d), a r/2^64 falls short
// of a/d by at most a/2^64 < 1/2 for a < 2^63, so its floor is the quotient or one less.
BICM_HD Division floor_divide(int64_t x, const Factor& by) {
  const uint64_t sign = static_cast<uint64_t>(x >> 63), d = static_cast<uint64_t>(by.value);
  const uint64_t size = static_cast<uint64_t>(x) ^ sign;
  uint64_t quotient = multiply_high(size, by.reciprocal);
  uint64_t remainder = size - quotient * d;
  const uint64_t more = static_cast<uint64_t>(mask_of(remainder >= d));
  quotient -= more;
  remainder -= d & more;
  // For negative x the remainder is d - 1 - r = d + ~r.
  return {static_cast<int64_t>(quotient ^ sign), static_cast<int64_t>((remainder ^ sign) + (d & sign))};
}

// x by + rest, 0 <= rest < by, and a mask of whether it is within [-kLargest, kLargest], decided before the product.
BICM_HD int64_t multiply_add(int64_t x, const Factor& by, int64_t rest, int64_t& fits) {
  const int64_t high = by.high + mask_of(rest > by.high_rest), low = by.low - mask_of(rest < by.low_rest);
  fits = mask_of((x <= high) & (x >= low));
  return static_cast<int64_t>(static_cast<uint64_t>(x) * static_cast<uint64_t>(by.value) + static_cast<uint64_t>(rest));
}

// q to/from, and the buffer's next value, which the same function with the factors exchanged undoes
// (Maclaurin, Duvenaud & Adams 2015).
BICM_HD int64_t scale(int64_t q, const Factor& from, const Factor& to, int64_t& buffer) {
  const Division state = floor_divide(q, from);
  int64_t fits, also_fits;
  const Division kept = floor_divide(multiply_add(buffer, from, state.remainder, fits), to);
  const int64_t scaled = multiply_add(state.quotient, to, kept.remainder, also_fits);
  buffer = kept.quotient;
  return choose(fits & also_fits & mask_of(q != kMissing), scaled, kMissing);
}

// Values shared by the elements of a sample.
struct Exact {
  double weight[kMaxTerms], guidance_scale;
  double unit, per_unit;  // 2^-fraction_bits and its inverse
  int64_t largest;
  Factor from, to;
  bool multiplies;
};

BICM_HD Exact exact_of(const Reversible& p, int64_t sample) {
  Exact e = {};
  e.unit = power_of_two(-p.fraction_bits);
  e.per_unit = power_of_two(p.fraction_bits);
  e.largest = largest_of(p.out.dtype);
  int64_t n = 1, m = 1;
  if (p.multiplies) {
    n = load_integer(p.n, sample);
    m = load_integer(p.m, sample);
  }
  if (p.guided) e.guidance_scale = load_number<double>(p.guidance_scale, sample);
  double raw[kMaxTerms] = {};
  BICM_UNROLL(8)
  for (int k = 0; k < kMaxTerms; ++k) {
    if (k < p.terms || (p.increment == Increment::bdia && k < 4))
      raw[k] = load_number<double>(p.coefficient[k], sample);
  }
  if (p.increment == Increment::bdia) {  // BDIA eq. 24 without its first term
    const double gamma = static_cast<double>(n) / static_cast<double>(m);
    e.weight[0] = raw[0] - gamma / raw[2];
    e.weight[1] = raw[1] + gamma * (raw[3] / raw[2]);
  } else {
    BICM_UNROLL(8)
    for (int k = 0; k < kMaxTerms; ++k) e.weight[k] = raw[k];
  }
  const bool valid = n >= 1 && n <= kMaxRatio && m >= 1 && m <= kMaxRatio;
  if (!valid) {  // the result is missing
    BICM_UNROLL(8)
    for (int k = 0; k < kMaxTerms; ++k) e.weight[k] = bit_cast<double>(uint64_t{0x7FF8000000000000});
  }
  e.multiplies = valid && n != m;
  if (e.multiplies) {
    e.from = make_factor(p.inverse ? n : m);
    e.to = make_factor(p.inverse ? m : n);
  }
  return e;
}

// An element's step without a factor; with `Inverse` the increment is subtracted.
template <bool Inverse>
BICM_HD int64_t step_by(int64_t last, int64_t increment, int64_t largest) {
  return plus(last, Inverse ? negate(increment) : increment, largest);
}

// With a factor: mul(last) + increment, or div(last - increment). The buffer is kept where the result is missing.
template <bool Inverse>
BICM_HD int64_t scaled_step_by(int64_t last, int64_t increment, const Factor& from, const Factor& to, int64_t& buffer) {
  int64_t next = buffer, result;
  if (Inverse) {
    result = scale(plus(last, negate(increment), kLargest), from, to, next);
  } else {
    result = plus(scale(last, from, to, next), increment, kLargest);
  }
  buffer = choose(mask_of(result == kMissing), buffer, next);
  return result;
}

BICM_NAMESPACE_END
