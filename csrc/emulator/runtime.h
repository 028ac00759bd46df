// What csrc/cuda asks of the CUDA runtime, for a C++ compiler: the launch is a loop over blocks and threads. Kernels
// run unchanged, address for address, under a debugger and the sanitizers. The threads of a kernel that synchronises are
// fibres; those of any other are calls, which is faster.
#pragma once

#include <stdint.h>
#include <string.h>

#include "fibres.h"
#include "traffic.h"

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
  bool skips_barriers = false;  // a planted fault: __syncthreads does nothing
  int64_t launches = 0;

  cudaError_t error() const { return fails ? cudaErrorNoDevice : cudaSuccess; }
};

inline Device device;
inline Fibres fibres;
inline bool synchronises = false;  // whether the kernel that runs may wait

inline void check_waiting(Site site) {
  if (!synchronises) throw std::logic_error(site.name() + ": the kernel was launched as one that never waits");
}

inline void barrier(Site site) {
  check_waiting(site);
  if (!device.skips_barriers) fibres.barrier(site);
}

template <class T>
T shuffle_xor(uint32_t mask, T value, unsigned lanes, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a lane gives at most 64 bits");
  check_waiting(site);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  const unsigned partner = (fibres.current() % kWarp) ^ lanes;
  if (partner >= kWarp || (mask >> partner & 1) == 0) throw std::logic_error(site.name() + ": the partner is no lane");
  memcpy(&value, &fibres.exchange(mask, bits, site)[partner], sizeof(T));
  return value;
}

inline uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  check_waiting(site);
  const uint64_t* votes = fibres.exchange(mask, predicate, site);
  uint32_t result = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) result |= static_cast<uint32_t>(votes[lane]) << lane;
  }
  return result;
}

// A cell of shared memory. Two threads that touch it between the same barriers, one of them writing, are in a race.
template <class T>
class Cell {
 public:
  operator T() const {
    check_shared();
    check_interval(writer_, written_, "reads what another thread writes");
    if (written_ < fibres.block()) throw std::logic_error("shared memory is read before it is written");
    if (read_ == fibres.interval() && reader_ != fibres.current()) {
      reader_ = kMany;
    } else {
      reader_ = fibres.current();
    }
    read_ = fibres.interval();
    return value_;
  }
  Cell& operator=(T value) {
    check_shared();
    check_interval(writer_, written_, "writes what another thread writes");
    check_interval(reader_, read_, "writes what another thread reads");
    value_ = value;
    writer_ = fibres.current();
    written_ = fibres.interval();
    return *this;
  }
  Cell& operator=(const Cell& other) { return *this = static_cast<T>(other); }

 private:
  static constexpr unsigned kMany = ~0u;

  static void check_shared() {
    if (!synchronises) throw std::logic_error("shared memory in a kernel that was launched as one that never waits");
  }

  void check_interval(unsigned thread, int64_t interval, const char* what) const {
    if (interval != fibres.interval() || thread == fibres.current()) return;
    throw std::logic_error("race: thread " + std::to_string(fibres.current()) + " " + what +
                           " between the same barriers");
  }

  T value_ = {};
  mutable unsigned reader_ = 0;
  mutable int64_t read_ = -1;
  unsigned writer_ = 0;
  int64_t written_ = -1;
};

template <class T, int Count>
class Shared {
 public:
  Cell<T>& operator[](int i) {
    if (i < 0 || i >= Count) throw std::out_of_range("an access outside of shared memory");
    return cells_[i];
  }

 private:
  Cell<T> cells_[Count];
};

inline unsigned place(unsigned i, unsigned count) { return device.backwards ? count - 1 - i : i; }

}  // namespace emulator

namespace cuda {

template <class Grid, class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& planned, cudaStream_t, const Arguments&... arguments) {
  emulator::Device& device = emulator::device;
  if (device.fails) return device.error();
  const unsigned x = device.x ? device.x : planned.x;
  const unsigned y = device.y ? device.y : planned.y;
  const unsigned threads = device.threads && !planned.synchronises ? device.threads : planned.threads;
  const bool valid = x >= 1 && x <= 0x7FFFFFFFu && y >= 1 && y <= 65535 && threads >= 1 && threads <= 1024;
  if (!valid) return cudaErrorInvalidConfiguration;
  ++device.launches;
  emulator::synchronises = planned.synchronises;
  gridDim = {x, y, 1};
  blockDim = {threads, 1, 1};
  const unsigned until = device.until_block ? device.until_block : x;
  for (unsigned j = 0; j < y; ++j) {
    for (unsigned i = device.from_block; i < until; ++i) {
      emulator::numbers_of_block.clear();
      blockIdx = {device.until_block ? i : emulator::place(i, x), emulator::place(j, y), 0};
      if (planned.synchronises) {
        emulator::fibres.run(
            threads, device.backwards, [&] { kernel(arguments...); },
            [](unsigned thread) { threadIdx = {thread, 0, 0}; });
        continue;
      }
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

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (!bicm::emulator::device.fails) memset(to, value, bytes);
  return bicm::emulator::device.error();
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}

inline void __threadfence() {}

#define BICM_SITE (::bicm::emulator::Site{__FILE__, __LINE__})
#define __syncthreads() ::bicm::emulator::barrier(BICM_SITE)
#define __shfl_xor_sync(mask, value, lanes) ::bicm::emulator::shuffle_xor(mask, value, lanes, BICM_SITE)
#define __ballot_sync(mask, predicate) ::bicm::emulator::ballot(mask, predicate, BICM_SITE)
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, predicate) == (mask))
