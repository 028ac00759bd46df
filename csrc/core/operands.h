// A kernel's arguments: plain data, the same for CPU and CUDA, passed by value. No functions here, so that units
// compiled for different instruction sets share these types.
#pragma once

#include <stdint.h>

namespace bicm {

// The integers are fixed-point states and their buffers: only the reversible family takes them.
enum class DType : int32_t { float16, bfloat16, float32, float64, int32, int64 };

constexpr int kMaxDims = 8;   // of a sample, after adjacent dimensions were merged
constexpr int kMaxTerms = 5;  // tensors of an affine map

// x / size = x multiplier >> shift for 0 <= x < 2^31; GPUs have no instruction for a quotient of integers.
struct Reciprocal {
  uint32_t multiplier, shift;
};

// B samples of d elements; sizes are the sample's merged dimensions, their product is d.
struct Layout {
  int64_t batch, elements;
  int64_t sizes[kMaxDims];
  int32_t dims;
  bool narrow;  // `reciprocals` are those of the sizes: kernels on any strides
  Reciprocal reciprocals[kMaxDims];
};

// A tensor in that layout; strides count elements. Dense: the elements of a sample are adjacent, in row-major order.
// Streams: an output too large for the cache; non-temporal stores avoid reading it first.
struct Operand {
  void* data;
  int64_t batch_stride;
  int64_t strides[kMaxDims];
  DType dtype;
  bool dense, streams;
};

// A number for the whole batch (data is null), or read from memory: one (stride 0) or one per sample.
struct Number {
  double value;
  const void* data;
  int64_t stride;
  DType dtype;
};

struct Integer {
  int64_t value;
  const int64_t* data;
  int64_t stride;
};

// The key of a sample's noise. `counts`: the sample's index in the batch is added to its id.
struct NoiseKey {
  Integer seed, step, sample;
  bool counts;
};

}  // namespace bicm
