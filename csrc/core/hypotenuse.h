// Where the squares of residuals or c would overflow or lose digits, both are multiplied by a power
// of two first, which is exact. Otherwise the power is 1, and the bits are those of the plain formulas.
#pragma once

#include "preconditioning.h"

BICM_NAMESPACE_BEGIN

// Safe divisor: 0/0 gives 0. Returns x, or a nonzero number for x = 0. Compilers make a
// branch of a division by 1 or 2, and a loop with a branch is not vectorised.
template <class C>
BICM_HD C nonzero(C x) {
  return x == C(0) ? C(3) : x;
}

BICM_HD float absolute(float x) { return __builtin_fabsf(x); }
BICM_HD double absolute(double x) { return __builtin_fabs(x); }

template <class C>
struct Range;
template <>
struct Range<float> {
  static constexpr float largest = 0x1.fffffep127f;
  static constexpr float least = 0x1p-63f, most = 0x1p63f;  // numbers whose squares, and sums of two, are normal
  static constexpr float faint = 0x1p-50f;                  // from here on c^2 absorbs what squares below least^2 lose
  static constexpr float common = 0x1p50f;  // up to here c^2 is negligible against a square near the largest
  static constexpr float grow = 0x1p96f, shrink = 0x1p-66f;
};
template <>
struct Range<double> {
  static constexpr double largest = 0x1.fffffffffffffp1023;
  static constexpr double least = 0x1p-511, most = 0x1p511;
  static constexpr double faint = 0x1p-480;
  static constexpr double common = 0x1p480;
  static constexpr double grow = 0x1p600, shrink = 0x1p-514;
};

// The power of two by which squares of a residual of this size and of c keep all digits of their sum.
template <class C>
BICM_HD C power_for(C size, C c) {
  using R = Range<C>;
  const C larger = size > c ? size : c;
  const C power = (size < R::least) & (larger < R::faint) ? R::grow : C(1);
  return larger > R::most ? R::shrink : power;
}

// r / sqrt(r^2 + c^2); 0 at r = c = 0, NaN for an infinite r.
template <class C>
BICM_HD C slope_anywhere(C r, C c) {
  const C power = power_for(absolute(r), c), x = r * power, y = c * power;
  return x / nonzero(root(x * x + y * y));
}

// The same at c = 0, and the bits of the plain formula, whose root of r^2 is |r| exactly.
template <class C>
BICM_HD C slope_without_c(C r) {
  return r / nonzero(absolute(r));
}

// sqrt(r^2 + c^2) - c times a power of two, infinite for an infinite r.
template <class C>
BICM_HD C distance_anywhere(C r, C c, C scale) {
  using R = Range<C>;
  const C size = absolute(r), finite = size > R::largest ? R::largest : size;
  const C power = power_for(size, c), x = finite * power, y = c * power;
  // The quotient of squares, with the plain formula's bits; or the quotient of the numbers, times the residual.
  const bool plain = power == C(1) && size >= R::least;
  const C quotient = (plain ? x * x : x) / nonzero(root(x * x + y * y) + y);
  return quotient * scale * (plain ? C(1) : size);
}

// sqrt(a^2 + b^2) of numbers from 0 on whose squares may overflow.
BICM_HD double hypotenuse(double a, double b) {
  const double larger = a > b ? a : b, ratio = (a > b ? b : a) / nonzero(larger);
  return larger * root(1.0 + ratio * ratio);
}

BICM_NAMESPACE_END
