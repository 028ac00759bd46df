// From torch tensors to the plain structs of the kernels: checks, merged dimensions, outputs.
//
// The checks here are cheap and raise terse errors; bicm_kernels/ops builds the full message.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../core/operands.h"
#include "boxed.h"
#include "memory.h"

// Since torch 2.13; its check has a fuller message unless an older ABI is targeted.
#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace bicm {

using torch::stable::Tensor;

// Integers are accepted only on request: most ops do not take them.
enum class Kinds { floating, integers_too };

inline int32_t torch_code(DType dtype) {
  static const int32_t codes[] = {aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float32(),
                                  aoti_torch_dtype_float64(), aoti_torch_dtype_int32(),    aoti_torch_dtype_int64()};
  return codes[static_cast<int>(dtype)];
}

inline DType dtype_of(int32_t code, Kinds kinds = Kinds::floating) {
  for (int i = 0; i < (kinds == Kinds::floating ? 4 : 6); ++i) {
    if (torch_code(static_cast<DType>(i)) == code) return static_cast<DType>(i);
  }
  STD_TORCH_CHECK(false, "bicm_kernels: expected a tensor of another dtype");
}

inline DType dtype_of(const Tensor& tensor, Kinds kinds = Kinds::floating) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return dtype_of(code, kinds);
}

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
    case DType::int32: return 4;
    case DType::float64:
    case DType::int64: return 8;
    default: return 2;
  }
}

inline int32_t device_of(const Tensor& tensor) {
  int32_t type, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  return type * 256 + index + 1;
}

constexpr int32_t kHost = 0;  // a CPU tensor's device
inline bool on_host(int32_t device) { return device < 256; }

// A tensor's properties for a kernel; sizes and strides are borrowed.
struct View {
  void* data;
  const int64_t *sizes, *strides;
  int64_t dim;
  DType dtype;
  int32_t device;
};

inline View view_of(const Tensor& tensor, Kinds kinds = Kinds::floating) {
  int64_t *sizes, *strides;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
  return {tensor.data_ptr(), sizes, strides, tensor.dim(), dtype_of(tensor, kinds), device_of(tensor)};
}

inline bool same_sizes(const View& a, const View& b) {
  if (a.dim != b.dim) return false;
  for (int64_t i = 0; i < a.dim; ++i) {
    if (a.sizes[i] != b.sizes[i]) return false;
  }
  return true;
}

// Whether a tensor's elements fill one memory range without gaps, in any order; outputs then get the same strides.
bool dense(const View& x);

inline bool contiguous(const View& x) {
  int64_t expected = 1;
  for (int64_t i = x.dim - 1; i >= 0; --i) {
    if (x.sizes[i] != 1 && x.strides[i] != expected) return false;
    expected *= x.sizes[i];
  }
  return true;
}

inline int64_t bytes_of(const View& x) {
  int64_t bytes = size_of(x.dtype);
  for (int64_t i = 0; i < x.dim; ++i) bytes *= x.sizes[i];
  return bytes;
}

inline bool worth_keeping(const View& x) { return x.device == kHost && bytes_of(x) >= kKeptFrom && dense(x); }

// A dense CPU tensor in a block of the free list; nothing where it is small or torch cannot wrap one.
std::optional<Tensor> in_kept_memory(const View& view);

// An uninitialised tensor in the dtype and layout of the first state tensor. The shortcut for contiguous tensors
// avoids a call through the dispatcher.
inline Tensor like(const Tensor& first, const View& view) {
  if (std::optional<Tensor> kept = in_kept_memory(view)) return *kept;
  if (!contiguous(view)) return torch::stable::empty_like(first);
  int32_t dtype, type, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(first.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(first.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(first.get(), &index));
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(view.dim, view.sizes, view.strides, dtype, type, index, &result));
  return Tensor(result);
}

// A 0-d or 1-d tensor on a tensor's device, uninitialised.
inline Tensor empty_tensor(const Tensor& like, int64_t dim, int64_t size, int32_t dtype) {
  int32_t type, index;
  const int64_t stride = 1;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, &size, &stride, dtype, type, index, &result));
  return Tensor(result);
}

inline Tensor row_like(const Tensor& like, int64_t size, DType dtype) {
  return empty_tensor(like, 1, size, torch_code(dtype));
}

// Whether an output may be written while an input is read: they are the same memory element by element, or disjoint.
// Two tensors of the same strides that are nested (each stride spans the smaller ones) are compared exactly; others by
// their address ranges.
bool may_alias(const View& out, const View& in);
bool overlaps_itself(const View& out);

// Fills `layout` and the operands for views of one shape (B, ...). `ordered`: the row-major order of a sample's
// elements matters, because noise is keyed by it; else memory order is allowed. `per_sample`: samples are not merged.
void merge(const View* const* views, Operand* const* operands, int count, bool ordered, bool per_sample,
           Layout& layout);

// The number of elements above which an output is written with non-temporal stores.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

}  // namespace bicm
