// Residuals of a loss, a group of adjacent elements at a time, and the terms of a chunk's sum.
#pragma once

#include "../core/pseudo_huber.h"

#include "block.h"
#include "memory.h"

namespace bicm {
namespace cuda {

// Elements that one block sums: a sample of at most this size is summed by one block.
constexpr int64_t kSumChunk = 8192;

inline int64_t chunks_of(const Layout& layout) { return divide_up(layout.elements, kSumChunk); }

template <int G, class C>
BICM_DEVICE void subtract(const C* y, C* x) {
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) x[i] = x[i] - y[i];
}

// A sample's tensors; of all samples they are those of PseudoHuber.
template <class Memory>
struct LossRows {
  typename Memory::Row prediction, target, x, gradient[kLossInputs];
};

template <class Memory, bool Denoises>
BICM_DEVICE LossRows<Memory> loss_rows(const PseudoHuber& p, int64_t sample, bool differentiates) {
  LossRows<Memory> rows = {};
  rows.prediction = Memory::row(p.prediction, sample);
  rows.target = Memory::row(p.target, sample);
  if (Denoises) rows.x = Memory::row(p.x, sample);
  BICM_UNROLL(3)
  for (int k = 0; k < (Denoises ? 3 : 2); ++k) {
    if (differentiates) rows.gradient[k] = Memory::row(p.gradient[k], sample);
  }
  return rows;
}

// A group of every input, in flight until `residual_of` uses it.
template <class Memory>
struct Inputs {
  typename Memory::Raw prediction, target, x;
};

template <class Memory, bool Denoises, class From, class Place>
BICM_DEVICE Inputs<Memory> load_inputs(const Layout& layout, const From& from, const Place& place) {
  Inputs<Memory> in = {};
  in.prediction = Memory::load(layout, from.prediction, place);
  in.target = Memory::load(layout, from.target, place);
  if (Denoises) in.x = Memory::load(layout, from.x, place);
  return in;
}

template <class Memory, bool Denoises>
BICM_DEVICE void residual_of(const PseudoHuber& p, const Preconditioning<typename Memory::Compute>& weights,
                             const Inputs<Memory>& in, typename Memory::Compute* r) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  Memory::widen(p.prediction, in.prediction, r);
  C other[G];
  if (Denoises) {
    Memory::widen(p.x, in.x, other);
    BICM_UNROLL(8)
    for (int i = 0; i < G; ++i) r[i] = weights.c_skip * other[i] + weights.c_out * r[i];
  }
  Memory::widen(p.target, in.target, other);
  subtract<G>(other, r);
}

// The residual of a group. All inputs are loaded before the first is used.
template <class Memory, bool Denoises>
BICM_DEVICE void residual(const PseudoHuber& p, const Preconditioning<typename Memory::Compute>& weights,
                          const typename Memory::Place& place, typename Memory::Compute* r) {
  residual_of<Memory, Denoises>(p, weights, load_inputs<Memory, Denoises>(p.layout, p, place), r);
}

// The terms of a group's elements that exist, added up in pairs.
template <int G, class C>
BICM_DEVICE C sum_of_group(C* terms, int64_t count) {
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) terms[i] = i < count ? terms[i] : C(0);
  BICM_UNROLL(3)
  for (int half = G / 2; half > 0; half /= 2) {
    BICM_UNROLL(4)
    for (int i = 0; i < G / 2; ++i) {
      if (i < half) terms[i] = terms[i] + terms[i + half];
    }
  }
  return terms[0];
}

// A group's part of the sum, of distances or of squares; `scale` is exact.
template <int G, class C>
BICM_DEVICE C sum_of_terms(C* r, int64_t count, bool elementwise, C c, C scale) {
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) {
    const C scaled = r[i] * scale, square = scaled * scaled;
    r[i] = elementwise ? pseudo_huber_distance(square, c) : square;
  }
  return sum_of_group<G>(r, count);
}

// A thread's part of a chunk's elementwise distances times `scale`, where the plain formula is not accurate; in the
// same order.
template <class Memory, bool Denoises>
BICM_DEVICE Sum<typename Memory::Compute> sum_anywhere(const PseudoHuber& p,
                                                       const Preconditioning<typename Memory::Compute>& weights,
                                                       int64_t sample, int64_t first, int64_t last, bool aligned,
                                                       typename Memory::Compute c, typename Memory::Compute scale) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  Sum<C> sum = {};
  BICM_LOOP
  for (int64_t begin = first + threadIdx.x * G; begin < last; begin += blockDim.x * G) {
    C r[G];
    residual<Memory, Denoises>(p, weights, Memory::at(p.layout, sample, begin, aligned), r);
    BICM_UNROLL(8)
    for (int i = 0; i < G; ++i) r[i] = distance_anywhere(r[i], c, scale);
    sum = add(sum, {sum_of_group<G>(r, last - begin), C(0)});
  }
  return sum;
}

// A chunk's sum; `sum_of_thread(c, scale)` is a thread's part of it. Squares of float32 overflow above 1.8e19 and lose
// digits below 1e-19. Where the sum indicates this, they are recomputed from residuals times a power of two, which is
// exact.
template <class C, class SumOfThread>
BICM_DEVICE double chunk_total(const PseudoHuber& p, int64_t sample, SumOfThread sum_of_thread) {
  const C c = p.distance == Distance::elementwise ? load_number<C>(p.c, sample) : C(0);
  C scale = C(1);
  BICM_LOOP
  for (;;) {
    const double total = block_total(sum_of_thread(c, scale));
    if (scale != C(1)) return keep_sum(p, total, scale);
    if (trusted(p, total, c)) return total;
    scale = scale_of(p, total, c);
  }
}

// The threads of the block that sums a chunk of a sample; with the chunk, they determine the order of a sum.
template <class Memory>
unsigned threads_of_chunk(const Layout& layout) {
  const int64_t longest = layout.elements < kSumChunk ? layout.elements : kSumChunk;
  const int64_t warps = divide_up(divide_up(longest, Memory::kGroup), kLanesOfWarp);
  const int64_t threads = warps < 1 ? kLanesOfWarp : warps * kLanesOfWarp < kThreads ? warps * kLanesOfWarp : kThreads;
  return static_cast<unsigned>(threads);
}

}  // namespace cuda
}  // namespace bicm
