// From torch tensors to the plain structs of the kernels: checks, merged dimensions, outputs.
//
// The checks here are cheap and raise terse errors; bicm_kernels/ops builds the full message.
#pragma once

#include "../core/operands.h"
#include "boxed.h"
#include "memory.h"

namespace bicm {

using ScalarType = torch::headeronly::ScalarType;

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

inline DType dtype_of(ScalarType type, Kinds kinds = Kinds::floating) {
  using torch::stable::detail::from;
  return dtype_of(torch::stable::detail::to<int32_t>(from(type)), kinds);
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

inline int32_t device_code(int32_t type, int32_t index) { return type * 256 + index + 1; }
inline int32_t device_of(const Tensor& tensor) { return device_code(tensor.device_type(), tensor.device_index()); }

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

constexpr int64_t kMaxTensorDims = 64;

inline View view_of(const Tensor& tensor, Kinds kinds = Kinds::floating) {
  STD_TORCH_CHECK(tensor.dim() <= kMaxTensorDims, "bicm_kernels: more than 64 dimensions");
  return {tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.dim(), dtype_of(tensor.dtype(), kinds),
          device_of(tensor)};
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

// Uninitialised, on a tensor's device.
inline Tensor empty_strided(const Tensor& like, int64_t dim, const int64_t* sizes, const int64_t* strides,
                            int32_t dtype) {
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, like.device_type(), like.device_index(), &result));
  return Tensor(result);
}

// As torch.empty_like(x, dtype=dtype).
Tensor empty_like(const Tensor& x, std::optional<ScalarType> dtype = std::nullopt);

// An uninitialised tensor in the dtype and layout of the first state tensor. The short way for contiguous tensors
// saves a trip through the dispatcher.
inline Tensor like(const Tensor& first, const View& view) {
  if (std::optional<Tensor> kept = in_kept_memory(view)) return std::move(*kept);
  if (!contiguous(view)) return empty_like(first);
  return empty_strided(first, view.dim, view.sizes, view.strides, torch_code(view.dtype));
}

// Contiguous, in the shape and dtype of a view, whatever its strides are.
Tensor contiguous_like(const Tensor& first, const View& view);

// A number or a row of them on a tensor's device, uninitialised.
inline Tensor empty_tensor(const Tensor& like, int64_t dim, int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  return empty_strided(like, dim, &size, &stride, dtype);
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

// From this size on outputs may be written with non-temporal stores. Only x86-64's kernels have such stores.
#if defined(__x86_64__)
constexpr int64_t kStreamBytes = int64_t{2} << 20;
#else
constexpr int64_t kStreamBytes = int64_t{1} << 60;
#endif

// Whether a call that reads `inputs` and writes `outputs` tensors of this many bytes writes them with non-temporal
// stores. Others read the memory of a result first and displace what the next op reads; but a result that stays in the
// cache is written faster, by several threads above all: one of them nearly fills the path to the memory, the more so
// the fewer tensors are read.
// The limits were measured on a cache of 32 MiB: docs/performance.md, "Non-temporal stores".
bool streams_large(int64_t bytes, int inputs, int outputs);
inline bool streams(int64_t bytes, int inputs, int outputs) {
  return bytes >= kStreamBytes && streams_large(bytes, inputs, outputs);
}

}  // namespace bicm
