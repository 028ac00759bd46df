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
    const SampleKey key = sample_key(problem.key, sample);
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

__global__ void __launch_bounds__(kThreads)
    fold_in_kernel(const __grid_constant__ Integer seed, const __grid_constant__ Integer data, int64_t* out,
                   int64_t count) {
  for (int64_t i = first_group(); i < count; i += group_stride()) {
    out[i] = bicm::fold_in(load_integer(seed, i), load_integer(data, i));
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
