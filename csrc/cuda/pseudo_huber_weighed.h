// Losses whose elements have weights: the terms of a sum are float64, so that none is recomputed.
#pragma once

#include "pseudo_huber_gradient.h"
#include "pseudo_huber_sample.h"

namespace bicm {
namespace cuda {

// The residuals of a group and their weights. All inputs are loaded before the first is used.
template <class Memory, bool Denoises>
BICM_DEVICE void weighed_residual(const PseudoHuber& p, const Preconditioning<typename Memory::Compute>& weights,
                                  const typename Memory::Place& place, typename Memory::Compute* r,
                                  typename Memory::Compute* weight) {
  const typename Memory::Raw raw = Memory::load(p.layout, p.element_weight, place);
  residual<Memory, Denoises>(p, weights, place, r);
  Memory::widen(p.element_weight, raw, weight);
}

template <class Memory, bool Denoises>
BICM_DEVICE double weighed_chunk(const PseudoHuber& p, int64_t sample, int64_t first, int64_t last, bool aligned) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  const Preconditioning<C> weights = denoising_weights<C>(p, sample);
  const C c = p.distance == Distance::elementwise ? load_number<C>(p.c, sample) : C(0);
  Sum<double> sum = {};
  BICM_LOOP
  for (int64_t begin = first + threadIdx.x * G; begin < last; begin += blockDim.x * G) {
    C r[G], weight[G];
    weighed_residual<Memory, Denoises>(p, weights, Memory::at(p.layout, sample, begin, aligned), r, weight);
    BICM_UNROLL(8)
    for (int i = 0; i < G; ++i) {
      if (begin + i < last) sum.high = sum.high + weighed_term(p, r[i], c, weight[i]);
    }
  }
  return weighed_sum(block_total(sum));
}

template <class Memory, bool Denoises>
__global__ void __launch_bounds__(kThreads, 2)
    weighed_sums_kernel(const __grid_constant__ PseudoHuber p, const __grid_constant__ Results to, bool aligned) {
  const int64_t items = p.layout.batch * to.chunks;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t sample = item / to.chunks, first = item % to.chunks * kSumChunk, left = p.layout.elements - first;
    const int64_t last = first + (left < kSumChunk ? left : kSumChunk);
    const double sum = weighed_chunk<Memory, Denoises>(p, sample, first, last, aligned);
    if (threadIdx.x == 0) finish_chunk<typename Memory::Compute>(p, to, sample, item, sum);
  }
  if (to.finished != nullptr && finishes_last(to.finished)) finish_batch<typename Memory::Compute>(p, to);
}

template <class Memory, bool Denoises>
cudaError_t run_weighed_sums(const PseudoHuber& p, const Results& to, bool aligned, cudaStream_t stream) {
  return run_chunks<Memory>(weighed_sums_kernel<Memory, Denoises>, p, to, aligned, stream);
}

template <class Memory, bool Denoises>
__global__ void __launch_bounds__(kThreads, 2)
    weighed_gradient_kernel(const __grid_constant__ PseudoHuber p, bool aligned) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  for (int64_t sample = blockIdx.y; sample < p.layout.batch; sample += gridDim.y) {
    const Factors<C> f = factors_of<C>(p, sample, threadIdx.x == 0 ? number_at<double>(p.sums, sample) : 0.0);
    BICM_LOOP
    for (int64_t begin = first_group() * G; begin < p.layout.elements; begin += group_stride() * G) {
      const typename Memory::Place place = Memory::at(p.layout, sample, begin, aligned);
      C r[1][G], weight[G];
      weighed_residual<Memory, Denoises>(p, f.weights, place, r[0], weight);
      BICM_UNROLL(8)
      for (int i = 0; i < G; ++i) r[0][i] = weighed_slope(p, r[0][i], f.c, f.power, weight[i]);
      store_scaled<Memory, Denoises, 1>(p, f, p.gradient, place, r);
    }
  }
}

template <class Memory, bool Denoises>
cudaError_t run_weighed_gradient(const PseudoHuber& p, const Results&, bool aligned, cudaStream_t stream) {
  return run_elements<Memory>(weighed_gradient_kernel<Memory, Denoises>, p, aligned, stream);
}

}  // namespace cuda
}  // namespace bicm
