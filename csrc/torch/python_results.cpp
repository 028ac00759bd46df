// Tensors for results, made by torch or in kept memory.
#include <algorithm>

#include "launchers.h"
#include "python_lookup.h"

namespace bicm {
namespace {

using abi::ExchangedTensor, abi::ManagedTensor, abi::kCpuDevice;

// A tensor in a block of the free list; nullptr where it is small or there is none.
PyObject* object_in_kept_memory(const View& view, bool streamed) {
  struct Owner {
    ManagedTensor managed;
    KeptBlock* block;
  };
  KeptBlock* const block = worth_keeping(view) ? take_block(bytes_of(view), streamed) : nullptr;
  if (block == nullptr) return nullptr;
  const Kind& kind = kKinds[static_cast<size_t>(view.dtype)];
  const ExchangedTensor tensor = {block->data,
                                  kCpuDevice,
                                  0,
                                  static_cast<int32_t>(view.dim),
                                  kind.kind,
                                  kind.bits,
                                  1,
                                  const_cast<int64_t*>(view.sizes),
                                  const_cast<int64_t*>(view.strides),
                                  0};
  const auto deleter = [](ManagedTensor* self) {
    Owner* const owner = static_cast<Owner*>(self->context);
    give_back(owner->block);
    delete owner;
  };
  Owner* const owner = new Owner{{1, 0, nullptr, deleter, 0, tensor}, block};
  owner->managed.context = owner;
  void* made = nullptr;
  if (torch_.exchange->to_python(&owner->managed, &made) != 0) PyErr_Clear();
  return static_cast<PyObject*>(made);
}

// A requested allocation: (sizes, strides, dtype). Consecutive calls request the same.
class Allocation {
 public:
  static constexpr int64_t kDims = 8;

  Allocation() = default;
  explicit Allocation(const View& view) : dim_(view.dim), dtype_(view.dtype), arguments_(PyTuple_New(3)) {
    std::copy_n(view.sizes, dim_, sizes_);
    std::copy_n(view.strides, dim_, strides_);
    PyObject* const dtype = torch_.dtypes[static_cast<size_t>(dtype_)];
    Py_INCREF(dtype);
    PyTuple_SetItem(arguments_.get(), 0, tuple_of(sizes_));
    PyTuple_SetItem(arguments_.get(), 1, tuple_of(strides_));
    PyTuple_SetItem(arguments_.get(), 2, dtype);
  }

  bool fits(const View& view) const {
    return arguments_.get() != nullptr && view.dtype == dtype_ && view.dim == dim_ &&
           std::equal(sizes_, sizes_ + dim_, view.sizes) && std::equal(strides_, strides_ + dim_, view.strides);
  }
  PyObject* arguments() const { return arguments_.get(); }

 private:
  PyObject* tuple_of(const int64_t* numbers) const {
    PyObject* tuple = PyTuple_New(dim_);
    for (Py_ssize_t i = 0; i < dim_; ++i) PyTuple_SetItem(tuple, i, PyLong_FromLongLong(numbers[i]));
    return tuple;
  }

  int64_t dim_ = 0, sizes_[kDims] = {}, strides_[kDims] = {};
  DType dtype_ = DType::float32;
  Object arguments_;
};

}  // namespace

Object empty_in_layout_of(const Object& first, DType dtype) {
  View view = first.view;
  view.dtype = dtype;
  STD_TORCH_CHECK(contiguous(view) && view.dim <= Allocation::kDims, "bicm_kernels: expected a contiguous tensor");
  return like(first, view);
}

// Torch's function allocates on the current device and its current stream.
static PyObject* allocator_of(int32_t device) {
  if (on_host(device)) return torch_.empty_strided;
  STD_TORCH_CHECK(launchers().current_device() == index_of(device), "bicm_kernels: the device is not the current one");
  return torch_.empty_on_gpu;
}

Object like(const Object& first, const View& view, bool streamed) {
  static Allocation& last = *new Allocation();  // never destroyed: the interpreter ends before static objects do
  PyObject* made = object_in_kept_memory(view, streamed);
  if (made == nullptr) {
    const bool plain = contiguous(view) && view.dim <= Allocation::kDims;
    if (plain && !last.fits(view)) last = Allocation(view);
    made = plain ? PyObject_CallObject(allocator_of(view.device), last.arguments())
                 : PyObject_CallFunctionObjArgs(torch_.empty_like, first.get(), nullptr);
  }
  Object result(made);
  const bool lies = made != nullptr && look_into(made, result.view) && result.view.device == view.device;
  STD_TORCH_CHECK(lies, "bicm_kernels: no memory for the result");
  return result;
}

int64_t count_of(const Few<int64_t, kMostDims>& shape) {
  int64_t count = 1;
  for (size_t i = 0; i < shape.size(); ++i) {
    const bool fits = shape[i] > 0 && !__builtin_mul_overflow(count, shape[i], &count) && count <= int64_t{1} << 48;
    STD_TORCH_CHECK(fits, "bicm_kernels: no number of elements");
  }
  return count;
}

Object empty_on_host(Few<int64_t, kMostDims> shape, DType dtype) {
  int64_t sizes[kMostDims], strides[kMostDims], count = count_of(shape);
  for (size_t i = 0; i < shape.size(); ++i) {
    sizes[i] = shape[i];
    strides[i] = count = count / shape[i];
  }
  return like(Object(), View{nullptr, sizes, strides, static_cast<int64_t>(shape.size()), dtype, kHost});
}

bool makes_results_on_gpu(int32_t index) {
  if (torch_.empty_on_gpu == nullptr || index < 0) return false;
  PyObject* const float32 = torch_.dtypes[static_cast<size_t>(DType::float32)];
  const Object sample(PyObject_CallFunction(torch_.empty_on_gpu, "(ii)(ii)O", 2, 3, 3, 1, float32));
  const bool made = sample.get() != nullptr && abi::describes(*torch_.exchange, sample.get(), abi::kCudaDevice, index);
  PyErr_Clear();
  return made;
}

}  // namespace bicm
