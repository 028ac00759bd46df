// The polynomials of core/normal.h against the C library in double precision, over a range of float32 bit patterns.
#pragma once

#include <math.h>

#include <functional>
#include <limits>
#include <vector>

#include "../core/platform.h"

namespace bicm {
namespace emulator {

using Evaluate = std::function<void(const float* u, float* first, float* second, int64_t count)>;

// A function's place among the two results of Evaluate, and its value.
struct Reference {
  int output;
  double (*value)(double u);
};

// cos and sin of 2 pi u: 4u - rint(4u) is exact, so that zeros keep their relative accuracy.
template <int Shift>
double turn(double u) {
  const double whole = rint(4.0 * u);
  const double angle = (4.0 * u - whole) * 1.5707963267948966;
  switch ((static_cast<int>(whole) + Shift) & 3) {
    case 0: return cos(angle);
    case 1: return -sin(angle);
    case 2: return -cos(angle);
    default: return sin(angle);
  }
}
inline double cosine_of_turns(double u) { return turn<0>(u); }
inline double sine_of_turns(double u) { return turn<3>(u); }

struct Worst {
  double ulps;
  float at;
};

// The distance in units of the last place that float32 has at the exact value.
inline double ulps_between(float got, double exact) {
  if (exact == 0.0) return got == 0.0f ? 0.0 : std::numeric_limits<double>::infinity();
  const int64_t exponent = static_cast<int64_t>(bit_cast<uint64_t>(exact) >> 52 & 0x7FF) - 1023;
  const int64_t places = 23 - (exponent < -126 ? -126 : exponent);
  return fabs(got - exact) * bit_cast<double>(static_cast<uint64_t>(places + 1023) << 52);
}

constexpr int64_t kSweep = 4096;

// Calls visit(u, first results, second results, count) over every `stride`-th bit pattern in [low, high].
template <class Visit>
void sweep(const Evaluate& evaluate, uint32_t low, uint32_t high, uint32_t stride, Visit visit) {
  std::vector<float> u(kSweep), first(kSweep), second(kSweep);
  for (uint64_t bits = low; bits <= high;) {
    int64_t count = 0;
    for (; count < kSweep && bits <= high; bits += stride) u[count++] = bit_cast<float>(static_cast<uint32_t>(bits));
    evaluate(u.data(), first.data(), second.data(), count);
    visit(u.data(), first.data(), second.data(), count);
  }
}

inline Worst worst_error(const Evaluate& evaluate, Reference reference, uint32_t low, uint32_t high, uint32_t stride) {
  Worst worst = {0.0, 0.0f};
  sweep(evaluate, low, high, stride, [&](const float* u, const float* first, const float* second, int64_t count) {
    const float* got = reference.output == 0 ? first : second;
    for (int64_t i = 0; i < count; ++i) {
      const double ulps = ulps_between(got[i], reference.value(u[i]));
      if (!(ulps <= worst.ulps)) worst = {ulps, u[i]};
    }
  });
  return worst;
}

// How many of a range's results differ in a bit.
inline int64_t differences(const Evaluate& a, const Evaluate& b, uint32_t low, uint32_t high, uint32_t stride) {
  std::vector<float> first_b(kSweep), second_b(kSweep);
  int64_t count_different = 0;
  sweep(a, low, high, stride, [&](const float* u, const float* first, const float* second, int64_t count) {
    b(u, first_b.data(), second_b.data(), count);
    for (int64_t i = 0; i < count; ++i) {
      count_different += bit_cast<uint32_t>(first[i]) != bit_cast<uint32_t>(first_b[i]) ||
                         bit_cast<uint32_t>(second[i]) != bit_cast<uint32_t>(second_b[i]);
    }
  });
  return count_different;
}

}  // namespace emulator
}  // namespace bicm
