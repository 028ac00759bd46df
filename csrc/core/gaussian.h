// Steps as Gaussian policies: next = m + s n with an affine mean m, and per sample the log-density of a state under
// such a step, or the divergence between two steps of one s.
//
// Both sum the squares of a residual over a sample; it is formed in the compute type: r = next - m, or r = m_ref - m.
// Sums and per-sample values are float64. How a sum is divided depends only on the sample's size, and
// elements are visited in their logical order, so that a step and the density of its result agree to the bit.
#pragma once

#include "multistep.h"
#include "pseudo_huber.h"

namespace bicm {

// Of a density: the next state, then the tensors of the mean and a partner; of a divergence: the reference's tensors,
// then the mean's.
constexpr int kGaussianInputs = 2 * kMaxTerms;

// The map is the mean. Its noise weight is the standard deviation s, and where it draws, `out` is the next state.
struct Gaussian : Multistep {
  bool steps;     // forms the next state; otherwise `next` is given
  bool diverges;  // a divergence from the step whose mean has the same weights of `reference`
  Operand next;
  Operand reference[kMaxTerms];

  bool adds_up;    // sum over a sample's elements; otherwise mean
  double* totals;  // one sum per chunk of a sample
  void* results;   // one number per sample, in the compute type

  bool differentiates;
  Number upstream;
  bool wanted[kGaussianInputs];
  Operand gradient[kGaussianInputs];
};

}  // namespace bicm

BICM_NAMESPACE_BEGIN

BICM_HD double natural_log(double x) {
#if defined(__CUDA_ARCH__)
  return ::log(x);
#else
  return __builtin_log(x);
#endif
}

constexpr double kHalfLogTwoPi = 0x1.d67f1c864beb5p-1;

// The noise's weight: the same number whether given as a float or a tensor.
template <class C>
BICM_HD double deviation_of(const Gaussian& g, int64_t sample) {
  return static_cast<double>(load_number<C>(g.noise_weight, sample));
}

// A step without noise has no density: its log-density and divergence are 0.
template <class C>
BICM_HD double density_of(const Gaussian& g, int64_t sample, double sum) {
  const double s = deviation_of<C>(g, sample), elements = static_cast<double>(g.layout.elements);
  if (s == 0.0) return 0.0;
  const double square = 2.0 * s * s, distance = (g.adds_up ? sum : sum / elements) / square;
  if (g.diverges) return distance;
  const double constant = natural_log(s) + kHalfLogTwoPi;
  return -distance - (g.adds_up ? elements * constant : constant);
}

// A gradient is factor times (power r).
template <class C>
struct Pull {
  C power, factor[kGaussianInputs];
};

// Writes the factors of a sample's gradients to `factor`, and returns the power.
template <class C, class Factors>
BICM_HD C form_pull(const Gaussian& g, int64_t sample, const C weight[kMaxTerms], Factors& factor) {
  const double s = deviation_of<C>(g, sample), upstream = load_number<double>(g.upstream, sample);
  double base = upstream / (g.adds_up ? s * s : s * s * static_cast<double>(g.layout.elements));
  if (s == 0.0) base = 0.0;
  C power = C(1);
  if (sizeof(C) < sizeof(double) && outside_float(base)) {
    const int exponent = exponent_for_float(base);
    power = static_cast<C>(float_power(exponent));
    base = base * float_power(-exponent);
  }
  const int given = g.diverges ? g.terms : 1;  // inputs that do not belong to the mean
  if (!g.diverges) factor[0] = static_cast<C>(-base);
  BICM_UNROLL(5)
  for (int k = 0; k < kMaxTerms; ++k) {
    if (k >= g.terms) continue;
    double w = static_cast<double>(weight[k]);
    if (g.diverges) {
      factor[k] = static_cast<C>(base * w);
      w = -w;
    }
    if (g.guided && k == g.terms - 1) {
      const double scale = static_cast<double>(load_number<C>(g.guidance_scale, sample));
      factor[given + k + 1] = static_cast<C>(base * (w * scale));
      w = w * (1.0 - scale);
    }
    factor[given + k] = static_cast<C>(base * w);
  }
  return power;
}

template <class C>
BICM_HD Pull<C> pull_of(const Gaussian& g, int64_t sample, const C weight[kMaxTerms]) {
  Pull<C> pull = {};
  pull.power = form_pull(g, sample, weight, pull.factor);
  return pull;
}

BICM_NAMESPACE_END
