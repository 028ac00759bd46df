// Sampler updates on one unit at a time: in registers where memory allows it, otherwise stage inputs,
// fold, round once, store.
#include "../core/multistep.h"

#include "multistep_registers.h"

BICM_NAMESPACE_BEGIN
namespace {

template <class C>
struct Buffers : Inputs<C> {
  alignas(64) C out[kChunk + kPad];
  alignas(64) C x0[kChunk + kPad];
  alignas(64) C next[kChunk + kPad];
  int64_t known = -1;  // the sample that these numbers belong to: forming them costs as much as a hundred elements
  Numbers<C> numbers;
};

// The results of a unit in buffers: the state, and its scaled copy for the next evaluation.
template <class C>
void store_results(const Multistep& m, const Unit& unit, C scale, C* out) {
  store_unit(m.layout, m.out, unit, out);
  if (!m.scales) return;
  for (int64_t i = 0; i < unit.count; ++i) out[i] = scale * out[i];
  store_unit(m.layout, m.next, unit, out);
}

template <class C>
void affine_unit(const Multistep& m, const Unit& unit, Buffers<C>& buffers) {
  const C* x[kMaxTerms];
  const C noise_weight = draw<C>(m, unit, buffers.noise);
  load_inputs(m, unit, buffers, x);
  const C* weight = buffers.numbers.weight;
  const bool in_place = is_compute_type<C>(m.out) && !m.out.streams && !m.scales;
  C* out = in_place ? static_cast<C*>(m.out.data) + unit.sample * m.out.batch_stride + unit.begin : buffers.out;
  if (noise_weight != C(0)) {
    fold_terms<C, true>(m.terms, x, weight, buffers.noise, noise_weight, out, unit.count);
  } else {
    fold_terms<C, false>(m.terms, x, weight, nullptr, C(0), out, unit.count);
  }
  if (!in_place) store_results(m, unit, buffers.numbers.scale, out);
}

// The inputs and outputs of a denoised step for one unit.
template <class C>
struct Denoised {
  const C *x0_weight, *weight;  // one per term
  C weight_of_x0, bound, noise_weight, scale;
  const float* noise;
  C *x0, *out, *next;
};

// Exact aliasing of an output and an input is fine: each i is read, then written.
template <class C, int K, bool Draws, bool Scales>
void fold_denoised(const C* const* x, const Denoised<C>& denoised, int64_t count) {
  const Denoised<C> d = denoised;
  const Weights<C, K> x0_weight(d.x0_weight), weight(d.weight);
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    C x0 = x0_weight.of[0] * x[0][i];
    C y = weight.of[0] * x[0][i];
    for (int k = 1; k < K; ++k) {
      x0 = x0 + x0_weight.of[k] * x[k][i];
      y = y + weight.of[k] * x[k][i];
    }
    x0 = clip_to(x0, d.bound);
    y = y + d.weight_of_x0 * x0;
    if (Draws) y = y + d.noise_weight * static_cast<C>(d.noise[i]);
    d.x0[i] = x0;
    d.out[i] = y;
    if (Scales) d.next[i] = d.scale * y;
  }
}

template <class C, bool Draws, bool Scales>
void fold_denoised_terms(int terms, const C* const* x, const Denoised<C>& d, int64_t count) {
  switch (terms) {
    case 1: return fold_denoised<C, 1, Draws, Scales>(x, d, count);
    case 2: return fold_denoised<C, 2, Draws, Scales>(x, d, count);
    case 3: return fold_denoised<C, 3, Draws, Scales>(x, d, count);
    case 4: return fold_denoised<C, 4, Draws, Scales>(x, d, count);
    default: return fold_denoised<C, 5, Draws, Scales>(x, d, count);
  }
}

// Where a unit's results are formed: in place, or in a buffer from which they are stored.
template <class C>
C* place_of(const Operand& to, const Unit& unit, C* buffer) {
  const bool in_place = is_compute_type<C>(to) && !to.streams;
  return in_place ? static_cast<C*>(to.data) + unit.sample * to.batch_stride + unit.begin : buffer;
}

template <class C>
void denoised_unit(const Multistep& m, const Unit& unit, Buffers<C>& buffers) {
  const C* x[kMaxTerms];
  const Numbers<C>& n = buffers.numbers;
  const C noise_weight = draw<C>(m, unit, buffers.noise);
  load_inputs(m, unit, buffers, x);
  C* const x0 = place_of(m.x0, unit, buffers.x0);
  C* const out = place_of(m.out, unit, buffers.out);
  C* const next = m.scales ? place_of(m.next, unit, buffers.next) : buffers.next;
  const Denoised<C> d = {n.x0_weight, n.weight, n.weight_of_x0, n.bound, noise_weight, n.scale, buffers.noise, x0,
                         out,         next};
  const auto plain = m.scales ? fold_denoised_terms<C, false, true> : fold_denoised_terms<C, false, false>;
  const auto noisy = m.scales ? fold_denoised_terms<C, true, true> : fold_denoised_terms<C, true, false>;
  (noise_weight != C(0) ? noisy : plain)(m.terms, x, d, unit.count);
  if (x0 == buffers.x0) store_unit(m.layout, m.x0, unit, x0);
  if (out == buffers.out) store_unit(m.layout, m.out, unit, out);
  if (m.scales && next == buffers.next) store_unit(m.layout, m.next, unit, next);
}

// A staged tensor is read in a burst per unit, too short for the hardware prefetcher: prefetch the next one now.
template <class C>
void prefetch_staged(const Multistep& m, const Unit& next) {
  for (int k = 0; k < m.terms; ++k) {
    if (!is_compute_type<C>(m.input[k]) || m.denoises) prefetch_unit(m.input[k], next);
  }
  if (m.guided) prefetch_unit(m.conditional, next);
}

// A unit in parts: noise is faster in long runs, but staged tensors must fit in the first-level cache together.
template <class C>
void run(const Multistep& m, int64_t begin, int64_t end) {
  Buffers<C> buffers;
  bool staged = m.guided || m.denoises;
  for (int k = 0; k < m.terms; ++k) staged = staged || !is_compute_type<C>(m.input[k]);
  const int64_t width = m.draws || !staged ? kChunk : kChunk / 2;
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit = unit_at(m.layout, i);
    if (unit.sample != buffers.known) buffers.numbers = numbers_of<C>(m, unit.sample);
    buffers.known = unit.sample;
    for (int64_t done = 0; done < unit.count; done += width) {
      const Unit part = part_of(m.layout, unit, done, width);
      const Unit next = part_of(m.layout, unit, done + width, width);
      if (next.count > 0) prefetch_staged<C>(m, next);
      m.denoises ? denoised_unit(m, part, buffers) : affine_unit(m, part, buffers);
    }
  }
  finish_streams();
}

}  // namespace

void multistep(const Multistep& m, int64_t begin, int64_t end) {
  const Memory memory = memory_for(m);
  if (memory != Memory::none) return update_in_registers(m, begin, end, memory);
  m.float64 ? run<double>(m, begin, end) : run<float>(m, begin, end);
}

BICM_NAMESPACE_END
