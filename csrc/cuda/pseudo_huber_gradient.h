// The gradients of a loss from its residuals, and the factors that the elements of a sample share.
#pragma once

#include "../core/pseudo_huber.h"

#include "pseudo_huber_residual.h"
#include "rounds.h"

namespace bicm {
namespace cuda {

// Values shared by the elements of a sample in its derivative.
template <class C>
struct Factors {
  Preconditioning<C> weights;
  C c, power, factor[kLossInputs];
  bool anywhere;  // elementwise: the plain formula is not accurate
};

// One thread needs the sum; it computes in double precision what all use in C.
template <class C>
BICM_DEVICE Factors<C> factors_of(const PseudoHuber& p, int64_t sample, double sum) {
  BICM_SHARED(C, shared, kLossInputs + 2);
  BICM_SHARED(bool, anywhere, 1);
  Factors<C> f;
  f.weights = denoising_weights<C>(p, sample);
  if (threadIdx.x == 0) {
    const Slope slope = slope_of(p, sample, sum, f.weights);
    shared[0] = static_cast<C>(slope.factor * static_cast<double>(f.weights.c_out));
    shared[1] = static_cast<C>(-slope.factor);
    shared[2] = static_cast<C>(slope.factor * static_cast<double>(f.weights.c_skip));
    const C c = static_cast<C>(transition_of(p, sample));
    shared[3] = c;
    shared[4] = static_cast<C>(slope.power);
    anywhere[0] = p.distance == Distance::elementwise && !plain_slopes(sum, c);
  }
  __syncthreads();
  BICM_UNROLL(3)
  for (int k = 0; k < kLossInputs; ++k) f.factor[k] = shared[k];
  f.c = shared[3];
  f.power = shared[4];
  f.anywhere = anywhere[0];
  __syncthreads();  // the next sample's factor is written there
  return f;
}

// The groups of a round: from residuals times the power, or from slopes of elementwise distances.
template <class Memory, bool Denoises, int Groups, class C, class To, class Place>
BICM_DEVICE void store_scaled(const PseudoHuber& p, const Factors<C>& f, const To* to, const Place& place,
                              C (*r)[Memory::kGroup]) {
  constexpr int G = Memory::kGroup;
  BICM_UNROLL(3)
  for (int k = 0; k < (Denoises ? 3 : 2); ++k) {
    if (!p.wanted[k]) continue;
    BICM_UNROLL(8)
    for (int j = 0; j < Groups; ++j) {
      C gradient[G];
      BICM_UNROLL(8)
      for (int i = 0; i < G; ++i) gradient[i] = f.factor[k] * r[j][i];
      Memory::store(p.layout, to[k], in_round(place, j), gradient);
    }
  }
}

// The groups of a round from their residuals; of elementwise distances a round has one group.
template <class Memory, bool Denoises, int Groups, class C, class To, class Place>
BICM_DEVICE void store_gradients(const PseudoHuber& p, const Factors<C>& f, const To* to, const Place& place,
                                 C (*r)[Memory::kGroup]) {
  constexpr int G = Memory::kGroup;
  BICM_UNROLL(8)
  for (int j = 0; j < Groups; ++j) {
    if (Groups == 1 && p.distance == Distance::elementwise) {
      BICM_UNROLL(8)
      for (int i = 0; i < G; ++i) r[j][i] = r[j][i] / nonzero(root(r[j][i] * r[j][i] + f.c * f.c));
    } else {
      BICM_UNROLL(8)
      for (int i = 0; i < G; ++i) r[j][i] = r[j][i] * f.power;
    }
  }
  store_scaled<Memory, Denoises, Groups>(p, f, to, place, r);
}

// The same where the plain formula is not accurate, for the elements of a sample that a thread processes from `begin`
// on.
template <class Memory, bool Denoises, class C>
BICM_DEVICE void store_gradients_anywhere(const PseudoHuber& p, const Factors<C>& f, int64_t sample, int64_t begin,
                                          int64_t last, int64_t stride, bool aligned) {
  constexpr int G = Memory::kGroup;
  BICM_LOOP
  for (; begin < last; begin += stride) {
    const typename Memory::Place place = Memory::at(p.layout, sample, begin, aligned);
    C r[1][G];
    residual<Memory, Denoises>(p, f.weights, place, r[0]);
    BICM_UNROLL(8)
    for (int i = 0; i < G; ++i) r[0][i] = slope_anywhere(r[0][i], f.c);
    store_scaled<Memory, Denoises, 1>(p, f, p.gradient, place, r);
  }
}

// Launches a kernel over a batch's elements.
template <class Memory>
cudaError_t run_elements(void (*kernel)(const PseudoHuber, bool), const PseudoHuber& p, bool aligned,
                         cudaStream_t stream, int groups_of_round = 1) {
  Grid grid;
  const cudaError_t error = plan(p.layout, Memory::kGroup, kernel, grid, groups_of_round);
  if (error != cudaSuccess) return error;
  grid.synchronises = true;
  return launch(kernel, grid, stream, p, aligned);
}

// Gradients that were formed for an upstream of 1; those of a sample whose upstream is 1 are not touched.
template <class Memory>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ KeptGradient p, bool aligned) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  for (int64_t sample = blockIdx.y; sample < p.layout.batch; sample += gridDim.y) {
    const C factor = load_number<C>(p.upstream, sample);
    if (factor == C(1)) continue;
    for (int64_t begin = first_group() * G; begin < p.layout.elements; begin += group_stride() * G) {
      const typename Memory::Place place = Memory::at(p.layout, sample, begin, aligned);
      C x[G];
      Memory::widen(p.gradient, Memory::load(p.layout, p.gradient, place), x);
      BICM_UNROLL(8)
      for (int i = 0; i < G; ++i) x[i] = factor * x[i];
      Memory::store(p.layout, p.gradient, place, x);
    }
  }
}

template <class Memory>
cudaError_t run_scale(const KeptGradient& p, cudaStream_t stream) {
  Grid grid;
  const cudaError_t error = plan(p.layout, Memory::kGroup, scale_kernel<Memory>, grid);
  if (error != cudaSuccess) return error;
  return launch(scale_kernel<Memory>, grid, stream, p, access_aligned(p.layout, p.gradient));
}

}  // namespace cuda
}  // namespace bicm
