// Preconditioning: the weights of a sample and a network's output, f(x, t, u) = c_skip x + c_out F(c_in x).
//
// s = sigma_data^2 + t t is formed once and its root r once; the order of operations is part of the contract. `scaled`:
// the sample is c_in(t) x, the network's input, and c_skip becomes c_skip / c_in = c_skip r.
#pragma once

#include "normal.h"

BICM_NAMESPACE_BEGIN

#if defined(__CUDA_ARCH__)
BICM_HD float root(float x) { return __fsqrt_rn(x); }
BICM_HD double root(double x) { return __dsqrt_rn(x); }
#else
BICM_HD float root(float x) { return __builtin_sqrtf(x); }
BICM_HD double root(double x) { return __builtin_sqrt(x); }
#endif

template <class C>
struct Preconditioning {
  C c_skip, c_out;
};

template <class C>
BICM_HD C c_in(C t, C sigma_data) {
  return C(1) / root(sigma_data * sigma_data + t * t);
}

// BCM eq. 20, 39, 43: from t to u. With u = 0 it is EDM's denoiser.
template <class C>
BICM_HD Preconditioning<C> bcm(C t, C u, C sigma_data, bool scaled) {
  const C variance = sigma_data * sigma_data;
  const C s = variance + t * t;
  const C r = root(s);
  return {(variance + t * u) / (scaled ? r : s), (sigma_data * (t - u)) / r};
}

// Consistency models (BCM eq. 17, GC eq. 3): from t to sigma_min.
template <class C>
BICM_HD Preconditioning<C> cm(C t, C sigma_min, C sigma_data, bool scaled) {
  const C variance = sigma_data * sigma_data;
  const C r = root(variance + t * t);
  const C d = t - sigma_min;
  return {(scaled ? variance * r : variance) / (variance + d * d), (sigma_data * d) / r};
}

BICM_NAMESPACE_END
