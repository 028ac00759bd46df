// The parts of the CUDA runtime that csrc/cuda uses, for a C++ compiler: the launch is a loop over blocks and threads.
// Kernels run unchanged, address for address, under a debugger and the sanitizers. The threads of a kernel that
// synchronises are fibres; those of any other are calls, which is faster.
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
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrClusterLaunch = 120 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 };
using cudaStream_t = struct Stream*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace bicm {
namespace emulator {

// The emulated device. A test may force the grid (zero: as planned), run only some of the blocks along x (from
// 0 until 0: all), run blocks and threads backwards, or let every call of the runtime fail.
struct Device {
  int processors = 2, blocks = 4;  // of 256 threads, on each
  unsigned x = 0, y = 0, threads = 0;
  unsigned from_block = 0, until_block = 0;
  bool backwards = false, fails = false;
  bool has_clusters = true;
  bool captures = false, full = false;                         // launches go into a graph; there is no memory left
  unsigned long long stream = 1;                               // the number of the stream that is launched on
  bool skips_barriers = false;                                 // planted faults: __syncthreads does nothing,
  bool skips_cluster_barriers = false, mistakes_peer = false;  // a cluster's does, another block's memory is meant
  int64_t launches = 0, memsets = 0;
  unsigned threads_of_grid = 0;  // of the last launch

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

inline void cluster_arrive(Site site) {
  check_waiting(site);
  if (!device.skips_cluster_barriers) fibres.arrive(site);
}

inline void cluster_wait(Site site) {
  if (!device.skips_cluster_barriers) fibres.wait_for_cluster(site);
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

// A cell of shared memory. Two threads that access it between the same barriers, one of them writing, race: the
// block's barriers for its own threads, the cluster's for those of other blocks, which may read.
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
    if (read_by_peer_ == fibres.epoch()) throw std::logic_error("race: a thread writes what another block reads");
    value_ = value;
    epoch_ = fibres.epoch();
    writer_ = fibres.current();
    written_ = fibres.interval();
    return *this;
  }
  Cell& operator=(const Cell& other) { return *this = static_cast<T>(other); }

  T read_by_peer() const {
    check_shared();
    if (written_ < fibres.block()) throw std::logic_error("shared memory is read before it is written");
    if (epoch_ == fibres.epoch()) throw std::logic_error("race: a thread reads what another block writes");
    read_by_peer_ = fibres.epoch();
    return value_;
  }

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
  mutable int64_t read_by_peer_ = -1;
  unsigned writer_ = 0;
  int64_t written_ = -1, epoch_ = -1;
};

template <class T, int Count>
class Shared {
 public:
  Cell<T>& operator[](int i) {
    check(i);
    return cells_[fibres.rank()][i];
  }

  // Of another block of the cluster, or of the thread's own.
  T of_peer(unsigned rank, int i) {
    check(i);
    if (device.mistakes_peer) ++rank;
    if (rank >= fibres.blocks()) throw std::out_of_range("shared memory of a block that the cluster does not have");
    if (rank == fibres.rank()) return cells_[rank][i];
    if (fibres.has_ended(rank)) throw std::logic_error("shared memory of a block that has ended");
    return cells_[rank][i].read_by_peer();
  }

 private:
  static void check(int i) {
    if (i < 0 || i >= Count) throw std::out_of_range("an access outside of shared memory");
  }

  Cell<T> cells_[kMaxCluster][Count];
};

// What runs only in part, or breaks off, would end the life of a real device: what was counted on it is forgotten.
struct Restart {
  ~Restart() {
    if (whole) return;
    for (const Range& range : allocated) memset(reinterpret_cast<void*>(range.begin), 0, range.end - range.begin);
  }
  bool whole = false;
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
  const unsigned cluster = planned.cluster;
  const bool valid = x >= 1 && x <= 0x7FFFFFFFu && y >= 1 && y <= 65535 && threads >= 1 && threads <= 1024 &&
                     cluster <= emulator::kMaxCluster && x % cluster == 0;
  if (!valid) return cudaErrorInvalidConfiguration;
  ++device.launches;
  device.threads_of_grid = x * y * threads;
  emulator::synchronises = planned.synchronises;
  gridDim = {x, y, 1};
  blockDim = {threads, 1, 1};
  emulator::Restart restart;
  const unsigned until = device.until_block && device.until_block < x ? device.until_block : x;
  for (unsigned j = 0; j < y; ++j) {
    for (unsigned i = device.from_block; i < until; i += cluster) {
      for (auto& numbers : emulator::numbers_of_block) numbers.clear();
      const unsigned place = device.until_block ? i : emulator::place(i, x);
      blockIdx = {place, emulator::place(j, y), 0};
      if (planned.synchronises) {
        emulator::fibres.run(
            cluster, threads, device.backwards, [&] { kernel(arguments...); },
            [first = place / cluster * cluster, threads](unsigned thread) {
              emulator::block_of_cluster = thread / threads;
              blockIdx.x = first + thread / threads;
              threadIdx = {thread % threads, 0, 0};
            });
        emulator::block_of_cluster = 0;
        continue;
      }
      for (unsigned thread = 0; thread < threads; ++thread) {
        threadIdx = {emulator::place(thread, threads), 0, 0};
        kernel(arguments...);
      }
    }
  }
  restart.whole = device.from_block == 0 && until == x;
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace bicm

// What is asked of a device is remembered by its number: one with other processors is another.
inline cudaError_t cudaGetDevice(int* device) {
  *device = bicm::emulator::device.processors;
  return bicm::emulator::device.error();
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bicm::emulator::Device& device = bicm::emulator::device;
  *value = attribute == cudaDevAttrClusterLaunch ? device.has_clusters : device.processors;
  return bicm::emulator::device.error();
}

inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = bicm::emulator::device.blocks;
  return bicm::emulator::device.error();
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  bicm::emulator::Device& device = bicm::emulator::device;
  if (device.fails) return device.error();
  memset(to, value, bytes);
  ++device.memsets;
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  const bool captures = bicm::emulator::device.captures;
  *status = captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return bicm::emulator::device.error();
}

inline cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
  *id = bicm::emulator::device.stream;
  return bicm::emulator::device.error();
}

inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (bicm::emulator::device.full) return cudaErrorMemoryAllocation;
  *memory = ::operator new(bytes);  // never freed, as the library frees none
  const uintptr_t begin = reinterpret_cast<uintptr_t>(*memory);
  bicm::emulator::allocated.push_back({begin, begin + bytes});
  return cudaSuccess;
}

inline unsigned atomicInc(unsigned* address, unsigned most) {
  const unsigned before = *address;
  *address = before >= most ? 0 : before + 1;
  return before;
}

inline void __threadfence() {}

#define BICM_SITE (::bicm::emulator::Site{__FILE__, __LINE__})
#define __syncthreads() ::bicm::emulator::barrier(BICM_SITE)
#define __cluster_barrier_arrive() ::bicm::emulator::cluster_arrive(BICM_SITE)
#define __cluster_barrier_wait() ::bicm::emulator::cluster_wait(BICM_SITE)
#define __clusterRelativeBlockRank() (::bicm::emulator::fibres.rank())
#define __clusterSizeInBlocks() (::bicm::emulator::fibres.blocks())
#define __shfl_xor_sync(mask, value, lanes) ::bicm::emulator::shuffle_xor(mask, value, lanes, BICM_SITE)
#define __ballot_sync(mask, predicate) ::bicm::emulator::ballot(mask, predicate, BICM_SITE)
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, predicate) == (mask))
