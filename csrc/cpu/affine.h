// Shared by the units of an affine map: staging of inputs, guidance, keyed noise, the fold.
#pragma once

#include "../core/multistep.h"

#include "noise_block.h"
#include "staging.h"

BICM_NAMESPACE_BEGIN
namespace {

// Weights in registers. Behind a pointer they would be read again for every element, since any store might change them.
template <class C, int K>
struct Weights {
  explicit Weights(const C* from) {
    for (int k = 0; k < K; ++k) of[k] = from[k];
  }
  C of[K];
};

// out[i] = ((w_0 x_0 + w_1 x_1) + ...) + w_n n. Exact aliasing of out and an input is fine: each i is read, then
// written.
template <class C, int K, bool Draws>
void fold(const C* const* x, const C* weights, const float* noise, C noise_weight, C* out, int64_t count) {
  const Weights<C, K> weight(weights);
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    C y = weight.of[0] * x[0][i];
    for (int k = 1; k < K; ++k) y = y + weight.of[k] * x[k][i];
    if (Draws) y = y + noise_weight * static_cast<C>(noise[i]);
    out[i] = y;
  }
}

template <class C, bool Draws>
void fold_terms(int terms, const C* const* x, const C* weight, const float* noise, C noise_weight, C* out,
                int64_t count) {
  switch (terms) {
    case 1: return fold<C, 1, Draws>(x, weight, noise, noise_weight, out, count);
    case 2: return fold<C, 2, Draws>(x, weight, noise, noise_weight, out, count);
    case 3: return fold<C, 3, Draws>(x, weight, noise, noise_weight, out, count);
    case 4: return fold<C, 4, Draws>(x, weight, noise, noise_weight, out, count);
    default: return fold<C, 5, Draws>(x, weight, noise, noise_weight, out, count);
  }
}

// Keeps the buffers' addresses from differing by a multiple of a page, where they would compete for the same cache
// sets.
constexpr int64_t kPad = 48;

template <class C>
struct Inputs {
  alignas(64) C input[kMaxTerms][kChunk + kPad];
  alignas(64) C conditional[kChunk + kPad];
  alignas(64) float noise[kChunk];
};

template <class C>
void load_inputs(const Multistep& m, const Unit& unit, Inputs<C>& buffers, const C* x[kMaxTerms]) {
  for (int k = 0; k < m.terms; ++k) x[k] = load_unit(m.layout, m.input[k], unit, buffers.input[k]);
  if (!m.guided) return;
  const C* unconditional = x[m.terms - 1];
  const C* conditional = load_unit(m.layout, m.conditional, unit, buffers.conditional);
  const C scale = load_number<C>(m.guidance_scale, unit.sample);
  C* guided = buffers.input[m.terms - 1];
#pragma GCC ivdep
  for (int64_t i = 0; i < unit.count; ++i) guided[i] = guide(unconditional[i], conditional[i], scale);
  x[m.terms - 1] = guided;
}

// The noise's weight; noise with weight zero is not drawn. One copy per unit: it is as long as all the rest.
template <class C>
__attribute__((noinline)) C draw(const Multistep& m, const Unit& unit, float* noise) {
  if (!m.draws) return C(0);
  const C weight = load_number<C>(m.noise_weight, unit.sample);
  if (weight != C(0)) {
    for (int k = 0; k < m.terms; ++k) prefetch_unit(m.input[k], unit);
    if (!m.out.streams) prefetch_unit(m.out, unit);
    fill_noise<Distribution::normal>(sample_key(m.key, unit.sample), unit.begin, unit.count, noise);
  }
  return weight;
}

// Elements `done` to `done + width` of a unit, possibly past its end within the sample.
inline Unit part_of(const Layout& layout, const Unit& unit, int64_t done, int64_t width) {
  const int64_t left = layout.elements - unit.begin - done;
  return {unit.sample, unit.begin + done, left < width ? left : width};
}

}  // namespace
BICM_NAMESPACE_END
