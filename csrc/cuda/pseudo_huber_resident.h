// A loss and its gradients in one launch: a block, or a cluster of blocks, keeps the residuals of a whole sample in its
// registers while it sums them. The sum is that of pseudo_huber.cu, in the same order.
#pragma once

#include "cluster.h"
#include "pseudo_huber_gradient.h"
#include "pseudo_huber_residual.h"
#include "pseudo_huber_sample.h"

namespace bicm {
namespace cuda {

// A thread's groups of a sample, at most: 32 registers of residuals.
template <class Memory>
constexpr int kRounds = 32 / (Memory::kGroup * static_cast<int>(sizeof(typename Memory::Compute) / 4));

// A block holds a chunk of float32, or half of one of float64.
inline int64_t resident_elements(bool float64) { return float64 ? kSumChunk / 2 : kSumChunk; }

static_assert(kRounds<Packed<float>> * kThreads * Packed<float>::kGroup == kSumChunk, "a chunk must fit");
static_assert(kRounds<Mixed> * kThreads * Mixed::kGroup == kSumChunk, "a chunk must fit");
static_assert(kRounds<Packed<double>> * kThreads * Packed<double>::kGroup * 2 == kSumChunk, "a chunk must fit");

// Kept gradients have the compute type, for every dtype of the inputs.
template <class Memory>
struct Unrounded : Memory {
  template <class Place, class C>
  BICM_DEVICE static void store(const Layout&, const Operand& x, const Place& place, const C* values) {
#if defined(__CUDA_ARCH__)
    // Forces one instruction: the compiler splits vector stores next to stores of single elements.
    if (place.whole) {
      using Vector = std::conditional_t<sizeof(C) == 8, double2, float4>;
      constexpr int kWidth = sizeof(Vector) / sizeof(C);
      Vector* to = reinterpret_cast<Vector*>(dense_address<C>(x, place));
      BICM_UNROLL(2)
      for (int i = 0; i < Memory::kGroup / kWidth; ++i) {
        const C* from = values + i * kWidth;
        if constexpr (sizeof(C) == 8) {
          __stwb(to + i, make_double2(from[0], from[1]));
        } else {
          __stwb(to + i, make_float4(from[0], from[1], from[2], from[3]));
        }
      }
      return;
    }
#endif
    store_dense<C, Memory::kGroup>(x, place, values);
  }
};

// The residuals of a whole, aligned chunk: all its loads are in flight before the first is used, or half of those of
// three inputs, which registers hold.
template <class Memory, bool Denoises>
BICM_DEVICE void residuals_of_whole(const PseudoHuber& p, const Preconditioning<typename Memory::Compute>& weights,
                                    int64_t sample, int64_t first, typename Memory::Compute (*r)[Memory::kGroup]) {
  constexpr int kBatch = Denoises ? kRounds<Memory> / 2 : kRounds<Memory>;
  BICM_UNROLL(2)
  for (int batch = 0; batch < kRounds<Memory>; batch += kBatch) {
    Inputs<Memory> in[kBatch];
    BICM_UNROLL(8)
    for (int i = 0; i < kBatch; ++i) {
      const int64_t begin = first + ((batch + i) * kThreads + static_cast<int>(threadIdx.x)) * Memory::kGroup;
      const typename Memory::Place place = {sample, begin, Memory::kGroup, true};
      in[i] = load_inputs<Memory, Denoises>(p.layout, p, place);
    }
    BICM_UNROLL(8)
    for (int i = 0; i < kBatch; ++i) residual_of<Memory, Denoises>(p, weights, in[i], r[batch + i]);
  }
}

// A chunk of a sample: its sum, and its gradients once `sum_of_sample` returns the sample's sum.
template <class Memory, bool Denoises, class SumOfSample>
BICM_DEVICE void differentiate_chunk(const PseudoHuber& p, const Results& to, int64_t sample, int64_t chunk,
                                     bool aligned, SumOfSample sum_of_sample) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  const bool elementwise = p.distance == Distance::elementwise;
  const Preconditioning<C> weights = denoising_weights<C>(p, sample);
  const int64_t first = chunk * kSumChunk, left = p.layout.elements - first;
  const int count = static_cast<int>(left < kSumChunk ? left : kSumChunk);
  const auto place_of = [](int round) { return static_cast<int>(round * blockDim.x + threadIdx.x) * G; };
  C r[kRounds<Memory>][G] = {};
  if (aligned && count == kRounds<Memory> * kThreads * G) {
    residuals_of_whole<Memory, Denoises>(p, weights, sample, first, r);
  } else {
    BICM_UNROLL(8)
    for (int round = 0; round < kRounds<Memory>; ++round) {
      const int place = place_of(round);
      if (place >= count) continue;
      residual<Memory, Denoises>(p, weights, Memory::at(p.layout, sample, first + place, aligned), r[round]);
    }
  }
  const double total = chunk_total<C>(p, sample, [&](C c, C scale) {
    if (elementwise && scale != C(1)) {
      return sum_anywhere<Memory, Denoises>(p, weights, sample, first, first + count, aligned, c, scale);
    }
    Sum<C> sum = {};
    BICM_UNROLL(8)
    for (int round = 0; round < kRounds<Memory>; ++round) {
      const int place = place_of(round);
      if (place >= count) continue;
      C terms[G];
      BICM_UNROLL(8)
      for (int i = 0; i < G; ++i) terms[i] = r[round][i];
      sum = add(sum, {sum_of_terms<G>(terms, count - place, elementwise, c, scale), C(0)});
    }
    return sum;
  });
  const Factors<C> f = factors_of<C>(p, sample, sum_of_sample(total));
  if (f.anywhere) {
    store_gradients_anywhere<Unrounded<Memory>, Denoises>(p, f, sample, first + place_of(0), first + count,
                                                          place_of(1) - place_of(0), aligned);
  } else {
    BICM_UNROLL(8)
    for (int round = 0; round < kRounds<Memory>; ++round) {
      const int place = place_of(round);
      if (place >= count) continue;
      store_gradients<Unrounded<Memory>, Denoises, 1>(p, f, p.gradient,
                                                      Memory::at(p.layout, sample, first + place, aligned), r + round);
    }
  }
  if (threadIdx.x == 0 && count > 0) finish_chunk<C>(p, to, sample, sample * to.chunks + chunk, total);
}

// Independent chunks: of a sample that has one, or of a distance whose gradient needs no sum.
template <class Memory, bool Denoises>
__global__ void __launch_bounds__(kThreads, 2)
    resident_kernel(const __grid_constant__ PseudoHuber p, const __grid_constant__ Results to, bool aligned) {
  for (int64_t item = blockIdx.x; item < p.layout.batch * to.chunks; item += gridDim.x) {
    differentiate_chunk<Memory, Denoises>(p, to, item / to.chunks, item % to.chunks, aligned,
                                          [](double total) { return total; });
  }
  if (to.finished != nullptr && finishes_last(to.finished)) finish_batch<typename Memory::Compute>(p, to);
}

// A sample of several chunks, one for each block of a cluster; blocks beyond them add 0.
template <class Memory, bool Denoises>
__global__ void __launch_bounds__(kThreads, 2)
    cluster_kernel(const __grid_constant__ PseudoHuber p, const __grid_constant__ Results to, bool aligned) {
#if defined(BICM_CLUSTERS)
  const unsigned blocks = __clusterSizeInBlocks();
  for (int64_t sample = blockIdx.x / blocks; sample < p.layout.batch; sample += gridDim.x / blocks) {
    differentiate_chunk<Memory, Denoises>(p, to, sample, __clusterRelativeBlockRank(), aligned, cluster_sum);
  }
  if (finishes_last(to.finished)) finish_batch<typename Memory::Compute>(p, to);
#else
  __trap();  // rather than an undefined result, if it is launched all the same
#endif
}

// The blocks that cooperate, from the sample's size: a cluster, or 0 where it does not fit.
inline unsigned blocks_of_sample(const PseudoHuber& p) {
  const bool alone = !gradient_needs_sum(p) && !p.float64;
  if (alone || p.layout.elements <= resident_elements(p.float64)) return 1;
  unsigned blocks = 2;
  while (blocks < chunks_of(p.layout)) blocks *= 2;
  return p.float64 || blocks > kMaxCluster ? 0 : blocks;
}

template <class Memory, bool Denoises>
cudaError_t run_resident(const PseudoHuber& p, const Results& to, bool aligned, cudaStream_t stream) {
  const unsigned blocks = blocks_of_sample(p);
  if (blocks == 1) return run_chunks<Memory>(resident_kernel<Memory, Denoises>, p, to, aligned, stream);
  // Half a chunk of float64 fits in a block: samples of several chunks are excluded.
  if constexpr (sizeof(typename Memory::Compute) == 8) {
    return cudaErrorInvalidConfiguration;
  } else {
    return run_chunks<Memory>(cluster_kernel<Memory, Denoises>, p, to, aligned, stream, blocks);
  }
}

}  // namespace cuda
}  // namespace bicm
