// The keyed noise itself: a thread draws whole quads and stores them once.
#include "../core/noise.h"

#include "kernels.h"
#include "strided.h"

namespace bicm {
namespace cuda {
namespace {

template <class Access, Distribution D>
__global__ void __launch_bounds__(kThreads) noise_kernel(const __grid_constant__ Noise problem, bool aligned) {
  using C = typename Access::Compute;
  constexpr int G = Access::kGroup;
  const Layout& layout = problem.layout;
  for (int64_t sample = blockIdx.y; sample < layout.batch; sample += gridDim.y) {
    const SampleKey key = sample_key(problem.key, sample);
    for (int64_t begin = first_group() * G; begin < layout.elements; begin += group_stride() * G) {
      C values[G];
      for (int i = 0; i < G; i += 4) {
        float drawn[4];
        numbers_from_bits<D>(random_quad(key, (begin + i) / 4), drawn);
        for (int lane = 0; lane < 4; ++lane) values[i + lane] = static_cast<C>(drawn[lane]);
      }
      Access::store(layout, problem.out, Access::at(layout, sample, begin, aligned), values);
    }
  }
}

template <class Access>
cudaError_t run(const Noise& problem, cudaStream_t stream) {
  Grid grid;
  const cudaError_t error = plan(problem.layout, Access::kGroup, grid);
  if (error != cudaSuccess) return error;
  const bool aligned = access_aligned(problem.layout, problem.out);
  const bool normal = problem.distribution == Distribution::normal;
  return launch(normal ? noise_kernel<Access, Distribution::normal> : noise_kernel<Access, Distribution::uniform>, grid,
                stream, problem, aligned);
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

}  // namespace cuda
}  // namespace bicm
