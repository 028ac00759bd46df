// Sampler updates: an affine map of a few tensors plus keyed noise, and how each update chooses the weights.
#pragma once

#include "keys.h"
#include "preconditioning.h"

namespace bicm {

// How raw coefficients become weights. affine: they are the weights. bdia, bdia_inverse: (a, b, a_last, b_last, gamma).
// bcm, cm: (t, u, sigma_data), weights c_skip and c_out; bcm_scaled, cm_scaled: the same of c_in(t) x. input: (t,
// sigma_data), weight c_in.
enum class Form : int32_t { affine, bdia, bdia_inverse, bcm, cm, bcm_scaled, cm_scaled, input };

struct Multistep {
  Layout layout;
  bool float64;  // the compute type; float32 otherwise

  int32_t terms;
  Operand input[kMaxTerms];
  Form form;
  Number coefficient[kMaxTerms];
  bool takes_second;  // one input, and its weight is the form's second: the derivative in F

  bool guided;  // the last input is the unconditional prediction, `conditional` its partner
  Operand conditional;
  Number guidance_scale;

  bool draws;
  Number noise_weight;
  NoiseKey key;

  Operand out;

  // x0 = clip(sum of p_k x_k); out gains x0_weight x0; next = next_scale out, or c_in(next_scale) out.
  bool denoises, clips, scales, next_scale_is_sigma;
  Number x0_coefficient[kMaxTerms];
  Number x0_weight, clip, next_scale;
  Operand x0, next;
};

}  // namespace bicm

BICM_NAMESPACE_BEGIN

// The order of operations is part of the contract: every backend and the reference form the same bits.
template <class C>
BICM_HD void form_weights(const Multistep& m, int64_t sample, C weight[kMaxTerms]) {
  C raw[kMaxTerms];
  for (int k = 0; k < kMaxTerms; ++k) {
    const bool given = k < m.terms || m.form != Form::affine;
    raw[k] = given ? load_number<C>(m.coefficient[k], sample) : C(0);
  }
  const C a = raw[0], b = raw[1], a_last = raw[2], b_last = raw[3], gamma = raw[4];
  switch (m.form) {
    case Form::affine:
      for (int k = 0; k < kMaxTerms; ++k) weight[k] = raw[k];
      break;
    case Form::bdia:  // BDIA eq. 24
      weight[0] = gamma;
      weight[1] = a - gamma / a_last;
      weight[2] = b + gamma * (b_last / a_last);
      break;
    case Form::bdia_inverse:  // BDIA eq. 28
      weight[0] = C(1) / gamma;
      weight[1] = C(1) / a_last - a / gamma;
      weight[2] = -(b / gamma + b_last / a_last);
      break;
    case Form::bcm:
    case Form::cm:
    case Form::bcm_scaled:
    case Form::cm_scaled: {
      const bool scaled = m.form == Form::bcm_scaled || m.form == Form::cm_scaled;
      const bool to_least = m.form == Form::cm || m.form == Form::cm_scaled;
      const Preconditioning<C> p = to_least ? cm(raw[0], raw[1], raw[2], scaled) : bcm(raw[0], raw[1], raw[2], scaled);
      weight[0] = p.c_skip;
      weight[1] = p.c_out;
      break;
    }
    case Form::input: weight[0] = c_in(raw[0], raw[1]); break;
  }
  if (m.takes_second) weight[0] = weight[1];
}

template <class C>
BICM_HD C next_scale(const Multistep& m, int64_t sample) {
  const C scale = load_number<C>(m.next_scale, sample);
  return m.next_scale_is_sigma ? c_in(scale, load_number<C>(m.coefficient[2], sample)) : scale;
}

// e = eps_uncond + s (eps_cond - eps_uncond), before weighting: folded into the weights it loses digits.
template <class C>
BICM_HD C guide(C unconditional, C conditional, C scale) {
  return unconditional + scale * (conditional - unconditional);
}

// NaN passes, as in torch.clamp.
template <class C>
BICM_HD C clip_to(C x, C bound) {
  return x > bound ? bound : (x < -bound ? -bound : x);
}

BICM_NAMESPACE_END
