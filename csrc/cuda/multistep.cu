// Sampler updates: a thread reads a group of every input, folds, rounds once and stores.
#include "../core/multistep.h"

#include "../core/noise.h"
#include "kernels.h"
#include "strided.h"

namespace bicm {
namespace cuda {
namespace {

// Every loop over terms runs to kMaxTerms, so that registers are never indexed at run time.

template <class Access>
BICM_DEVICE void load_inputs(const Multistep& m, const typename Access::Place& place, typename Access::Raw* input,
                             typename Access::Raw& conditional) {
  for (int k = 0; k < kMaxTerms; ++k) {
    if (k < m.terms) input[k] = Access::load(m.layout, m.input[k], place);
  }
  if (m.guided) conditional = Access::load(m.layout, m.conditional, place);
}

// y += weight x, or y = weight x for the first term.
template <int G, class C>
BICM_DEVICE void accumulate(bool first, C weight, const C* x, C* y) {
  for (int i = 0; i < G; ++i) {
    const C product = weight * x[i];
    y[i] = first ? product : y[i] + product;
  }
}

template <int G, class C>
BICM_DEVICE void add_noise(const SampleKey& key, int64_t begin, C weight, C* y) {
  for (int i = 0; i < G; i += 4) {
    float drawn[4];
    normals_from_bits<float>(random_quad(key, (begin + i) / 4), drawn);
    for (int lane = 0; lane < 4; ++lane) y[i + lane] = y[i + lane] + weight * static_cast<C>(drawn[lane]);
  }
}

template <class Access, bool Denoises>
__global__ void __launch_bounds__(kThreads) multistep_kernel(const __grid_constant__ Multistep m, bool aligned) {
  using C = typename Access::Compute;
  constexpr int G = Access::kGroup;
  for (int64_t sample = blockIdx.y; sample < m.layout.batch; sample += gridDim.y) {
    C weight[kMaxTerms], x0_coefficient[kMaxTerms];
    form_weights(m, sample, weight);
    for (int k = 0; k < kMaxTerms; ++k) {
      x0_coefficient[k] = Denoises && k < m.terms ? load_number<C>(m.x0_coefficient[k], sample) : C(0);
    }
    const C guidance_scale = m.guided ? load_number<C>(m.guidance_scale, sample) : C(0);
    const C x0_weight = Denoises ? load_number<C>(m.x0_weight, sample) : C(0);
    const C bound = Denoises && m.clips ? load_number<C>(m.clip, sample) : C(0);
    const C next_scale = Denoises && m.scales ? load_number<C>(m.next_scale, sample) : C(0);
    const C noise_weight = m.draws ? load_number<C>(m.noise_weight, sample) : C(0);
    SampleKey key = {};
    if (noise_weight != C(0)) key = sample_key(m.key, sample);

    for (int64_t begin = first_group() * G; begin < m.layout.elements; begin += group_stride() * G) {
      const typename Access::Place place = Access::at(m.layout, sample, begin, aligned);
      typename Access::Raw input[kMaxTerms], conditional;
      load_inputs<Access>(m, place, input, conditional);

      C x0[G], y[G];
      for (int k = 0; k < kMaxTerms; ++k) {
        if (k >= m.terms) continue;
        C x[G];
        Access::widen(m.input[k], input[k], x);
        if (m.guided && k == m.terms - 1) {
          C partner[G];
          Access::widen(m.conditional, conditional, partner);
          for (int i = 0; i < G; ++i) x[i] = guide(x[i], partner[i], guidance_scale);
        }
        if (Denoises) accumulate<G>(k == 0, x0_coefficient[k], x, x0);
        accumulate<G>(k == 0, weight[k], x, y);
      }
      if (Denoises) {
        for (int i = 0; i < G; ++i) {
          if (m.clips) x0[i] = clip_to(x0[i], bound);
          y[i] = y[i] + x0_weight * x0[i];
        }
      }
      if (noise_weight != C(0)) add_noise<G>(key, begin, noise_weight, y);
      if (Denoises) Access::store(m.layout, m.x0, place, x0);
      Access::store(m.layout, m.out, place, y);
      if (Denoises && m.scales) {
        for (int i = 0; i < G; ++i) y[i] = next_scale * y[i];
        Access::store(m.layout, m.next, place, y);
      }
    }
  }
}

template <class Visit>
void for_operands(const Multistep& m, Visit visit) {
  for (int k = 0; k < m.terms; ++k) visit(m.input[k]);
  if (m.guided) visit(m.conditional);
  visit(m.out);
  if (m.denoises) visit(m.x0);
  if (m.denoises && m.scales) visit(m.next);
}

template <class Access>
cudaError_t run(const Multistep& m, bool aligned, cudaStream_t stream) {
  Grid grid;
  const cudaError_t error = plan(m.layout, Access::kGroup, grid);
  if (error != cudaSuccess) return error;
  return launch(m.denoises ? multistep_kernel<Access, true> : multistep_kernel<Access, false>, grid, stream, m, aligned);
}

}  // namespace

cudaError_t multistep(const Multistep& m, cudaStream_t stream) {
  if (m.layout.batch == 0 || m.layout.elements == 0) return cudaSuccess;
  bool dense = true, uniform = true, any64 = false, aligned = true;
  const DType dtype = m.out.dtype;
  for_operands(m, [&](const Operand& x) {
    dense = dense && x.dense;
    uniform = uniform && x.dtype == dtype;
    any64 = any64 || x.dtype == DType::float64;
    aligned = aligned && access_aligned(m.layout, x);
  });
  if (!dense || any64 != m.float64 || (any64 && !uniform)) {
    return m.float64 ? run<Strided<double>>(m, aligned, stream) : run<Strided<float>>(m, aligned, stream);
  }
  if (!uniform) return run<Mixed>(m, aligned, stream);
  switch (dtype) {
    case DType::float16: return run<Packed<Half>>(m, aligned, stream);
    case DType::bfloat16: return run<Packed<BFloat16>>(m, aligned, stream);
    case DType::float32: return run<Packed<float>>(m, aligned, stream);
    default: return run<Packed<double>>(m, aligned, stream);
  }
}

}  // namespace cuda
}  // namespace bicm
