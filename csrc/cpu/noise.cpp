// The keyed noise.
#include "blocks.h"
#include "noise_block.h"

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

// One sample's numbers of a pair.
template <class C>
struct PairNumbers {
  C low, high, low_scale, high_scale;
  int64_t place;
  bool generates;
  Preconditioning<C> of_network;
};

template <class C>
PairNumbers<C> numbers_of(const NoisyPair& p, int64_t sample) {
  PairNumbers<C> n = {};
  n.low = load_number<C>(p.sigma_low, sample);
  n.high = load_number<C>(p.sigma_high, sample);
  n.low_scale = pair_scale(p, sample, n.low);
  n.high_scale = pair_scale(p, sample, n.high);
  n.place = place_of(p, sample);
  n.generates = p.generates && n.place >= 0;
  if (n.generates) n.of_network = pair_weights(p, sample, n.low);
  return n;
}

// What is noised: x, or the samples that replace it.
template <class C>
const Operand& clean_samples(const NoisyPair& p, const PairNumbers<C>& n) {
  return !p.generates && n.place >= 0 ? p.x_hat : p.x;
}

// Where the network's output of a unit is.
template <class C>
Unit unit_of_network(const PairNumbers<C>& n, const Unit& unit) {
  return {n.place, unit.begin, unit.count};
}

// scale (x + sigma n)
template <class C>
void add_level(const C* x, const float* noise, C sigma, C scale, C* out, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = scale * at_level(x[i], sigma, noise[i]);
}

// A unit, or the part of it that begins with its noise, through buffers.
template <class C>
void pair_of_buffers(const NoisyPair& p, const PairNumbers<C>& n, const Unit& unit, const float* noise) {
  alignas(64) C input[kChunk], out[kChunk], network[kChunk], generated[kChunk];
  const C* x = load_unit(p.layout, clean_samples(p, n), unit, input);
  if (n.generates) {
    const Preconditioning<C>& w = n.of_network;
    const C* F = load_unit(p.layout, p.x_hat, unit_of_network(n, unit), network);
#pragma GCC ivdep
    for (int64_t i = 0; i < unit.count; ++i) {
      generated[i] = w.c_skip * at_level(x[i], n.low, noise[i]) + w.c_out * F[i];
    }
    x = generated;
  }
  add_level(x, noise, n.low, n.low_scale, out, unit.count);
  store_unit(p.layout, p.low, unit, out);
  add_level(x, noise, n.high, n.high_scale, out, unit.count);
  store_unit(p.layout, p.high, unit, out);
}

#if defined(BICM_VECTOR)

BICM_HD Block noised(const Block& x, const Block& noise, float sigma) {
  if (sigma == 0.0f) return x;
  return each_part([&](int j) { return x.part[j] + sigma * noise.part[j]; });
}
BICM_HD Block scaled(const Block& x, float scale) {
  return each_part([&](int j) { return scale * x.part[j]; });
}

// Whole blocks of dense operands, in registers. Returns how many elements it did.
template <class M>
int64_t pair_of_blocks(const NoisyPair& p, const PairNumbers<float>& n, const Unit& unit, const float* noise) {
  const M x = memory_of<M>(clean_samples(p, n), unit);
  const M F = n.generates ? memory_of<M>(p.x_hat, unit_of_network(n, unit)) : x;
  const Target<M> low = target_of<M>(p.low, unit), high = target_of<M>(p.high, unit);
  const Preconditioning<float> w = n.of_network;
  int64_t i = 0;
  for (; i + kBlock <= unit.count; i += kBlock) {
    const Block drawn = Dense<const float>{noise}.load(i);
    Block clean = x.load(i);
    if (n.generates) {
      const Block given = noised(clean, drawn, n.low), output = F.load(i);
      clean = each_part([&](int j) { return w.c_skip * given.part[j] + w.c_out * output.part[j]; });
    }
    low.store(scaled(noised(clean, drawn, n.low), n.low_scale), i);
    high.store(scaled(noised(clean, drawn, n.high), n.high_scale), i);
  }
  return i;
}

int64_t pair_in_registers(const NoisyPair& p, Memory memory, const PairNumbers<float>& n, const Unit& unit,
                          const float* noise) {
  int64_t done = 0;
  if (memory == Memory::none) return done;
  with_memory(memory, [&](auto kind) { done = pair_of_blocks<decltype(kind)>(p, n, unit, noise); });
  return done;
}

#endif

template <class C>
int64_t pair_in_registers(const NoisyPair&, Memory, const PairNumbers<C>&, const Unit&, const float*) {
  return 0;
}

Memory memory_for(const NoisyPair& p) {
  CommonMemory common;
  const Operand* const operands[] = {&p.x, &p.x_hat, &p.low, &p.high};
  for (const Operand* x : operands) common.add(*x);
  return p.float64 ? Memory::none : common.memory();
}

template <class C>
void pair_units(const NoisyPair& p, int64_t begin, int64_t end) {
  alignas(64) float noise[kChunk];
  const Memory memory = memory_for(p);
  PairNumbers<C> n = {};
  int64_t sample = -1;  // the one that these numbers belong to
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit = unit_at(p.layout, i);
    if (unit.sample != sample) n = numbers_of<C>(p, sample = unit.sample);
    prefetch_unit(clean_samples(p, n), unit);
    fill_noise<Distribution::normal>(sample_key(p.key, unit.sample), unit.begin, unit.count, noise);
    const int64_t done = pair_in_registers(p, memory, n, unit, noise);
    if (done < unit.count) {
      const Unit rest = {unit.sample, unit.begin + done, unit.count - done};
      pair_of_buffers(p, n, rest, noise + done);
    }
  }
  finish_streams();
}

}  // namespace

void noisy_pair(const NoisyPair& p, int64_t begin, int64_t end) {
  p.float64 ? pair_units<double>(p, begin, end) : pair_units<float>(p, begin, end);
}

BICM_NAMESPACE_END
