// Sampler updates: every thread reads its group of every input, folds, rounds once and stores.
#include "../core/multistep.h"

#include "draw.h"
#include "kernels.h"
#include "strided.h"

namespace bicm {
namespace cuda {
namespace {

// Values shared by the elements of a sample.
template <class C>
struct Weights {
  C weight[kMaxTerms], x0_coefficient[kMaxTerms];
  C guidance_scale, noise_weight, x0_weight, clip, next_scale;
};

template <class C, bool Denoises>
BICM_DEVICE Weights<C> weights_of(const Multistep& m, int64_t sample) {
  Weights<C> w = {};
  form_weights(m, sample, w.weight);
  if (m.guided) w.guidance_scale = load_number<C>(m.guidance_scale, sample);
  if (m.draws) w.noise_weight = load_number<C>(m.noise_weight, sample);
  if constexpr (Denoises) {
    BICM_UNROLL(8)
    for (int k = 0; k < kMaxTerms; ++k) {
      if (k < m.terms) w.x0_coefficient[k] = load_number<C>(m.x0_coefficient[k], sample);
    }
    w.x0_weight = load_number<C>(m.x0_weight, sample);
    if (m.clips) w.clip = load_number<C>(m.clip, sample);
  }
  if (m.scales) w.next_scale = bicm::next_scale<C>(m, sample);
  return w;
}

// A step of a left fold: y = weight x for the first term, y + weight x for the others.
template <int G, class C>
BICM_DEVICE void fold(bool first, C weight, const C* x, C* y) {
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) {
    const C product = weight * x[i];
    y[i] = first ? product : y[i] + product;
  }
}

template <int G, class C>
BICM_DEVICE void add_noise(const SampleKey& key, int64_t begin, C weight, C* y) {
  float drawn[G];
  draw<Distribution::normal, G>(key, begin, drawn);
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) y[i] = y[i] + weight * static_cast<C>(drawn[i]);
}

template <int G, class C>
BICM_DEVICE void add_denoised(const Multistep& m, const Weights<C>& w, C* x0, C* y) {
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) {
    if (m.clips) x0[i] = clip_to(x0[i], w.clip);
    y[i] = y[i] + w.x0_weight * x0[i];
  }
}

// All inputs are loaded before the first is used. With Terms = 0 the number of terms is a run-time value; loops over
// terms have a constant end all the same, so that no register is indexed.
template <class Memory, int Terms, bool Denoises>
BICM_DEVICE void step_group(const Multistep& m, const Weights<typename Memory::Compute>& w, const SampleKey& key,
                            const typename Memory::Place& place) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup, kSlots = Terms == 0 ? kMaxTerms : Terms;
  const int terms = Terms == 0 ? m.terms : Terms;

  typename Memory::Raw input[kSlots] = {}, conditional = {};
  BICM_UNROLL(8)
  for (int k = 0; k < kSlots; ++k) {
    if (k < terms) input[k] = Memory::load(m.layout, m.input[k], place);
  }
  if (m.guided) conditional = Memory::load(m.layout, m.conditional, place);

  C x0[G] = {}, y[G] = {};
  BICM_UNROLL(8)
  for (int k = 0; k < kSlots; ++k) {
    if (k >= terms) continue;
    C x[G];
    Memory::widen(m.input[k], input[k], x);
    if (m.guided && k == terms - 1) {
      C partner[G];
      Memory::widen(m.conditional, conditional, partner);
      BICM_UNROLL(8)
      for (int i = 0; i < G; ++i) x[i] = guide(x[i], partner[i], w.guidance_scale);
    }
    if (Denoises) fold<G>(k == 0, w.x0_coefficient[k], x, x0);
    fold<G>(k == 0, w.weight[k], x, y);
  }
  if (Denoises) add_denoised<G>(m, w, x0, y);
  if (w.noise_weight != C(0)) add_noise<G>(key, place.begin, w.noise_weight, y);

  if (Denoises) Memory::store(m.layout, m.x0, place, x0);
  Memory::store(m.layout, m.out, place, y);
  if (m.scales) {
    BICM_UNROLL(8)
    for (int i = 0; i < G; ++i) y[i] = w.next_scale * y[i];
    Memory::store(m.layout, m.next, place, y);
  }
}

// Minimum blocks per multiprocessor: as many as leave each thread enough registers.
template <class Memory, bool Denoises>
constexpr int kResident = Denoises || sizeof(typename Memory::Compute) == 8 ? 2 : 3;

template <class Memory, int Terms, bool Denoises>
__global__ void __launch_bounds__(kThreads, kResident<Memory, Denoises>)
    multistep_kernel(const __grid_constant__ Multistep m, bool aligned) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  for (int64_t sample = blockIdx.y; sample < m.layout.batch; sample += gridDim.y) {
    const Weights<C> w = weights_of<C, Denoises>(m, sample);
    SampleKey key = {};
    if (w.noise_weight != C(0)) key = sample_key(m.key, sample);
    for (int64_t begin = first_group() * G; begin < m.layout.elements; begin += group_stride() * G) {
      step_group<Memory, Terms, Denoises>(m, w, key, Memory::at(m.layout, sample, begin, aligned));
    }
  }
}

template <class Memory, int Terms, bool Denoises>
cudaError_t run_kernel(const Multistep& m, bool aligned, cudaStream_t stream) {
  Grid grid;
  const cudaError_t error = plan(m.layout, Memory::kGroup, grid);
  return error != cudaSuccess ? error : launch(multistep_kernel<Memory, Terms, Denoises>, grid, stream, m, aligned);
}

template <class Memory, int Terms>
cudaError_t run(const Multistep& m, bool aligned, cudaStream_t stream) {
  return (m.denoises ? run_kernel<Memory, Terms, true> : run_kernel<Memory, Terms, false>)(m, aligned, stream);
}

// Dense memory has a kernel for every number of terms, so that none reserves registers for absent terms.
template <class Memory>
cudaError_t run_dense(const Multistep& m, bool aligned, cudaStream_t stream) {
  switch (m.terms) {
    case 1: return run<Memory, 1>(m, aligned, stream);
    case 2: return run<Memory, 2>(m, aligned, stream);
    case 3: return run<Memory, 3>(m, aligned, stream);
    case 4: return run<Memory, 4>(m, aligned, stream);
    default: return run<Memory, 5>(m, aligned, stream);
  }
}

template <class Visit>
void for_operands(const Multistep& m, Visit visit) {
  for (int k = 0; k < m.terms; ++k) visit(m.input[k]);
  if (m.guided) visit(m.conditional);
  visit(m.out);
  if (m.denoises) visit(m.x0);
  if (m.scales) visit(m.next);
}

}  // namespace

cudaError_t multistep(const Multistep& m, cudaStream_t stream) {
  if (m.layout.batch == 0 || m.layout.elements == 0) return cudaSuccess;
  bool dense = true, uniform = true, aligned = true, any_float64 = false;
  for_operands(m, [&](const Operand& x) {
    dense = dense && x.dense;
    uniform = uniform && x.dtype == m.out.dtype;
    aligned = aligned && access_aligned(m.layout, x);
    any_float64 = any_float64 || x.dtype == DType::float64;
  });
  const bool packed = dense && m.float64 == any_float64 && (uniform || !any_float64);
  if (!packed) return (m.float64 ? run<Strided<double>, 0> : run<Strided<float>, 0>)(m, false, stream);
  if (!uniform) return run_dense<Mixed>(m, aligned, stream);
  switch (m.out.dtype) {
    case DType::float16: return run_dense<Packed<Half>>(m, aligned, stream);
    case DType::bfloat16: return run_dense<Packed<BFloat16>>(m, aligned, stream);
    case DType::float32: return run_dense<Packed<float>>(m, aligned, stream);
    default: return run_dense<Packed<double>>(m, aligned, stream);
  }
}

}  // namespace cuda
}  // namespace bicm
