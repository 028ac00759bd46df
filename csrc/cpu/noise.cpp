// The keyed noise itself, and the functions it is made of, for tests.
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

template <class C>
void pair_units(const NoisyPair& p, int64_t begin, int64_t end) {
  alignas(64) float noise[kChunk];
  alignas(64) C input[kChunk], out[kChunk];
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit = unit_at(p.layout, i);
    const bool generated = p.mask != nullptr && p.mask[unit.sample * p.mask_stride];
    const Operand& from = generated ? p.x_hat : p.x;
    prefetch_unit(from, unit);
    fill_noise<Distribution::normal>(sample_key(p.key, unit.sample), unit.begin, unit.count, noise);
    const C* x = load_unit(p.layout, from, unit, input);
    const C low = load_number<C>(p.sigma_low, unit.sample), high = load_number<C>(p.sigma_high, unit.sample);
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

namespace {

template <class Evaluate>
void in_blocks(const float* u, int64_t count, Evaluate evaluate) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t width = count - i < kLanes ? count - i : kLanes;
    Floats x = Floats{} + 1.0f;
    __builtin_memcpy(&x, u + i, static_cast<size_t>(width) * sizeof(float));
    evaluate(x, i, static_cast<size_t>(width) * sizeof(float));
  }
}

}  // namespace

void log_all(const float* u, float* out, int64_t count) {
  in_blocks(u, count, [&](Floats x, int64_t i, size_t bytes) {
    const Floats y = minus_two_log<0>(x) * -0.5f;
    __builtin_memcpy(out + i, &y, bytes);
  });
}

void cos_sin_all(const float* u, float* cosine, float* sine, int64_t count) {
  in_blocks(u, count, [&](Floats x, int64_t i, size_t bytes) {
    Floats c, s;
    cos_sin_quarters(x * 4.0f, c, s);
    __builtin_memcpy(cosine + i, &c, bytes);
    __builtin_memcpy(sine + i, &s, bytes);
  });
}

void philox_all(int64_t seed, const uint32_t* counters, uint32_t* words, int64_t count) {
  for (int64_t first = 0; first < count; first += kCounters) {
    const int width = count - first < kCounters ? static_cast<int>(count - first) : kCounters;
    Quad<PhiloxWord> quad = {};
    for (int i = 0; i < 4 * width; ++i) set_counter(quad.lane[i % 4], i / 4, counters[4 * first + i]);
    quad = philox(quad, make_key(seed));
    for (int i = 0; i < 4 * width; ++i) words[4 * first + i] = get_counter(quad.lane[i % 4], i / 4);
  }
}

BICM_NAMESPACE_END
