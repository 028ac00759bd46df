// What csrc/cuda asks of the CUDA runtime, for a C++ compiler: the launch is a loop over blocks and threads. Kernels
// that need no barrier run unchanged, address for address, under a debugger and the sanitizers.
#pragma once

#include <stdint.h>

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = struct Stream*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace bicm {
namespace emulator {

// The device that is imitated. A test may force the grid (zero: as planned), run only some of the blocks along x (from
// 0 until 0: all), run blocks and threads backwards, or let every call of the runtime fail.
struct Device {
  int processors = 2;
  unsigned x = 0, y = 0, threads = 0;
  unsigned from_block = 0, until_block = 0;
  bool backwards = false, fails = false;
  int64_t launches = 0;

  cudaError_t error() const { return fails ? cudaErrorNoDevice : cudaSuccess; }
};

inline Device device;

inline unsigned place(unsigned i, unsigned count) { return device.backwards ? count - 1 - i : i; }

}  // namespace emulator

namespace cuda {

template <class Grid, class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& planned, cudaStream_t, const Arguments&... arguments) {
  emulator::Device& device = emulator::device;
  if (device.fails) return device.error();
  const unsigned x = device.x ? device.x : planned.x;
  const unsigned y = device.y ? device.y : planned.y;
  const unsigned threads = device.threads ? device.threads : planned.threads;
  const bool valid = x >= 1 && x <= 0x7FFFFFFFu && y >= 1 && y <= 65535 && threads >= 1 && threads <= 1024;
  if (!valid) return cudaErrorInvalidConfiguration;
  ++device.launches;
  gridDim = {x, y, 1};
  blockDim = {threads, 1, 1};
  const unsigned until = device.until_block ? device.until_block : x;
  for (unsigned j = 0; j < y; ++j) {
    for (unsigned i = device.from_block; i < until; ++i) {
      blockIdx = {device.until_block ? i : emulator::place(i, x), emulator::place(j, y), 0};
      for (unsigned thread = 0; thread < threads; ++thread) {
        threadIdx = {emulator::place(thread, threads), 0, 0};
        kernel(arguments...);
      }
    }
  }
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace bicm

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return bicm::emulator::device.error();
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = bicm::emulator::device.processors;
  return bicm::emulator::device.error();
}
