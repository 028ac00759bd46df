// The keyed noise.
#include "noise_block.h"
#include "staging.h"

BICM_NAMESPACE_BEGIN
namespace {

template <Distribution D>
void draw(const Noise& problem, int64_t begin, int64_t end) {
  alignas(64) float buffer[kChunk];
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit = unit_at(problem.layout, i);
    fill_noise<D>(sample_key(problem.key, unit.sample), unit.begin, unit.count, buffer);
    store_unit(problem.layout, problem.out, unit, buffer);
  }
  finish_streams();
}

}  // namespace

void noise(const Noise& problem, int64_t begin, int64_t end) {
  (problem.distribution == Distribution::normal ? draw<Distribution::normal> : draw<Distribution::uniform>)(problem,
                                                                                                            begin, end);
}

namespace {

// scale (x + sigma n); a level of zero draws nothing.
template <class C>
void add_level(const C* x, const float* noise, C sigma, C scale, C* out, int64_t count) {
  if (sigma == C(0)) {
    for (int64_t i = 0; i < count; ++i) out[i] = scale * x[i];
    return;
  }
  for (int64_t i = 0; i < count; ++i) out[i] = scale * (x[i] + sigma * static_cast<C>(noise[i]));
}

// The network's prediction from the noisy sample, which replaces x.
template <class C>
const C* generate(const NoisyPair& p, const Unit& unit, const C* x, const float* noise, C low, C* F, C* out) {
  const C* from = load_unit(p.layout, p.x_hat, unit, F);
  const Preconditioning<C> w = pair_weights(p, unit.sample, low);
#pragma GCC ivdep
  for (int64_t i = 0; i < unit.count; ++i) out[i] = w.c_skip * at_level(x[i], low, noise[i]) + w.c_out * from[i];
  return out;
}

template <class C>
void pair_units(const NoisyPair& p, int64_t begin, int64_t end) {
  alignas(64) float noise[kChunk];
  alignas(64) C input[kChunk], out[kChunk], generated[kChunk];
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit = unit_at(p.layout, i);
    const bool other = takes_place(p, unit.sample);
    const Operand& from = other && !p.generates ? p.x_hat : p.x;
    prefetch_unit(from, unit);
    fill_noise<Distribution::normal>(sample_key(p.key, unit.sample), unit.begin, unit.count, noise);
    const C* x = load_unit(p.layout, from, unit, input);
    const C low = load_number<C>(p.sigma_low, unit.sample), high = load_number<C>(p.sigma_high, unit.sample);
    if (other && p.generates) x = generate(p, unit, x, noise, low, out, generated);
    add_level(x, noise, low, pair_scale(p, unit.sample, low), out, unit.count);
    store_unit(p.layout, p.low, unit, out);
    add_level(x, noise, high, pair_scale(p, unit.sample, high), out, unit.count);
    store_unit(p.layout, p.high, unit, out);
  }
  finish_streams();
}

}  // namespace

void noisy_pair(const NoisyPair& p, int64_t begin, int64_t end) {
  p.float64 ? pair_units<double>(p, begin, end) : pair_units<float>(p, begin, end);
}

BICM_NAMESPACE_END
