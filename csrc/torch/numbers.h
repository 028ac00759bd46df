// Per-sample arguments: Python numbers and tensors become Number, Integer and NoiseKey.
#pragma once

#include <optional>
#include <vector>

#include "tensors.h"

namespace bicm {

inline Number number_of(double value) { return {value, nullptr, 0, DType::float64}; }

// A 0-d or (B,) tensor, read by the kernel where it lies. A 0-d tensor that lies on the host beside data on a device is
// read here: no synchronisation is needed for it.
inline Number number_of(const Tensor& tensor, int64_t batch, int32_t device) {
  const int64_t dim = tensor.dim();
  STD_TORCH_CHECK(dim == 0 || (dim == 1 && tensor.size(0) == batch), "bicm_kernels: a number must be 0-d or (B,)");
  Number number = {0.0, tensor.data_ptr(), dim == 0 ? 0 : tensor.stride(0), dtype_of(tensor)};
  if (device_of(tensor) != device) {
    STD_TORCH_CHECK(dim == 0 && tensor.is_cpu() && number.dtype == DType::float64,
                    "bicm_kernels: a number must be on the tensors' device, or a 0-d float64 tensor on the CPU");
    number.value = *static_cast<const double*>(number.data);
    number.data = nullptr;
  }
  return number;
}

inline Integer integer_of(int64_t value) { return {value, nullptr, 0}; }

inline Integer integer_of(const Tensor& tensor, int64_t batch, int32_t device) {
  static const int32_t int64 = aoti_torch_dtype_int64();
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  STD_TORCH_CHECK(dtype == int64, "bicm_kernels: an integer must be an int64 tensor");
  const int64_t dim = tensor.dim();
  STD_TORCH_CHECK(dim == 0 || (dim == 1 && tensor.size(0) == batch), "bicm_kernels: an integer must be 0-d or (B,)");
  Integer integer = {0, static_cast<const int64_t*>(tensor.data_ptr()), dim == 0 ? 0 : tensor.stride(0)};
  if (device_of(tensor) != device) {
    STD_TORCH_CHECK(dim == 0 && tensor.is_cpu(), "bicm_kernels: an integer must be on the tensors' device, or 0-d");
    integer.value = *integer.data;
    integer.data = nullptr;
  }
  return integer;
}

constexpr int64_t kWord = int64_t{1} << 32;

// The three integers of a noise key as they come from a schema: numbers or tensors.
struct KeyNumbers {
  int64_t seed, step, sample;
};
struct KeyTensors {
  const Tensor &seed, &step, &sample;
};

inline NoiseKey key_of(const KeyNumbers& key, int64_t batch, int32_t) {
  const bool fits =
      key.step >= 0 && key.step < kWord && key.sample >= 0 && key.sample < kWord && key.sample + batch <= kWord;
  STD_TORCH_CHECK(fits, "bicm_kernels: step and sample_id must be in [0, 2**32)");
  return {integer_of(key.seed), integer_of(key.step), integer_of(key.sample), true};
}

inline NoiseKey key_of(const KeyTensors& key, int64_t batch, int32_t device) {
  NoiseKey result = {integer_of(key.seed, batch, device), integer_of(key.step, batch, device),
                     integer_of(key.sample, batch, device), key.sample.dim() == 0};
  if (key.seed.dim() == 1) {
    result.sample = integer_of(int64_t{0});
    result.counts = false;
  }
  return result;
}

}  // namespace bicm
