// Pseudo-Huber distances of a residual r: per sample sqrt(|r|^2 + c^2) - c, or the mean of the same over elements; or
// its square |r|^2.
//
// The residual is formed in the compute type; sums over a sample and per-sample values are float64.
#pragma once

#include "hypotenuse.h"
#include "keys.h"

namespace bicm {

enum class Distance : int32_t { vector, elementwise, squared };
enum class Reduction : int32_t { mean, sum, none };
enum class Parameterization : int32_t { bcm, cm, edm };

constexpr int kLossInputs = 3;

struct PseudoHuber {
  Layout layout;
  bool float64;  // the compute type; float32 otherwise

  // r = prediction - target; where the loss denoises, the prediction is c_skip x + c_out F and is never stored.
  bool denoises;
  Operand prediction, target, x;  // `prediction` is F where the loss denoises
  Parameterization parameterization;
  bool scaled;  // x is c_in(t) x
  Number t, u, sigma_data, sigma_min;

  Distance distance;
  Reduction reduction;
  bool given_c;
  Number c, weight;

  // The terms of a sample's sum are weighted one by one: w r^2, or w times an elementwise distance. They are float64
  // then, and neither recomputed nor kept in other units.
  bool weighs;
  Operand element_weight;

  // The forward pass: one sum per chunk of a sample. The backward pass reads them, added up per sample.
  double* sums;

  Number upstream;           // the gradient of the loss, one number or one per sample
  bool wanted[kLossInputs];  // of prediction, target, x
  Operand gradient[kLossInputs];
};

// A gradient that was formed for an upstream of 1, to be multiplied by the actual upstream.
struct KeptGradient {
  Layout layout;
  Operand gradient;
  Number upstream;
};

}  // namespace bicm

BICM_NAMESPACE_BEGIN

// sqrt(s + c^2) - c without cancellation where s << c^2; 0 at s = c = 0.
template <class C>
BICM_HD C pseudo_huber_distance(C s, C c) {
  return s / nonzero(root(s + c * c) + c);
}

// Whether a sample's sum is of squares; otherwise of elementwise distances.
BICM_HD bool sums_squares(const PseudoHuber& p) { return p.distance != Distance::elementwise; }

// Whether gradients depend on the sum of their sample.
BICM_HD bool gradient_needs_sum(const PseudoHuber& p) { return p.distance == Distance::vector; }

BICM_HD double transition_of(const PseudoHuber& p, int64_t sample) {
  return p.given_c ? load_number<double>(p.c, sample) : 0.00054 * root(static_cast<double>(p.layout.elements));
}

// --- sums outside float64's range, where it is the compute type ---

// A sum of squares outside these bounds is kept as minus the norm: in units of kLargeUnit, where it is at least 1, or
// of kSmallUnit, where it is less. An elementwise sum above kMostSum is kept as minus the sum, in units of kLargeUnit.
constexpr double kMostSum = 0x1p1000, kLeastSum = 0x1p-960;
constexpr double kLargeUnit = 0x1p500, kSmallUnit = 0x1p-430;

struct Norm {
  double value, unit, inverse;  // the inverse of the unit
};

BICM_HD Norm norm_of(double sum) {
  if (sum <= -1.0) return {-sum, kLargeUnit, 1.0 / kLargeUnit};
  if (sum < 0.0) return {-sum, kSmallUnit, 1.0 / kSmallUnit};
  return {root(sum), 1.0, 1.0};
}

BICM_HD double keep_norm(double value, double unit) {
  const double norm = value * unit;
  const bool beyond = unit == kLargeUnit ? value >= 1.0 : value > 0.0 && norm * norm < kLeastSum;
  return beyond && value <= Range<double>::largest ? -value : norm * norm;
}

BICM_HD double keep_distances(double value, double unit) {
  const double sum = value * unit;
  return sum <= kMostSum || !(value <= Range<double>::largest) ? sum : -(value * (unit * (1.0 / kLargeUnit)));
}

// The sum of two parts of a sample, in order.
template <class C>
BICM_HD double add_sums(const PseudoHuber& p, double a, double b) {
  const double sum = a + b;
  if (sizeof(C) < sizeof(double) || (a >= 0.0 && b >= 0.0 && sum <= kMostSum)) return sum;
  if (!(absolute(sum) <= Range<double>::largest)) return sum;
  if (!sums_squares(p)) {
    const double inverse = 1.0 / kLargeUnit;
    return keep_distances((a < 0.0 ? -a : a * inverse) + (b < 0.0 ? -b : b * inverse), kLargeUnit);
  }
  const bool large = a <= -1.0 || b <= -1.0 || sum > kMostSum;
  const double unit = large ? kLargeUnit : kSmallUnit, inverse = large ? 1.0 / kLargeUnit : 1.0 / kSmallUnit;
  const Norm x = norm_of(a), y = norm_of(b);
  return keep_norm(hypotenuse(x.value * (x.unit * inverse), y.value * (y.unit * inverse)), unit);
}

// --- a sample's distance and slope, from its sum ---

// Whether the plain formulas suffice. Squares of float32 are far from the bounds of float64.
template <class C>
BICM_HD bool squares_add(double sum, double c) {
  return sizeof(C) < sizeof(double) || (sum >= 0.0 && sum <= kMostSum && c <= kLargeUnit);
}

template <class C>
BICM_HD double distance_of(const PseudoHuber& p, int64_t sample, double sum) {
  if (p.distance == Distance::elementwise) {
    const double elements = static_cast<double>(p.layout.elements);
    return sizeof(C) < sizeof(double) || sum >= 0.0 ? sum / elements : (-sum / elements) * kLargeUnit;
  }
  if (p.distance == Distance::squared) {
    if (sizeof(C) < sizeof(double) || !(sum < 0.0)) return sum;
    const Norm norm = norm_of(sum);
    return (norm.value * norm.unit) * (norm.value * norm.unit);
  }
  const double c = transition_of(p, sample);
  if (sum > Range<double>::largest && c <= Range<double>::largest) return sum;
  if (squares_add<C>(sum, c)) return pseudo_huber_distance(sum, c);
  const Norm norm = norm_of(sum);
  const double n = 0.5 * norm.value, y = 0.5 * (c * norm.inverse);
  return n / (hypotenuse(n, y) + y) * norm.value * norm.unit;
}

// Scale applied to values before summing: the mean of float64 values may be finite where their sum overflows.
constexpr double kForMeans = 0x1p-64;
BICM_HD bool overflows(double total) { return !(absolute(total) <= Range<double>::largest); }

// The derivative of the reduced loss with respect to the residual is factor times (power r), or, elementwise, factor
// times r / sqrt(r^2 + c^2). The factor includes the upstream gradient, so a scaled loss loses no digits in float16.
struct Slope {
  double factor, power;
};

// Whether a factor of float32 would lose digits or overflow.
BICM_HD bool outside_float(double x) {
  const uint32_t exponent = static_cast<uint32_t>(bit_cast<uint64_t>(x) >> 52) & 0x7FFu;
  return exponent != 0 && exponent - (1023u - 126u) > 252u;
}

// The power of two below a number, limited to those that float32 can represent with their reciprocal.
BICM_HD int exponent_for_float(double x) {
  const int exponent = static_cast<int>(bit_cast<uint64_t>(x) >> 52 & 0x7FFu) - 1023;
  return exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
}
BICM_HD double float_power(int exponent) { return bit_cast<double>(static_cast<uint64_t>(1023 + exponent) << 52); }

template <class C>
BICM_HD Slope slope_of(const PseudoHuber& p, int64_t sample, double sum, const Preconditioning<C>& weights) {
  double factor = load_number<double>(p.upstream, sample) * load_number<double>(p.weight, sample);
  if (p.reduction == Reduction::mean) factor = factor / static_cast<double>(p.layout.batch);
  if (p.distance == Distance::elementwise) return {factor / static_cast<double>(p.layout.elements), 1.0};
  double power = 1.0;
  if (p.distance == Distance::squared) {
    factor = 2.0 * factor;
  } else if (const double c = transition_of(p, sample); squares_add<C>(sum, c)) {
    factor = factor / nonzero(root(sum + c * c));
  } else {
    const Norm norm = norm_of(sum);
    factor = factor / nonzero(hypotenuse(norm.value, c * norm.inverse));
    power = norm.inverse;
  }
  if (sizeof(C) == sizeof(double)) return {factor, power};
  const bool lost =
      outside_float(factor) || (p.denoises && (outside_float(factor * static_cast<double>(weights.c_out)) ||
                                               outside_float(factor * static_cast<double>(weights.c_skip))));
  if (!lost) return {factor, 1.0};
  const int exponent = exponent_for_float(factor);
  return {factor * float_power(-exponent), float_power(exponent)};
}

// --- weights of elements ---

template <class C>
BICM_HD double weighed_term(const PseudoHuber& p, C r, C c, C weight) {
  const double wide = static_cast<double>(r);
  const double term = sums_squares(p) ? wide * wide : static_cast<double>(distance_anywhere(r, c, C(1)));
  return static_cast<double>(weight) * term;
}

// Negative weights may give a negative sum: it has no norm, and a negative kept sum has another meaning.
BICM_HD double weighed_sum(double sum) { return sum < 0.0 ? __builtin_nan("") : sum; }

// The gradient from the sample's factor.
template <class C>
BICM_HD C weighed_slope(const PseudoHuber& p, C r, C c, C power, C weight) {
  return (sums_squares(p) ? r * power : slope_anywhere(r, c)) * weight;
}

// --- which sums to recompute ---

template <class C>
struct SumRange;
template <>
struct SumRange<float> {
  static constexpr double least_square = 0x1p-100, most_square = 0x1p128;
  static constexpr double least = 0x1p-60, least_steep = 0x1p-20, most = 0x1p60;
};
template <>
struct SumRange<double> {
  static constexpr double least_square = kLeastSum, most_square = kMostSum;
  static constexpr double least = 0x1p-520, least_steep = 0x1p-430, most = 0x1p500;
};

// Below this, underflow may affect the leading digits of a partial sum.
template <class C>
BICM_HD double least_sum(const PseudoHuber& p, C c) {
  using S = SumRange<C>;
  if (sums_squares(p)) return S::least_square;
  return c < Range<C>::faint ? S::least_steep : S::least;
}

// Whether no term of this sum can have overflowed, and underflow is negligible.
template <class C>
BICM_HD bool trusted(const PseudoHuber& p, double sum, C c) {
  if (sums_squares(p)) return sum >= least_sum(p, c) && sum <= SumRange<C>::most_square;
  return sum >= least_sum(p, c) && sum <= SumRange<C>::most && c <= Range<C>::common;
}

// Elementwise, whether the plain formula is accurate for every slope.
template <class C>
BICM_HD bool plain_slopes(double sum, C c) {
  return sum >= 0.0 && sum <= SumRange<C>::most && c >= Range<C>::faint && c <= Range<C>::common;
}

// The scale of residuals, or elementwise distances, where a sum is recomputed. Distances at a large c can have any
// size where the plain formula gives 0.
constexpr double kLittle = 0x1p20;
template <class C>
BICM_HD C scale_of(const PseudoHuber& p, double sum, C c) {
  const bool grows = sum < least_sum(p, c);
  if (sums_squares(p)) return grows ? Range<C>::grow : C(1) / Range<C>::grow;
  if (!grows) return static_cast<C>(1.0 / kLittle);
  return c <= Range<C>::common ? Range<C>::grow : static_cast<C>(kLittle);
}

// A partial sum, from one that was computed with a scale.
template <class C>
BICM_HD double keep_sum(const PseudoHuber& p, double sum, C scale) {
  constexpr double grown = Range<C>::grow, inverse = 1.0 / grown;
  const bool grows = scale > C(1), squares = sums_squares(p);
  const bool little = grows ? scale == static_cast<C>(kLittle) : scale == static_cast<C>(1.0 / kLittle);
  const double unit = grows ? (little ? 1.0 / kLittle : inverse) : (little ? kLittle : grown);
  if (sizeof(C) < sizeof(double)) return squares ? sum * unit * unit : sum * unit;
  if (!squares) return keep_distances(sum, unit);
  return grows ? keep_norm(root(sum) * (inverse / kSmallUnit), kSmallUnit)
               : keep_norm(root(sum) * (grown / kLargeUnit), kLargeUnit);
}

template <class C>
BICM_HD Preconditioning<C> denoising_weights(const PseudoHuber& p, int64_t sample) {
  if (!p.denoises) return {C(0), C(1)};
  const C t = load_number<C>(p.t, sample), sigma_data = load_number<C>(p.sigma_data, sample);
  switch (p.parameterization) {
    case Parameterization::bcm: return bcm(t, load_number<C>(p.u, sample), sigma_data, p.scaled);
    case Parameterization::cm: return cm(t, load_number<C>(p.sigma_min, sample), sigma_data, p.scaled);
    default: return bcm(t, C(0), sigma_data, p.scaled);
  }
}

BICM_NAMESPACE_END
