// A grid over (samples, groups of adjacent elements), and launching a kernel on it: by the CUDA runtime under nvcc, by
// plain loops in the emulator. Kernels stride over both axes, so every grid computes the same bits.
#pragma once

#include <stdint.h>

#include <map>
#include <mutex>
#include <utility>

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

// Compilers for sm_100 and later take more registers for the same code: a block less fits where they would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kFewerBlocks = 1;
#else
constexpr int kFewerBlocks = 0;
#endif

struct Grid {
  unsigned x, y, threads;  // blocks along a sample, blocks along the batch, threads of a block
  bool synchronises;       // whether the kernel's threads wait for one another; used by the emulator
  unsigned cluster = 1;    // blocks along x that run together
};

constexpr int64_t kMaxGridY = 65535;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// At most `limit` workers, and only as many as have the same number of rounds.
inline int64_t even_share(int64_t work, int64_t limit) {
  return work <= limit ? work : divide_up(work, divide_up(work, limit));
}

// Blocks of kThreads that the current device runs at a time: a launch of just as many ends everywhere at the same time,
// and each block forms what its elements share once. Asked once for a kernel and a device.
template <class... Parameters>
cudaError_t capacity_for(void (*kernel)(Parameters...), int64_t& blocks) {
  static std::mutex& mutex = *new std::mutex;
  static auto& known = *new std::map<std::pair<int, const void*>, int64_t>;
  const void* const address = reinterpret_cast<const void*>(kernel);
  int device, processors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& capacity = known[{device, address}];
  if (capacity == 0) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, address, kThreads, 0);
    }
    if (error != cudaSuccess) return error;
    capacity = int64_t{processors} * (resident < 1 ? 1 : resident);
  }
  blocks = capacity;
  return cudaSuccess;
}

// One block per work item, or per even share of the items, for clusters of so many blocks; the caller chooses the
// threads.
template <class Kernel>
cudaError_t plan_blocks(int64_t work, Kernel* kernel, Grid& grid, unsigned cluster = 1) {
  int64_t capacity;
  const cudaError_t error = capacity_for(kernel, capacity);
  if (error != cudaSuccess) return error;
  capacity = capacity < cluster ? 1 : capacity / cluster;
  grid = {static_cast<unsigned>(work < 1 ? 1 : even_share(work, capacity)) * cluster, 1, kThreads, false, cluster};
  return cudaSuccess;
}

// Blocks along the batch, of rows that take `x` blocks each, in at most four rounds of as many blocks as run at a time:
// the number with which the last one ends first. Fewer rounds form what a row's elements share for more rows at once.
inline int64_t rows_at_once(int64_t batch, int64_t x, int64_t capacity) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t rounds = 1; rounds <= 4; ++rounds) {
    const int64_t fit = rounds * capacity / x, rows = fit < 1 ? 1 : fit < kMaxGridY ? fit : kMaxGridY;
    const int64_t cost = rounds * divide_up(batch, rows);
    if (cost < least) best = even_share(batch, rows), least = cost;
    if (rows >= batch) break;
  }
  return best;
}

// `groups_of_round`: a thread moves so many groups at once where not all of them can have a thread of their own, and a
// quarter of the threads that run at a time is left.
template <class Kernel>
cudaError_t plan(const Layout& layout, int group, Kernel* kernel, Grid& grid, int groups_of_round = 1) {
  int64_t capacity;
  const cudaError_t error = capacity_for(kernel, capacity);
  if (error != cudaSuccess) return error;
  int64_t groups = divide_up(layout.elements, group);
  const int64_t fewer = divide_up(groups, groups_of_round);
  if (layout.batch * divide_up(groups, kThreads) > capacity && 4 * layout.batch * fewer >= capacity * kThreads) {
    groups = fewer;
  }
  const int64_t blocks = divide_up(groups, kThreads);
  const int64_t threads = divide_up(divide_up(groups, blocks), 32) * 32;
  capacity = capacity * kThreads / threads;
  int64_t x = even_share(blocks, capacity);
  for (const int64_t rounds : {4, 2}) {
    // Rows enough: a thread takes several groups of each, so that what a row's elements share is formed less often.
    if (layout.batch * divide_up(x, rounds) < capacity) continue;
    x = divide_up(x, rounds);
    break;
  }
  grid = {static_cast<unsigned>(x), static_cast<unsigned>(rows_at_once(layout.batch, x, capacity)),
          static_cast<unsigned>(threads), false};
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
