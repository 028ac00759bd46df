// A grid over (samples, groups of adjacent elements), and launching a kernel on it: by the CUDA runtime under nvcc, by
// plain loops in the emulator. Kernels stride over both axes, so every grid computes the same bits.
#pragma once

#include "../core/operands.h"

#if defined(BICM_EMULATE)
#include "../emulator/runtime.h"
#define BICM_DEVICE inline
#else
#include <cuda_runtime.h>
#define BICM_DEVICE __device__ __forceinline__
#endif

namespace bicm {
namespace cuda {

constexpr int kThreads = 256;

struct Grid {
  unsigned x, y, threads;  // blocks along a sample, blocks along the batch, threads of a block
  bool synchronises;       // whether the kernel's threads wait for one another; used by the emulator
  unsigned cluster = 1;    // blocks along x that run together
};

// Enough blocks to balance the load, few enough that a block's setup (the weights, the key) is
// amortised over many groups.
constexpr int64_t kBlocksPerProcessor = 32;
constexpr int64_t kMaxGridY = 65535;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// At most `limit` workers, and only as many as have the same number of rounds.
inline int64_t even_share(int64_t work, int64_t limit) {
  return work <= limit ? work : divide_up(work, divide_up(work, limit));
}

inline cudaError_t capacity_of_device(int64_t& blocks) {
  int device, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  blocks = processors * kBlocksPerProcessor;
  return error;
}

// One block per work item, or per even share of the items; the caller chooses the threads.
inline cudaError_t plan_blocks(int64_t work, Grid& grid) {
  int64_t capacity;
  const cudaError_t error = capacity_of_device(capacity);
  if (error != cudaSuccess) return error;
  grid = {static_cast<unsigned>(work < 1 ? 1 : even_share(work, capacity)), 1, kThreads, false};
  return cudaSuccess;
}

inline cudaError_t plan(const Layout& layout, int group, Grid& grid) {
  int64_t capacity;
  const cudaError_t error = capacity_of_device(capacity);
  if (error != cudaSuccess) return error;
  const int64_t groups = divide_up(layout.elements, group);
  const int64_t threads = groups < kThreads ? divide_up(groups, 32) * 32 : kThreads;
  const int64_t x = even_share(divide_up(groups, threads), capacity);
  const int64_t rows = divide_up(capacity, x);
  const int64_t y = even_share(layout.batch, rows < kMaxGridY ? rows : kMaxGridY);
  grid = {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(threads), false};
  return cudaSuccess;
}

// The calling thread's first group of elements, and how far it is to its next.
BICM_DEVICE int64_t first_group() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
BICM_DEVICE int64_t group_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

#if !defined(BICM_EMULATE)
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.x, grid.y);
  config.blockDim = dim3(grid.threads);
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {grid.cluster, 1, 1};
  config.attrs = &attribute;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) cudaGetLastError();  // reported here: clear it for the next call
  return error;
}
#endif

}  // namespace cuda
}  // namespace bicm
