// Counting the blocks of a launch, the last of which makes one result of what all have found.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "access.h"
#include "block.h"

namespace bicm {
namespace cuda {

// Whether this block is the last to finish; then the others' results can be read. Behind the last the counter is 0.
BICM_DEVICE bool finishes_last(unsigned* finished) {
  BICM_SHARED(bool, last, 1);
  if (threadIdx.x == 0) {
    __threadfence();
    last[0] = gridDim.x == 1 || count_to(finished, gridDim.x - 1);
    __threadfence();
  }
  __syncthreads();
  return last[0];
}

// Numbers that one thread adds up one after another, at most.
constexpr int64_t kSerial = 32;

// What is left of every sample's sums where there were many: so many, so far apart.
struct Folded {
  int64_t count, step;
};

// Adds up the sums of every sample's chunks, in place, until at most kSerial are left: a thread adds kSerial of them at
// a time. Which are added depends on their number alone. Every thread of the block must call this.
template <class Add>
BICM_DEVICE Folded fold_sums(double* sums, int64_t batch, int64_t chunks, Add add) {
  Folded left = {chunks, 1};
  BICM_LOOP
  while (left.count > kSerial) {
    const int64_t parts = (left.count + kSerial - 1) / kSerial;
    BICM_LOOP
    for (int64_t part = threadIdx.x; part < batch * parts; part += blockDim.x) {
      const int64_t first = part % parts * kSerial, rest = left.count - first;
      double* const from = sums + part / parts * chunks + first * left.step;
      double sum = load_at(from);
      BICM_LOOP
      for (int64_t i = 1; i < (rest < kSerial ? rest : kSerial); ++i) sum = add(sum, load_at(from + i * left.step));
      store_at(from, sum);
    }
    __syncthreads();
    left = {parts, left.step * kSerial};
  }
  return left;
}

// A counter for the launches of one stream, which follow each other: 0 before the first, and each leaves it at 0. Null
// where there is no memory for one. Nothing is ever freed: a kernel may still run when the process ends.
inline unsigned* counter_of_stream(cudaStream_t stream) {
  static std::mutex& mutex = *new std::mutex;
  static auto& counters = *new std::map<std::pair<int, unsigned long long>, unsigned*>;
  int device;
  unsigned long long id;  // a stream's handle may come again, its number not
  if (cudaGetDevice(&device) != cudaSuccess || cudaStreamGetId(stream, &id) != cudaSuccess) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  unsigned*& counter = counters[{device, id}];
  if (counter != nullptr) return counter;
  // No memory of torch's: what is allocated while a graph is warmed up must not outlive the graph. Another thread may
  // be capturing, which this does not disturb.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  void* memory = nullptr;
  if (cudaMalloc(&memory, sizeof(unsigned)) == cudaSuccess) {
    if (cudaMemsetAsync(memory, 0, sizeof(unsigned), stream) == cudaSuccess) counter = static_cast<unsigned*>(memory);
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (counter == nullptr) cudaGetLastError();  // not an error of the call: it clears a counter of its own
  return counter;
}

// The counter of a launch on `stream`; `own` is memory of this launch alone. A captured launch runs beside others of its
// stream, and clears its own.
inline cudaError_t prepare_counter(unsigned* own, cudaStream_t stream, unsigned*& counter) {
  cudaStreamCaptureStatus capture;
  const cudaError_t error = cudaStreamIsCapturing(stream, &capture);
  if (error != cudaSuccess) return error;
  counter = capture == cudaStreamCaptureStatusNone ? counter_of_stream(stream) : nullptr;
  if (counter != nullptr) return cudaSuccess;
  counter = own;
  return cudaMemsetAsync(own, 0, sizeof(*own), stream);
}

}  // namespace cuda
}  // namespace bicm
