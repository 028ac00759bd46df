// Pseudo-Huber distances of a residual r: per sample sqrt(|r|^2 + c^2) - c, or the mean of the same over elements.
//
// The residual is formed in the compute type; sums over a sample and everything that exists once per sample are float64.
#pragma once

#include "keys.h"
#include "preconditioning.h"

namespace bicm {

enum class Distance : int32_t { vector, elementwise };
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

  // The forward pass: one sum per chunk of a sample. The backward pass reads them, added up per sample.
  double* sums;

  Number upstream;           // the gradient of the loss, one number or one per sample
  bool wanted[kLossInputs];  // of prediction, target, x
  Operand gradient[kLossInputs];
};

// A gradient that was formed for an upstream of 1, to be multiplied by what upstream is.
struct KeptGradient {
  Layout layout;
  Operand gradient;
  Number upstream;
};

}  // namespace bicm

BICM_NAMESPACE_BEGIN

// What zero is divided by where zero over zero is meant to be zero: x, or any other number for x = 0. Compilers make a
// branch of a division by 1 or 2, and a loop with a branch is not vectorised.
template <class C>
BICM_HD C nonzero(C x) {
  return x == C(0) ? C(3) : x;
}

// sqrt(s + c^2) - c without its cancellation where s << c^2; 0 at s = c = 0.
template <class C>
BICM_HD C pseudo_huber_distance(C s, C c) {
  return s / nonzero(root(s + c * c) + c);
}

BICM_HD double transition_of(const PseudoHuber& p, int64_t sample) {
  return p.given_c ? load_number<double>(p.c, sample) : 0.00054 * root(static_cast<double>(p.layout.elements));
}

BICM_HD double distance_of(const PseudoHuber& p, int64_t sample, double sum) {
  if (p.distance == Distance::elementwise) return sum / static_cast<double>(p.layout.elements);
  return pseudo_huber_distance(sum, transition_of(p, sample));
}

// The derivative of the reduced loss with respect to the residual is this factor times r, or, elementwise, times
// r / sqrt(r^2 + c^2). The incoming gradient is part of it, so a scaled loss loses no digits in float16.
BICM_HD double factor_of(const PseudoHuber& p, int64_t sample, double sum) {
  double factor = load_number<double>(p.upstream, sample) * load_number<double>(p.weight, sample);
  if (p.reduction == Reduction::mean) factor = factor / static_cast<double>(p.layout.batch);
  if (p.distance == Distance::elementwise) return factor / static_cast<double>(p.layout.elements);
  const double c = transition_of(p, sample);
  return factor / nonzero(root(sum + c * c));
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
