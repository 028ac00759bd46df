// The keyed noise itself: every thread draws its group and stores it once.
#include "draw.h"
#include "kernels.h"
#include "rounds.h"
#include "strided.h"

namespace bicm {
namespace cuda {
namespace {

template <class Memory, Distribution D>
__global__ void __launch_bounds__(kThreads) noise_kernel(const __grid_constant__ Noise problem, bool aligned) {
  using C = typename Memory::Compute;
  const Layout& layout = problem.layout;
  BlockKeys<RoundKeys> keys(problem.key);
  const Share<Memory> share = Share<Memory>(layout, aligned).kept();
  for (int64_t sample = blockIdx.y; sample < layout.batch; sample += gridDim.y) {
    keys.move_to(problem.key, sample, sample == blockIdx.y);
    const typename Memory::Row out = Memory::row(problem.out, sample);
    for_groups<Memory, kRestOfDrawn<Memory>>(layout, sample, share, [&](auto memory, const auto& place, auto) {
      constexpr int G = decltype(memory)::kGroup;
      float drawn[G];
      draw<D, G>(keys.key, place.begin, drawn);
      C values[G];
      BICM_UNROLL(8)
      for (int i = 0; i < G; ++i) values[i] = static_cast<C>(drawn[i]);
      memory.store(layout, out, place, values);
    });
  }
}

template <class Memory>
cudaError_t run(const Noise& problem, cudaStream_t stream) {
  Grid grid;
  const bool normal = problem.distribution == Distribution::normal;
  const auto kernel = normal ? noise_kernel<Memory, Distribution::normal> : noise_kernel<Memory, Distribution::uniform>;
  const cudaError_t error = plan(problem.layout, Memory::kGroup, kernel, grid);
  if (error != cudaSuccess) return error;
  return launch(kernel, grid, stream, problem, access_aligned(problem.layout, problem.out));
}

// y = scale (x + sigma n); a level of zero draws nothing.
template <int G, class C>
BICM_DEVICE void add_level(const C* x, const float* drawn, C sigma, C scale, C* y) {
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) y[i] = scale * at_level(x[i], sigma, drawn[i]);
}

// Minimum blocks per multiprocessor: as many as leave each thread enough registers.
template <class Memory>
constexpr int kPairsResident = Memory::kGroup == 1 || sizeof(typename Memory::Compute) == 8 ? 2
                               : Memory::kGroup > 4                                         ? 3
                                                                                            : 4;

// A sample's tensors and numbers.
template <class Memory>
struct Levels {
  using C = typename Memory::Compute;
  typename Memory::Row low_out, high_out;
  C low, high, low_scale, high_scale;
};

template <class Memory>
BICM_DEVICE Levels<Memory> levels_of(const NoisyPair& p, int64_t sample) {
  using C = typename Memory::Compute;
  Levels<Memory> l = {};
  l.low_out = Memory::row(p.low, sample);
  l.high_out = Memory::row(p.high, sample);
  l.low = load_number<C>(p.sigma_low, sample);
  l.high = load_number<C>(p.sigma_high, sample);
  l.low_scale = pair_scale(p, sample, l.low);
  l.high_scale = pair_scale(p, sample, l.high);
  return l;
}

template <class Memory, class Levels, class Place, class C>
BICM_DEVICE void store_levels(const NoisyPair& p, const Levels& l, const Place& place, const C* x, const float* drawn) {
  constexpr int G = Memory::kGroup;
  C y[G];
  add_level<G>(x, drawn, l.low, l.low_scale, y);
  Memory::store(p.layout, l.low_out, place, y);
  add_level<G>(x, drawn, l.high, l.high_scale, y);
  Memory::store(p.layout, l.high_out, place, y);
}

template <class Memory>
__global__ void __launch_bounds__(kThreads, kPairsResident<Memory>)
    noisy_pair_kernel(const __grid_constant__ NoisyPair p, bool aligned) {
  using C = typename Memory::Compute;
  BlockKeys<Key> keys(p.key);
  for (int64_t sample = blockIdx.y; sample < p.layout.batch; sample += gridDim.y) {
    keys.move_to(p.key, sample, sample == blockIdx.y);
    const Levels<Memory> levels = levels_of<Memory>(p, sample);
    const bool replaced = p.mask != nullptr && number_at<bool>(p.mask, sample * p.mask_stride);
    const typename Memory::Row in = Memory::row(replaced ? p.x_hat : p.x, sample);
    const Share<Memory> share(p.layout, aligned);
    for_groups<Memory, kRestOfDrawn<Memory>>(p.layout, sample, share, [&](auto memory, const auto& place, auto) {
      constexpr int G = decltype(memory)::kGroup;
      const auto raw = memory.load(p.layout, in, place);
      float drawn[G];
      draw<Distribution::normal, G>(keys.key, place.begin, drawn);
      C x[G];
      memory.widen(in, raw, x);
      store_levels<decltype(memory)>(p, levels, place, x, drawn);
    });
  }
}

// The same with the network's prediction at the low level, where the mask is true.
template <class Memory>
__global__ void __launch_bounds__(kThreads, kPairsResident<Memory>)
    generated_pair_kernel(const __grid_constant__ NoisyPair p, bool aligned) {
  using C = typename Memory::Compute;
  BlockKeys<Key> keys(p.key);
  for (int64_t sample = blockIdx.y; sample < p.layout.batch; sample += gridDim.y) {
    keys.move_to(p.key, sample, sample == blockIdx.y);
    const Levels<Memory> levels = levels_of<Memory>(p, sample);
    const int64_t of_network = place_of(p, sample);
    const bool generated = of_network >= 0;
    const Preconditioning<C> weights = pair_weights(p, sample, levels.low);
    const typename Memory::Row in = Memory::row(p.x, sample), output = Memory::row(p.x_hat, generated ? of_network : 0);
    const Share<Memory> share(p.layout, aligned);
    for_groups<Memory, kRestOfDrawn<Memory>>(p.layout, sample, share, [&](auto memory, const auto& place, auto) {
      constexpr int G = decltype(memory)::kGroup;
      const auto raw = memory.load(p.layout, in, place);
      typename decltype(memory)::Raw network = {};
      if (generated) network = memory.load(p.layout, output, place);
      float drawn[G];
      draw<Distribution::normal, G>(keys.key, place.begin, drawn);
      C x[G], f[G];
      memory.widen(in, raw, x);
      if (generated) {
        memory.widen(output, network, f);
        BICM_UNROLL(8)
        for (int i = 0; i < G; ++i) x[i] = weights.c_skip * at_level(x[i], levels.low, drawn[i]) + weights.c_out * f[i];
      }
      store_levels<decltype(memory)>(p, levels, place, x, drawn);
    });
  }
}

template <class Memory>
cudaError_t run_pair(const NoisyPair& p, bool aligned, cudaStream_t stream) {
  Grid grid;
  const auto kernel = p.generates ? generated_pair_kernel<Memory> : noisy_pair_kernel<Memory>;
  const cudaError_t error = plan(p.layout, Memory::kGroup, kernel, grid);
  return error != cudaSuccess ? error : launch(kernel, grid, stream, p, aligned);
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
  if (!problem.out.dense) return run<Strided<float>>(with_reciprocals(problem), stream);
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
  Layout samples = p.layout;
  if (p.places != nullptr && samples.batch == 1) samples.batch = 2;  // x_hat may have more
  const Operand* const operands[] = {&p.x, &p.x_hat, &p.low, &p.high};
  for (const Operand* x : operands) {
    dense = dense && x->dense;
    aligned = aligned && access_aligned(samples, *x);
  }
  const bool uniform = p.x_hat.dtype == p.x.dtype;
  const bool mixed = dense && !uniform && !p.float64 && p.x_hat.dtype != DType::float64;
  if (mixed) return run_pair<Mixed>(p, aligned, stream);
  if (!dense || !uniform) {
    return (p.float64 ? run_pair<Strided<double>> : run_pair<Strided<float>>)(with_reciprocals(p), false, stream);
  }
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
  const cudaError_t error = plan(layout, 1, fold_in_kernel, grid);
  return error != cudaSuccess ? error : launch(fold_in_kernel, grid, stream, seed, data, out, count);
}

}  // namespace cuda
}  // namespace bicm
