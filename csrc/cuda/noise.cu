// The keyed noise itself: every thread draws its group and stores it once.
#include "draw.h"
#include "kernels.h"
#include "strided.h"

namespace bicm {
namespace cuda {
namespace {

template <class Memory, Distribution D>
__global__ void __launch_bounds__(kThreads) noise_kernel(const __grid_constant__ Noise problem, bool aligned) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  const Layout& layout = problem.layout;
  for (int64_t sample = blockIdx.y; sample < layout.batch; sample += gridDim.y) {
    const KeyOfSample<RoundKeys> key = with_round_keys(sample_key(problem.key, sample));
    for (int64_t begin = first_group() * G; begin < layout.elements; begin += group_stride() * G) {
      float drawn[G];
      draw<D, G>(key, begin, drawn);
      C values[G];
      BICM_UNROLL(8)
      for (int i = 0; i < G; ++i) values[i] = static_cast<C>(drawn[i]);
      Memory::store(layout, problem.out, Memory::at(layout, sample, begin, aligned), values);
    }
  }
}

template <class Memory>
cudaError_t run(const Noise& problem, cudaStream_t stream) {
  Grid grid;
  const cudaError_t error = plan(problem.layout, Memory::kGroup, grid);
  if (error != cudaSuccess) return error;
  const bool aligned = access_aligned(problem.layout, problem.out);
  const bool normal = problem.distribution == Distribution::normal;
  return launch(normal ? noise_kernel<Memory, Distribution::normal> : noise_kernel<Memory, Distribution::uniform>, grid,
                stream, problem, aligned);
}

// y = scale (x + sigma n); a level of zero draws nothing.
template <int G, class C>
BICM_DEVICE void add_level(const C* x, const float* drawn, C sigma, C scale, C* y) {
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) y[i] = scale * at_level(x[i], sigma, drawn[i]);
}

template <class Memory>
__global__ void __launch_bounds__(kThreads, 2) noisy_pair_kernel(const __grid_constant__ NoisyPair p, bool aligned) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  for (int64_t sample = blockIdx.y; sample < p.layout.batch; sample += gridDim.y) {
    const SampleKey key = sample_key(p.key, sample);
    const C low = load_number<C>(p.sigma_low, sample), high = load_number<C>(p.sigma_high, sample);
    const C low_scale = pair_scale(p, sample, low), high_scale = pair_scale(p, sample, high);
    const bool generated = place_of(p, sample) >= 0;
    for (int64_t begin = first_group() * G; begin < p.layout.elements; begin += group_stride() * G) {
      const typename Memory::Place place = Memory::at(p.layout, sample, begin, aligned);
      const typename Memory::Raw raw =
          generated ? Memory::load(p.layout, p.x_hat, place) : Memory::load(p.layout, p.x, place);
      float drawn[G];
      draw<Distribution::normal, G>(key, begin, drawn);
      C x[G], y[G];
      Memory::widen(p.x, raw, x);
      add_level<G>(x, drawn, low, low_scale, y);
      Memory::store(p.layout, p.low, place, y);
      add_level<G>(x, drawn, high, high_scale, y);
      Memory::store(p.layout, p.high, place, y);
    }
  }
}

// The same with the network's prediction at the low level, where the mask is true.
template <class Memory>
__global__ void __launch_bounds__(kThreads, 2)
    generated_pair_kernel(const __grid_constant__ NoisyPair p, bool aligned) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  for (int64_t sample = blockIdx.y; sample < p.layout.batch; sample += gridDim.y) {
    const SampleKey key = sample_key(p.key, sample);
    const C low = load_number<C>(p.sigma_low, sample), high = load_number<C>(p.sigma_high, sample);
    const C low_scale = pair_scale(p, sample, low), high_scale = pair_scale(p, sample, high);
    const int64_t of_network = place_of(p, sample);
    const bool generated = of_network >= 0;
    const Preconditioning<C> weights = pair_weights(p, sample, low);
    for (int64_t begin = first_group() * G; begin < p.layout.elements; begin += group_stride() * G) {
      const typename Memory::Place place = Memory::at(p.layout, sample, begin, aligned);
      const typename Memory::Raw raw = Memory::load(p.layout, p.x, place);
      typename Memory::Raw network = {};
      if (generated) network = Memory::load(p.layout, p.x_hat, Memory::at(p.layout, of_network, begin, aligned));
      float drawn[G];
      draw<Distribution::normal, G>(key, begin, drawn);
      C x[G], y[G];
      Memory::widen(p.x, raw, x);
      if (generated) {
        Memory::widen(p.x_hat, network, y);
        BICM_UNROLL(8)
        for (int i = 0; i < G; ++i) x[i] = weights.c_skip * at_level(x[i], low, drawn[i]) + weights.c_out * y[i];
      }
      add_level<G>(x, drawn, low, low_scale, y);
      Memory::store(p.layout, p.low, place, y);
      add_level<G>(x, drawn, high, high_scale, y);
      Memory::store(p.layout, p.high, place, y);
    }
  }
}

template <class Memory>
cudaError_t run_pair(const NoisyPair& p, bool aligned, cudaStream_t stream) {
  Grid grid;
  const cudaError_t error = plan(p.layout, Memory::kGroup, grid);
  if (error != cudaSuccess) return error;
  return launch(p.generates ? generated_pair_kernel<Memory> : noisy_pair_kernel<Memory>, grid, stream, p, aligned);
}

__global__ void __launch_bounds__(kThreads)
    fold_in_kernel(const __grid_constant__ Integer seed, const __grid_constant__ Integer data, int64_t* out,
                   int64_t count) {
  for (int64_t i = first_group(); i < count; i += group_stride()) {
    store_at(out + i, bicm::fold_in(load_integer(seed, i), load_integer(data, i)));
  }
}

}  // namespace

cudaError_t noise(const Noise& problem, cudaStream_t stream) {
  if (problem.layout.batch == 0 || problem.layout.elements == 0) return cudaSuccess;
  if (!problem.out.dense) return run<Strided<float>>(problem, stream);
  switch (problem.out.dtype) {
    case DType::float16: return run<Packed<Half>>(problem, stream);
    case DType::bfloat16: return run<Packed<BFloat16>>(problem, stream);
    case DType::float32: return run<Packed<float>>(problem, stream);
    default: return run<Packed<double>>(problem, stream);
  }
}

cudaError_t noisy_pair(const NoisyPair& p, cudaStream_t stream) {
  if (p.layout.batch == 0 || p.layout.elements == 0) return cudaSuccess;
  bool dense = true, aligned = true;
  const Operand* const operands[] = {&p.x, &p.x_hat, &p.low, &p.high};
  Layout samples = p.layout;
  if (p.places != nullptr && samples.batch == 1) samples.batch = 2;  // x_hat may have more
  for (const Operand* x : operands) {
    dense = dense && x->dense;
    aligned = aligned && access_aligned(samples, *x);
  }
  const bool uniform = p.x_hat.dtype == p.x.dtype;
  const bool mixed = dense && !uniform && !p.float64 && p.x_hat.dtype != DType::float64;
  if (mixed) return run_pair<Mixed>(p, aligned, stream);
  if (!dense || !uniform) return (p.float64 ? run_pair<Strided<double>> : run_pair<Strided<float>>)(p, false, stream);
  switch (p.x.dtype) {
    case DType::float16: return run_pair<Packed<Half>>(p, aligned, stream);
    case DType::bfloat16: return run_pair<Packed<BFloat16>>(p, aligned, stream);
    case DType::float32: return run_pair<Packed<float>>(p, aligned, stream);
    default: return run_pair<Packed<double>>(p, aligned, stream);
  }
}

cudaError_t fold_in(const Integer& seed, const Integer& data, int64_t* out, int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  Layout layout = {};
  layout.batch = 1;
  layout.elements = count;
  Grid grid;
  const cudaError_t error = plan(layout, 1, grid);
  return error != cudaSuccess ? error : launch(fold_in_kernel, grid, stream, seed, data, out, count);
}

}  // namespace cuda
}  // namespace bicm
