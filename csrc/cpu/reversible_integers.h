// The exact step for parts whose integers are all small: the same results with fewer instructions.
//
// Below 2^51 float64 holds an integer, and a sum with 1.5 2^52 converts it; below 2^49 a product with the reciprocal
// gives a quotient's floor. The general code multiplies 64 bits by 64.
#pragma once

#include "../core/reversible.h"

BICM_NAMESPACE_BEGIN

constexpr int64_t kSmall = int64_t{1} << 51;
constexpr double kAnchor = 0x1.8p52;

BICM_HD double small_to_double(int64_t x) { return bit_cast<double>(x + bit_cast<int64_t>(kAnchor)) - kAnchor; }
// The result is arbitrary where |x| is 2^51 or more.
BICM_HD int64_t small_to_integer(double x) {
  return static_cast<int64_t>(bit_cast<uint64_t>(x + kAnchor) - bit_cast<uint64_t>(kAnchor));
}

// |x| of an integer, minus one where it is negative: enough to compare with a power of two.
BICM_HD int64_t size_of_integer(int64_t x) { return x ^ (x >> 63); }

// The largest power of two up to x >= 1.
inline int64_t power_below(double x) { return int64_t{1} << ((bit_cast<int64_t>(x) >> 52) - 1023); }

// floor(x/d) for |x| < 2^49: (x + 1/2)/d - 1/2 to the nearest integer. It is at least 1/(2d) away from where the
// rounding changes; the errors of the reciprocal, the product and the sum are smaller.
struct SmallDivision {
  double value, reciprocal, shift;
  // The quotient on top of kAnchor.
  BICM_HD double anchored(double x) const { return (x * reciprocal + shift) + kAnchor; }
};

inline SmallDivision small_division(int64_t by) {
  const double value = static_cast<double>(by), reciprocal = 1.0 / value;
  return {value, reciprocal, 0.5 * reciprocal - 0.5};
}

// As `scaled_step_by`, for integers whose products cannot overflow; false for others.
template <bool Inverse>
bool small_scaled_step_all(const Exact& e, const int64_t* last, const int64_t* increment, const int64_t* info,
                           int64_t* out, int64_t* info_out, int64_t count) {
  const SmallDivision from = small_division(e.from.value), to = small_division(e.to.value);
  const double room = static_cast<double>(kSmall / 8), growth = to.value / from.value;
  const int64_t bound = power_below(growth > 1.0 ? room / growth : room), bound_info = power_below(room / from.value);
  int64_t large = 0;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    large |= size_of_integer(last[i]) & -bound;
    large |= size_of_integer(increment[i]) & -bound;
    large |= size_of_integer(info[i]) & -bound_info;
  }
  if (large != 0) return false;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const double q = small_to_double(Inverse ? last[i] - increment[i] : last[i]);
    const double quotient = from.anchored(q) - kAnchor;
    const double sum = small_to_double(info[i]) * from.value + (q - quotient * from.value);
    const double kept = to.anchored(sum);
    const double scaled = quotient * to.value + (sum - (kept - kAnchor) * to.value);
    info_out[i] = bit_cast<int64_t>(kept) - bit_cast<int64_t>(kAnchor);
    out[i] = Inverse ? small_to_integer(scaled) : small_to_integer(scaled) + increment[i];
  }
  return true;
}

// As `step_by`, where no sum can overflow 64 bits or be the missing value; false where one might.
template <bool Inverse>
bool small_step_all(const int64_t* last, const int64_t* increment, int64_t largest, int64_t* out, int64_t count) {
  if (largest != kLargest) return false;
  int64_t sizes = 0;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) sizes |= size_of_integer(last[i]) | size_of_integer(increment[i]);
  if (sizes >= int64_t{1} << 61) return false;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = Inverse ? last[i] - increment[i] : last[i] + increment[i];
  return true;
}

BICM_NAMESPACE_END
