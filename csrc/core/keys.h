// Per-sample arguments: numbers in the compute type, and the key of a sample's noise.
#pragma once

#include "half.h"
#include "operands.h"
#include "philox.h"

#if defined(BICM_EMULATE)
namespace bicm::emulator {
inline void count_number(const void* address, size_t bytes);  // the emulator's; it counts what is passed here
}
#endif

BICM_NAMESPACE_BEGIN

#if defined(BICM_EMULATE)
inline void see_number(const void* from, size_t bytes) { ::bicm::emulator::count_number(from, bytes); }
#else
BICM_HD void see_number(const void*, size_t) {}
#endif

// All reads of per-batch and per-sample numbers go through here, so that the emulator counts them too.
template <class T>
BICM_HD T number_at(const void* data, int64_t i) {
  const T* from = static_cast<const T*>(data) + i;
  see_number(from, sizeof(T));
  return *from;
}

template <class C>
BICM_HD C load_number(const Number& number, int64_t sample) {
  if (number.data == nullptr) return static_cast<C>(number.value);
  const int64_t i = sample * number.stride;
  switch (number.dtype) {
    case DType::float16: return static_cast<C>(half_to_float(number_at<uint16_t>(number.data, i)));
    case DType::bfloat16: return static_cast<C>(bfloat16_to_float(number_at<uint16_t>(number.data, i)));
    case DType::float32: return static_cast<C>(number_at<float>(number.data, i));
    default: return static_cast<C>(number_at<double>(number.data, i));
  }
}

BICM_HD int64_t load_integer(const Integer& integer, int64_t sample) {
  return integer.data == nullptr ? integer.value : number_at<int64_t>(integer.data, sample * integer.stride);
}

template <class Keys>
struct KeyOfSample {
  Keys key;
  uint32_t sample, step;
};
using SampleKey = KeyOfSample<Key>;

BICM_HD SampleKey sample_key(const NoiseKey& noise, int64_t sample) {
  const int64_t id = load_integer(noise.sample, sample) + (noise.counts ? sample : 0);
  return {make_key(load_integer(noise.seed, sample)), static_cast<uint32_t>(id),
          static_cast<uint32_t>(load_integer(noise.step, sample))};
}

BICM_NAMESPACE_END
