// Sampler updates of dense operands of 32 and 16 bits, in registers from memory to memory.
#pragma once

#include "affine.h"
#include "blocks.h"

BICM_NAMESPACE_BEGIN
namespace {

inline Memory memory_for(const Multistep& m) {
  CommonMemory common;
  for (int k = 0; k < m.terms; ++k) common.add(m.input[k]);
  common.add(m.out);
  if (m.guided) common.add(m.conditional);
  if (m.denoises) common.add(m.x0);
  if (m.scales) common.add(m.next);
  return m.float64 ? Memory::none : common.memory();
}

// The numbers of a sample's update. Without clipping the bound is infinite.
template <class C>
struct Numbers {
  C weight[kMaxTerms], x0_weight[kMaxTerms];
  C guidance, weight_of_x0, bound, scale;
};

template <class C>
__attribute__((noinline)) Numbers<C> numbers_of(const Multistep& m, int64_t sample) {
  Numbers<C> n = {};
  form_weights(m, sample, n.weight);
  if (m.guided) n.guidance = load_number<C>(m.guidance_scale, sample);
  if (m.denoises) {
    for (int k = 0; k < m.terms; ++k) n.x0_weight[k] = load_number<C>(m.x0_coefficient[k], sample);
    n.weight_of_x0 = load_number<C>(m.x0_weight, sample);
  }
  n.bound = m.clips ? load_number<C>(m.clip, sample) : static_cast<C>(__builtin_inf());
  n.scale = m.scales ? next_scale<C>(m, sample) : C(1);
  return n;
}

#if defined(BICM_VECTOR)

// What an update does: a weighted sum, with guidance, noise and a scaled copy where they are given, or a denoised
// sample too. Most are sums, whose loops are so short that a test of every option would show.
enum class Shape { sum, optional, denoised };

// An update of adjacent elements: the operations of affine_unit and denoised_unit, for whole blocks.
template <class M, int K, Shape shape>
struct Update {
  static constexpr bool kDenoises = shape == Shape::denoised, kOptions = shape != Shape::sum;

  M input[K], conditional;
  Target<M> out, x0, next;
  const float* noise;
  float weight[K], x0_weight[K];
  float guidance, weight_of_x0, bound, noise_weight, scale;
  bool guided, scales;

  // Exact aliasing of an output and an input is fine: a block is read, then written.
  BICM_HD void block(int64_t i) const {
    Block y = {}, clean = {};
    BICM_UNROLL(5)
    for (int k = 0; k < K; ++k) {
      Block x = input[k].load(i);
      if (kOptions && k == K - 1 && guided) {
        const Block other = conditional.load(i);
        x = each_part([&](int j) { return guide(x.part[j], other.part[j], Floats{} + guidance); });
      }
      const Block last = y, last_clean = clean;
      y = each_part([&](int j) { return k ? last.part[j] + weight[k] * x.part[j] : weight[k] * x.part[j]; });
      if (!kDenoises) continue;
      clean = each_part(
          [&](int j) { return k ? last_clean.part[j] + x0_weight[k] * x.part[j] : x0_weight[k] * x.part[j]; });
    }
    if (kDenoises) {
      clean = each_part([&](int j) { return clip_to(clean.part[j], Floats{} + bound); });
      y = each_part([&](int j) { return y.part[j] + weight_of_x0 * clean.part[j]; });
      x0.store(clean, i);
    }
    if (kOptions && noise_weight != 0.0f) {
      y = each_part([&](int j) { return y.part[j] + noise_weight * load_floats(noise + i + j * kLanes); });
    }
    out.store(y, i);
    if (kOptions && scales) next.store(each_part([&](int j) { return scale * y.part[j]; }), i);
  }

  __attribute__((noinline)) void elements(int64_t count) const {
    const Update copy = *this;  // in registers: a store might change what is behind a pointer
    int64_t i = 0;
    for (; i + kBlock <= count; i += kBlock) copy.block(i);
    if (i < count) rest(i, count - i);
  }

  void rest(int64_t i, int64_t count) const {
    Rest read[K], other, written[3];
    Update last = *this;
    for (int k = 0; k < K; ++k) last.input[k] = read[k].read(input[k], i, count);
    if (guided) last.conditional = other.read(conditional, i, count);
    last.out = written[0].room(out);
    if (kDenoises) last.x0 = written[1].room(x0);
    if (scales) last.next = written[2].room(next);
    if (noise_weight != 0.0f) last.noise = noise + i;  // whole blocks are drawn
    last.elements(kBlock);
    written[0].write(out, i, count);
    if (kDenoises) written[1].write(x0, i, count);
    if (scales) written[2].write(next, i, count);
  }
};

// The noise of a run and its weight.
struct Drawn {
  const float* noise;
  float weight;
};

template <class M, int K, Shape shape>
void update(const Multistep& m, const Unit& run, const Numbers<float>& n, const Drawn& drawn) {
  Update<M, K, shape> u = {};
  for (int k = 0; k < K; ++k) {
    u.input[k] = memory_of<M>(m.input[k], run);
    u.weight[k] = n.weight[k];
    u.x0_weight[k] = n.x0_weight[k];
  }
  u.out = target_of<M>(m.out, run);
  u.guided = m.guided;
  u.scales = m.scales;
  if (m.guided) u.conditional = memory_of<M>(m.conditional, run);
  if (u.kDenoises) u.x0 = target_of<M>(m.x0, run);
  if (m.scales) u.next = target_of<M>(m.next, run);
  u.noise = drawn.noise;
  u.noise_weight = drawn.weight;
  u.guidance = n.guidance;
  u.weight_of_x0 = n.weight_of_x0;
  u.bound = n.bound;
  u.scale = n.scale;
  u.elements(run.count);
}

template <class M, Shape shape>
void update_terms(const Multistep& m, const Unit& run, const Numbers<float>& n, const Drawn& drawn) {
  switch (m.terms) {
    case 1: return update<M, 1, shape>(m, run, n, drawn);
    case 2: return update<M, 2, shape>(m, run, n, drawn);
    case 3: return update<M, 3, shape>(m, run, n, drawn);
    case 4: return update<M, 4, shape>(m, run, n, drawn);
    default: return update<M, 5, shape>(m, run, n, drawn);
  }
}

#endif

// Units [begin, end) of a problem that memory_for says is served.
inline void update_in_registers(const Multistep& m, int64_t begin, int64_t end, Memory memory) {
#if defined(BICM_VECTOR)
  alignas(64) float noise[kChunk];
  Numbers<float> n = {};
  int64_t known = -1;  // the sample that they belong to
  for (int64_t i = begin; i < end;) {
    const Unit run = m.draws ? unit_at(m.layout, i) : run_at(m.layout, i, end);
    if (run.sample != known) n = numbers_of<float>(m, run.sample);
    known = run.sample;
    const Drawn drawn = {noise, draw<float>(m, run, noise)};
    with_memory(memory, [&](auto kind) {
      using M = decltype(kind);
      if (m.denoises) return update_terms<M, Shape::denoised>(m, run, n, drawn);
      if (m.guided || m.draws || m.scales) return update_terms<M, Shape::optional>(m, run, n, drawn);
      update_terms<M, Shape::sum>(m, run, n, drawn);
    });
    i += units_of(run);
  }
  finish_streams();
#else
  (void)m, (void)begin, (void)end, (void)memory;
#endif
}

}  // namespace
BICM_NAMESPACE_END
