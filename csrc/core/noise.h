// The keyed noise itself: what is drawn, and one quad of it.
#pragma once

#include "keys.h"
#include "normal.h"
#include "preconditioning.h"

namespace bicm {

enum class Distribution : int32_t { normal, uniform };

struct Noise {
  Layout layout;
  Distribution distribution;
  NoiseKey key;
  Operand out;
};

// One noise at two levels: low = x + sigma_low n, high = x + sigma_high n, with x_hat for x where the mask is true;
// each times c_in of its level if scaled. If `generates`, x_hat holds the network's output F at the low level: then
// c_skip (x + sigma_low n) + c_out F replaces x, and is never stored. The network may have seen some samples only: then
// `places` has the place in x_hat of each sample's output.
struct NoisyPair {
  Layout layout;
  bool float64;
  Operand x, x_hat;
  // One of them or none is given. None: x everywhere, or where it generates x nowhere.
  const bool* mask;
  const int64_t* places;  // negative where x stays; above `last_place` it is taken for that
  int64_t mask_stride, last_place;
  Number sigma_low, sigma_high;
  bool scales;
  Number sigma_data;
  bool generates, to_least;  // to_least: parameterisation cm, whose weights differ
  Number end;                // the network's target level
  NoiseKey key;
  Operand low, high;
};

}  // namespace bicm

BICM_NAMESPACE_BEGIN

template <class Keys>
BICM_HD Quad<uint32_t> random_quad(const KeyOfSample<Keys>& k, int64_t quad) {
  const uint64_t q = static_cast<uint64_t>(quad);
  return philox(Quad<uint32_t>{{static_cast<uint32_t>(q), static_cast<uint32_t>(q >> 32), k.sample, k.step}}, k.key);
}

// The scale of a noisy sample of the pair.
template <class C>
BICM_HD C pair_scale(const NoisyPair& p, int64_t sample, C sigma) {
  return p.scales ? c_in(sigma, load_number<C>(p.sigma_data, sample)) : C(1);
}

// The place in x_hat of what replaces a sample, or is predicted of it; negative where x stays.
BICM_HD int64_t place_of(const NoisyPair& p, int64_t sample) {
  if (p.places != nullptr) {
    const int64_t place = number_at<int64_t>(p.places, sample * p.mask_stride);
    return place < p.last_place ? place : p.last_place;
  }
  const bool replaced = p.mask == nullptr ? p.generates : number_at<bool>(p.mask, sample * p.mask_stride);
  return replaced ? sample : -1;
}

template <class C>
BICM_HD Preconditioning<C> pair_weights(const NoisyPair& p, int64_t sample, C sigma) {
  const C end = load_number<C>(p.end, sample), sigma_data = load_number<C>(p.sigma_data, sample);
  return p.to_least ? cm(sigma, end, sigma_data, false) : bcm(sigma, end, sigma_data, false);
}

// x + sigma n; a level of zero draws nothing.
template <class C>
BICM_HD C at_level(C x, C sigma, float n) {
  return sigma == C(0) ? x : x + sigma * static_cast<C>(n);
}

template <Distribution D, class F>
BICM_HD void numbers_from_bits(const Quad<typename LaneOps<F>::Word>& bits, F out[4]) {
  if (D == Distribution::normal) {
    normals_from_bits<F>(bits, out);
  } else {
    for (int lane = 0; lane < 4; ++lane) out[lane] = uniform_from_bits<F>(bits.lane[lane]);
  }
}

BICM_NAMESPACE_END
