// A loss and its gradients in one launch: a block keeps the residuals of a whole sample in its registers while it sums
// them. The sum is that of pseudo_huber.cu, in the same order.
#pragma once

#include "gradient.h"
#include "residual.h"
#include "sample.h"

namespace bicm {
namespace cuda {

// A thread's groups of a sample, at most: 32 registers of residuals.
template <class Memory>
constexpr int kRounds = 32 / (Memory::kGroup * static_cast<int>(sizeof(typename Memory::Compute) / 4));

// The largest sample of a block: a chunk of float32, or half of one of float64.
inline int64_t resident_elements(bool float64) { return float64 ? kSumChunk / 2 : kSumChunk; }

static_assert(kRounds<Packed<float>> * kThreads * Packed<float>::kGroup == kSumChunk, "a sample must fit");
static_assert(kRounds<Mixed> * kThreads * Mixed::kGroup == kSumChunk, "a sample must fit");
static_assert(kRounds<Packed<double>> * kThreads * Packed<double>::kGroup * 2 == kSumChunk, "a sample must fit");

template <class Memory, bool Denoises>
__global__ void __launch_bounds__(kThreads, 2)
    resident_kernel(const __grid_constant__ PseudoHuber p, const __grid_constant__ Results to, bool aligned) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  const bool elementwise = p.distance == Distance::elementwise;
  for (int64_t sample = blockIdx.x; sample < p.layout.batch; sample += gridDim.x) {
    const Preconditioning<C> weights = denoising_weights<C>(p, sample);
    const auto begin_of = [](int round) { return (static_cast<int64_t>(round) * blockDim.x + threadIdx.x) * G; };
    C r[kRounds<Memory>][G] = {};
    BICM_UNROLL(8)
    for (int round = 0; round < kRounds<Memory>; ++round) {
      const int64_t begin = begin_of(round);
      if (begin >= p.layout.elements) continue;
      residual<Memory, Denoises>(p, weights, Memory::at(p.layout, sample, begin, aligned), r[round]);
    }
    const double total = chunk_total<C>(p, sample, [&](C c, C scale) {
      Sum<C> sum = {};
      BICM_UNROLL(8)
      for (int round = 0; round < kRounds<Memory>; ++round) {
        const int64_t begin = begin_of(round);
        if (begin >= p.layout.elements) continue;
        C terms[G];
        BICM_UNROLL(8)
        for (int i = 0; i < G; ++i) terms[i] = r[round][i];
        sum = add(sum, {sum_of_terms<G>(terms, p.layout.elements - begin, elementwise, c, scale), C(0)});
      }
      return sum;
    });
    const Factors<C> f = factors_of<C>(p, sample, total);
    BICM_UNROLL(8)
    for (int round = 0; round < kRounds<Memory>; ++round) {
      const int64_t begin = begin_of(round);
      if (begin >= p.layout.elements) continue;
      store_gradients<Memory, Denoises>(p, f, Memory::at(p.layout, sample, begin, aligned), r[round]);
    }
    if (threadIdx.x == 0) finish_chunk(p, to, sample, sample, total);
  }
  if (to.finished != nullptr && finishes_last(to.finished)) finish_batch(p, to);
}

template <class Memory, bool Denoises>
cudaError_t run_resident(const PseudoHuber& p, const Results& to, bool aligned, cudaStream_t stream) {
  Grid grid;
  const cudaError_t error = plan_blocks(p.layout.batch, grid);
  if (error != cudaSuccess) return error;
  grid.threads = threads_of_chunk<Memory>(p.layout);
  grid.synchronises = true;
  return launch(resident_kernel<Memory, Denoises>, grid, stream, p, to, aligned);
}

}  // namespace cuda
}  // namespace bicm
