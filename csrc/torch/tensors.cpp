#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

// Since torch 2.11; absent from the oldest ABI that this library takes.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(void* data, int64_t dim, const int64_t* sizes,
                                                                const int64_t* strides, int64_t offset, int32_t dtype,
                                                                int32_t device_type, int32_t device_index,
                                                                AtenTensorHandle* result, int32_t layout,
                                                                const uint8_t* metadata, int64_t metadata_size,
                                                                void (*deleter)(void*, void*), void* context);

namespace bicm {
namespace {

struct Extent {
  int64_t size, stride;
};

// Dimensions with more than one element, largest stride first.
int moving(const View& x, Extent* extents) {
  int count = 0;
  for (int64_t i = 0; i < x.dim; ++i) {
    if (x.sizes[i] == 1) continue;
    int place = count++;
    for (; place > 0 && extents[place - 1].stride < x.strides[i]; --place) extents[place] = extents[place - 1];
    extents[place] = {x.sizes[i], x.strides[i]};
  }
  return count;
}

int64_t span(const Extent* extents, int count) {
  int64_t last = 0;
  for (int i = 0; i < count; ++i) last += (extents[i].size - 1) * extents[i].stride;
  return last;
}

bool nested(const Extent* extents, int count) {
  for (int i = 0; i < count; ++i) {
    if (extents[i].stride <= span(extents + i + 1, count - i - 1)) return false;
  }
  return true;
}

bool same_strides(const View& a, const View& b) {
  for (int64_t i = 0; i < a.dim; ++i) {
    if (a.sizes[i] != 1 && a.strides[i] != b.strides[i]) return false;
  }
  return a.dtype == b.dtype;
}

// Whether `distance` is the offset between two elements of a nested tensor.
bool reaches(int64_t distance, const Extent* extents, int count) {
  if (count == 0) return distance == 0;
  const int64_t below = span(extents + 1, count - 1);
  const int64_t stride = extents[0].stride;
  for (int64_t steps = distance / stride - 1; steps <= distance / stride + 1; ++steps) {
    const int64_t rest = distance - steps * stride;
    const bool possible = steps < extents[0].size && -steps < extents[0].size && rest <= below && -rest <= below;
    if (possible && reaches(rest, extents + 1, count - 1)) return true;
  }
  return false;
}

bool empty(const View& x) {
  for (int64_t i = 0; i < x.dim; ++i) {
    if (x.sizes[i] == 0) return true;
  }
  return false;
}

}  // namespace

bool dense(const View& x) {
  Extent extents[kMaxTensorDims];
  const int count = moving(x, extents);
  return nested(extents, count) && (span(extents, count) + 1) * size_of(x.dtype) == bytes_of(x);
}

std::optional<Tensor> in_kept_memory(const View& view) {
  KeptBlock* const block = torch_from_blob != nullptr && worth_keeping(view) ? take_block(bytes_of(view)) : nullptr;
  if (block == nullptr) return std::nullopt;
  AtenTensorHandle result;
  const auto failed = torch_from_blob(
      block->data, view.dim, view.sizes, view.strides, 0, torch_code(view.dtype), aoti_torch_device_type_cpu(), -1,
      &result, aoti_torch_layout_strided(), nullptr, 0,
      [](void*, void* block) { give_back(static_cast<KeptBlock*>(block)); }, block);
  if (failed == 0) return Tensor(result);
  give_back(block);
  return std::nullopt;
}

// The stable ABI has no function for it.
Tensor empty_like(const Tensor& x, std::optional<ScalarType> dtype) {
  using torch::stable::detail::from;
  StableIValue stack[] = {Passed<Tensor>::give(x), from(dtype),        from(std::nullopt),
                          from(std::nullopt),      from(std::nullopt), from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION));
  return Passed<Tensor>::take(stack[0]);
}

Tensor contiguous_like(const Tensor& first, const View& view) {
  int64_t strides[kMaxTensorDims], expected = 1;
  for (int64_t i = view.dim - 1; i >= 0; expected *= std::max(view.sizes[i--], int64_t{1})) strides[i] = expected;
  View laid_out = view;
  laid_out.strides = strides;
  if (std::optional<Tensor> kept = in_kept_memory(laid_out)) return std::move(*kept);
  return empty_strided(first, view.dim, view.sizes, strides, torch_code(view.dtype));
}

bool streams_large(int64_t bytes, int inputs, int outputs) {
  const int64_t touched = bytes * (inputs + outputs), limit = int64_t{24} << 20;
  const int64_t traffic = touched + bytes * outputs;  // an ordinary store reads the result's memory too
  if (outputs > 1) return true;
  if (torch::stable::get_num_threads() > 1) return inputs > 2 ? traffic >= limit : touched > limit;
  return inputs > 1 || traffic >= int64_t{28} << 20;
}

bool overlaps_itself(const View& out) {
  Extent extents[kMaxTensorDims];
  const int count = moving(out, extents);
  return !empty(out) && !nested(extents, count);
}

bool may_alias(const View& out, const View& in) {
  if (empty(out)) return true;
  if (out.data == in.data && same_strides(out, in)) return true;
  Extent out_extents[kMaxTensorDims], in_extents[kMaxTensorDims];
  const int out_count = moving(out, out_extents), in_count = moving(in, in_extents);
  const int64_t out_size = size_of(out.dtype), in_size = size_of(in.dtype);
  const int64_t out_begin = reinterpret_cast<int64_t>(out.data), in_begin = reinterpret_cast<int64_t>(in.data);
  const int64_t out_end = out_begin + (span(out_extents, out_count) + 1) * out_size;
  const int64_t in_end = in_begin + (span(in_extents, in_count) + 1) * in_size;
  if (out_end <= in_begin || in_end <= out_begin) return true;
  const int64_t distance = in_begin - out_begin;
  return same_strides(out, in) && distance % out_size == 0 && nested(out_extents, out_count) &&
         !reaches(distance / out_size, out_extents, out_count);
}

void merge(const View* const* views, Operand* const* operands, int count, bool ordered, bool per_sample,
           Layout& layout) {
  const View& first = *views[0];
  layout.batch = first.sizes[0];
  layout.elements = 1;
  for (int64_t i = 1; i < first.dim; ++i) layout.elements *= first.sizes[i];

  int order[kMaxTensorDims];
  int kept = 0;
  for (int i = 1; i < first.dim; ++i) {
    if (first.sizes[i] == 1) continue;
    int place = kept++;
    for (; !ordered && place > 0 && first.strides[order[place - 1]] < first.strides[i]; --place) {
      order[place] = order[place - 1];
    }
    order[place] = i;
  }

  int dims = 0;
  for (int j = 0; j < kept; ++j) {
    const int64_t size = first.sizes[order[j]];
    bool joins = dims > 0;
    for (int k = 0; joins && k < count; ++k) {
      joins = operands[k]->strides[dims - 1] == views[k]->strides[order[j]] * size;
    }
    if (!joins) {
      STD_TORCH_CHECK(
          dims < kMaxDims,
          "bicm_kernels: more than 8 dimensions whose strides cannot be merged; those of x.contiguous() can be");
      layout.sizes[dims++] = 1;
    }
    layout.sizes[dims - 1] *= size;
    for (int k = 0; k < count; ++k) operands[k]->strides[dims - 1] = views[k]->strides[order[j]];
  }
  if (dims == 0) {
    layout.sizes[dims++] = 1;
    for (int k = 0; k < count; ++k) operands[k]->strides[0] = 1;
  }
  layout.dims = dims;

  bool flat = !per_sample && !ordered;
  for (int k = 0; k < count; ++k) {
    Operand& x = *operands[k];
    x.data = views[k]->data;
    x.dtype = views[k]->dtype;
    x.batch_stride = layout.batch == 1 ? layout.elements : views[k]->strides[0];
    x.dense = true;
    int64_t expected = 1;
    for (int dim = dims - 1; dim >= 0; --dim) {
      x.dense = x.dense && x.strides[dim] == expected;
      expected *= layout.sizes[dim];
    }
    flat = flat && x.dense && x.batch_stride == layout.elements;
  }
  if (flat) {
    layout.elements *= layout.batch;
    layout.batch = layout.batch == 0 ? 0 : 1;
    layout.dims = 1;
    layout.sizes[0] = layout.elements;
    for (int k = 0; k < count; ++k) {
      operands[k]->strides[0] = 1;
      operands[k]->batch_stride = layout.elements;
    }
  }
}

}  // namespace bicm
