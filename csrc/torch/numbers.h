// Per-sample arguments: Python numbers and tensors become Number, Integer and NoiseKey.
#pragma once

#include <optional>
#include <vector>

#include "../core/keys.h"
#include "tensors.h"

namespace bicm {

inline Number number_of(double value) { return {value, nullptr, 0, DType::float64}; }

// A 0-d or (B,) tensor, read by the kernel in place. A 0-d tensor on the host next to data on a device is
// read here: no synchronisation is needed for it.
inline Number number_of(const View& view, int64_t batch, int32_t device) {
  STD_TORCH_CHECK(view.dim == 0 || (view.dim == 1 && view.sizes[0] == batch),
                  "bicm_kernels: a number must be 0-d or (B,)");
  const Number number = {0.0, view.data, view.dim == 0 ? 0 : view.strides[0], view.dtype};
  if (view.device == device) return number;
  STD_TORCH_CHECK(view.dim == 0 && on_host(view.device),
                  "bicm_kernels: a number must be on the tensors' device, or 0-d on the CPU");
  return number_of(load_number<double>(number, 0));
}

inline Number number_of(const Tensor& tensor, int64_t batch, int32_t device) {
  return number_of(view_of(tensor), batch, device);
}

inline Integer integer_of(int64_t value) { return {value, nullptr, 0}; }

inline Integer integer_of(const View& view, int64_t batch, int32_t device) {
  STD_TORCH_CHECK(view.dtype == DType::int64, "bicm_kernels: an integer must be an int64 tensor");
  STD_TORCH_CHECK(view.dim == 0 || (view.dim == 1 && view.sizes[0] == batch),
                  "bicm_kernels: an integer must be 0-d or (B,)");
  Integer integer = {0, static_cast<const int64_t*>(view.data), view.dim == 0 ? 0 : view.strides[0]};
  if (view.device != device) {
    STD_TORCH_CHECK(view.dim == 0 && on_host(view.device),
                    "bicm_kernels: an integer must be on the tensors' device, or 0-d");
    integer.value = *integer.data;
    integer.data = nullptr;
  }
  return integer;
}

inline Integer integer_of(const Tensor& tensor, int64_t batch, int32_t device) {
  return integer_of(view_of(tensor, Kinds::integers_too), batch, device);
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
