// The gradients of a loss from its residuals, and the factors that the elements of a sample share.
#pragma once

#include "../core/pseudo_huber.h"

#include "pseudo_huber_residual.h"

namespace bicm {
namespace cuda {

// Values shared by the elements of a sample in its derivative.
template <class C>
struct Factors {
  Preconditioning<C> weights;
  C c, power, factor[kLossInputs];
  bool anywhere;  // elementwise: the plain formula is not accurate
};

// One thread needs the sum; it computes in double precision what the others use in C.
template <class C>
BICM_DEVICE Factors<C> factors_of(const PseudoHuber& p, int64_t sample, double sum) {
  BICM_SHARED(double, shared, 3);
  BICM_SHARED(bool, anywhere, 1);
  Factors<C> f;
  f.weights = denoising_weights<C>(p, sample);
  if (threadIdx.x == 0) {
    const Slope slope = slope_of(p, sample, sum, f.weights);
    const double c = transition_of(p, sample);
    shared[0] = slope.factor;
    shared[1] = c;
    shared[2] = slope.power;
    anywhere[0] = p.distance == Distance::elementwise && !plain_slopes(sum, static_cast<C>(c));
  }
  __syncthreads();
  const double factor = shared[0];
  f.c = static_cast<C>(shared[1]);
  f.power = static_cast<C>(shared[2]);
  f.anywhere = anywhere[0];
  f.factor[0] = static_cast<C>(factor * static_cast<double>(f.weights.c_out));
  f.factor[1] = static_cast<C>(-factor);
  f.factor[2] = static_cast<C>(factor * static_cast<double>(f.weights.c_skip));
  __syncthreads();  // the next sample's factor is written there
  return f;
}

// From a group's residuals times the power, or from slopes of elementwise distances.
template <class Memory, bool Denoises, class C, class To>
BICM_DEVICE void store_scaled(const PseudoHuber& p, const Factors<C>& f, const To* to,
                              const typename Memory::Place& place, C* r) {
  constexpr int G = Memory::kGroup;
  BICM_UNROLL(3)
  for (int k = 0; k < (Denoises ? 3 : 2); ++k) {
    if (!p.wanted[k]) continue;
    C gradient[G];
    BICM_UNROLL(8)
    for (int i = 0; i < G; ++i) gradient[i] = f.factor[k] * r[i];
    Memory::store(p.layout, to[k], place, gradient);
  }
}

// From the residuals of a group.
template <class Memory, bool Denoises, class C, class To>
BICM_DEVICE void store_gradients(const PseudoHuber& p, const Factors<C>& f, const To* to,
                                 const typename Memory::Place& place, C* r) {
  constexpr int G = Memory::kGroup;
  if (p.distance == Distance::elementwise) {
    BICM_UNROLL(8)
    for (int i = 0; i < G; ++i) r[i] = r[i] / nonzero(root(r[i] * r[i] + f.c * f.c));
  } else {
    BICM_UNROLL(8)
    for (int i = 0; i < G; ++i) r[i] = r[i] * f.power;
  }
  store_scaled<Memory, Denoises>(p, f, to, place, r);
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
    C r[G];
    residual<Memory, Denoises>(p, f.weights, place, r);
    BICM_UNROLL(8)
    for (int i = 0; i < G; ++i) r[i] = slope_anywhere(r[i], f.c);
    store_scaled<Memory, Denoises>(p, f, p.gradient, place, r);
  }
}

// Launches a kernel over a batch's elements.
template <class Memory>
cudaError_t run_elements(void (*kernel)(const PseudoHuber, bool), const PseudoHuber& p, bool aligned,
                         cudaStream_t stream) {
  Grid grid;
  const cudaError_t error = plan(p.layout, Memory::kGroup, kernel, grid);
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
