#include "python.h"

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <vector>

#include "launchers.h"
#include "torch_abi.h"

// Not part of torch's stable ABI. Since torch 1.9: whether a record function is active.
namespace at {
__attribute__((weak)) bool hasCallbacks();
}
// Python's functions for these take ten times as long: the active torch.func transforms; TorchScript's tracing state, null
// where it does not trace; and whether a tensor has the negative bit.
namespace at::functorch {
struct DynamicLayer;
__attribute__((weak)) const std::vector<DynamicLayer>& getDynamicLayerStack();
}  // namespace at::functorch
namespace torch::jit::tracer {
struct TracingState;
__attribute__((weak)) const std::shared_ptr<TracingState>& getTracingState();
}  // namespace torch::jit::tracer
namespace at {
class Tensor;
namespace native {
__attribute__((weak)) bool is_neg(const Tensor& self);
}
}  // namespace at

namespace bicm {
namespace {

using abi::ExchangedTensor, abi::ManagedTensor, abi::kCpuDevice, abi::kCudaDevice;

// In the order of DType.
struct Kind {
  uint8_t kind, bits;
  const char* name;
};
constexpr Kind kKinds[] = {{abi::kFloat, 16, "torch.float16"}, {abi::kBfloat, 16, "torch.bfloat16"},
                           {abi::kFloat, 32, "torch.float32"}, {abi::kFloat, 64, "torch.float64"},
                           {abi::kSigned, 32, "torch.int32"},  {abi::kSigned, 64, "torch.int64"}};

// A function or method of torch without arguments. A plain C function is called through its address: going through
// Python's call takes three times as long.
class Question {
 public:
  Question() = default;
  explicit Question(PyObject* function) : function_(function) {
    if (!PyCFunction_Check(function) || PyCFunction_GetFlags(function) != METH_NOARGS) return;
    address_ = PyCFunction_GetFunction(function);
    self_ = PyCFunction_GetSelf(function);
  }

  // Whether a method can be called on another object than the one it was looked up in.
  bool any_self() const { return address_ != nullptr; }

  // `self`: for a method, its object.
  bool says_no(PyObject* self = nullptr) const {
    PyObject* answer =
        address_ == nullptr ? PyObject_CallNoArgs(function_) : address_(self == nullptr ? self_ : self, nullptr);
    const bool no = answer != nullptr && PyObject_IsTrue(answer) == 0;
    Py_XDECREF(answer);
    return no;
  }

 private:
  PyObject* function_ = nullptr;
  PyCFunction address_ = nullptr;
  PyObject* self_ = nullptr;
};

// Functions and objects of torch, looked up once.
struct Torch {
  PyObject *tensor, *empty_strided, *empty_like, *forward_mode, *profiler, *implementations;
  // Asks for the hooks for saved tensors; nullptr where torch has no such function.
  PyObject* saving_hooks;
  // Makes a tensor on the current GPU; nullptr where torch has no such function.
  PyObject* empty_on_gpu;
  Question is_negated, is_tracing, transforms;
  // Active modes that must intercept ops.
  std::array<Question, 2> watchers;
  std::array<PyObject*, std::size(kKinds)> dtypes;
  PyObject *requires_grad, *profiling, *level;
  const abi::Exchange* exchange;
  // How many implementations were registered from Python at the last check whether one replaces ours.
  Py_ssize_t known_implementations = -1;
};
Torch torch_;

// As a view has it; -1 for a device on which no direct call runs.
int32_t device_of(const ExchangedTensor& found) {
  if (found.device_type == kCpuDevice) return kHost;
  if (found.device_type != kCudaDevice || !has_launchers()) return -1;
  static const int32_t gpu = aoti_torch_device_type_cuda();
  return device_code(gpu, found.device_index);
}

bool look_into(PyObject* object, View& view) {
  ExchangedTensor found;
  if (torch_.exchange->look_into(object, &found) != 0) return false;
  const int32_t device = device_of(found);
  if (device < 0 || found.data == nullptr || found.dim > kMaxTensorDims) return false;
  for (size_t i = 0; i < std::size(kKinds); ++i) {
    if (kKinds[i].kind != found.kind || kKinds[i].bits != found.bits) continue;
    view = {static_cast<char*>(found.data) + found.byte_offset,
            found.sizes,
            found.strides,
            found.dim,
            static_cast<DType>(i),
            device};
    return found.lanes == 1;
  }
  return false;
}

bool is_of_torch(PyObject* object) { return reinterpret_cast<PyObject*>(Py_TYPE(object)) == torch_.tensor; }

bool untracked(PyObject* tensor) {
  if (!aoti_torch_grad_mode_is_enabled()) return true;
  PyObject* follows = PyObject_GetAttr(tensor, torch_.requires_grad);
  Py_XDECREF(follows);
  return follows == Py_False;
}

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

PyObject* find(const char* path) {
  PyObject* found = nullptr;
  const std::string names(path);
  for (size_t begin = 0, end; begin <= names.size(); begin = end + 1) {
    end = std::min(names.find('.', begin), names.size());
    const std::string name = names.substr(begin, end - begin);
    PyObject* next =
        found == nullptr ? PyImport_ImportModule(name.c_str()) : PyObject_GetAttrString(found, name.c_str());
    Py_XDECREF(found);
    if (next == nullptr) return nullptr;
    found = next;
  }
  return found;
}

// Whether operations are recorded: by the profiler only, where torch does not export the full check.
static bool recorded() {
  if (at::hasCallbacks != nullptr) return at::hasCallbacks();
  return PyDict_GetItemWithError(torch_.profiler, torch_.profiling) != Py_False;
}

void know_implementations(int64_t count) { torch_.known_implementations = static_cast<Py_ssize_t>(count); }

bool nobody_replaced_ops() { return PySet_Size(torch_.implementations) == torch_.known_implementations; }

bool transformed() {
  if (at::functorch::getDynamicLayerStack != nullptr) return !at::functorch::getDynamicLayerStack().empty();
  return !torch_.transforms.says_no();
}

static bool traced() {
  if (torch::jit::tracer::getTracingState != nullptr) return torch::jit::tracer::getTracingState() != nullptr;
  return !torch_.is_tracing.says_no();
}

bool nobody_transforms() {
  for (const Question& watcher : torch_.watchers) {
    if (!watcher.says_no()) return false;
  }
  PyObject* level = PyDict_GetItemWithError(torch_.forward_mode, torch_.level);
  return level != nullptr && PyLong_AsLong(level) < 0 && !transformed() && !traced();
}

bool nobody_watches() { return nobody_transforms() && !recorded(); }

bool is_tensor(PyObject* object) {
  return PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(torch_.tensor)) != 0;
}

bool is_plain_tensor(PyObject* object) { return is_of_torch(object); }

int64_t place_of(PyObject* element, PyObject* row) {
  ExchangedTensor one, all;
  if (!is_of_torch(element) || !is_of_torch(row)) return -1;
  if (torch_.exchange->look_into(element, &one) != 0 || torch_.exchange->look_into(row, &all) != 0) return -1;
  const bool alike = one.kind == all.kind && one.bits == all.bits && one.device_type == all.device_type;
  if (!alike || one.dim != 0 || all.dim != 1 || one.device_index != all.device_index) return -1;
  const int64_t spacing = all.strides[0] * all.bits / 8;
  const int64_t distance =
      (static_cast<char*>(one.data) + one.byte_offset) - (static_cast<char*>(all.data) + all.byte_offset);
  if (spacing <= 0 || distance < 0 || distance % spacing != 0) return -1;
  return distance / spacing < all.sizes[0] ? distance / spacing : -1;
}

bool is_untracked_tensor(PyObject* object) { return is_of_torch(object) && untracked(object); }

bool is_on(PyObject* tensor, int64_t devices) {
  ExchangedTensor found;
  const bool known = is_of_torch(tensor) && torch_.exchange->look_into(tensor, &found) == 0;
  return known && (devices >> found.device_type & 1) != 0;
}

bool read(PyObject* from, PythonArguments::Mask& to) {
  if (from == Py_None) return true;
  ExchangedTensor found;
  if (!is_of_torch(from) || torch_.exchange->look_into(from, &found) != 0) return false;
  to.device = device_of(found);
  const bool bools = found.kind == abi::kBool && found.bits == 8;
  const bool integers = found.kind == abi::kSigned && found.bits == 64;
  if (to.device < 0 || !(bools || integers) || found.dim != 1 || found.data == nullptr) return false;
  const char* const data = static_cast<char*>(found.data) + found.byte_offset;
  to.rows = {bools ? reinterpret_cast<const bool*>(data) : nullptr,
             integers ? reinterpret_cast<const int64_t*>(data) : nullptr, found.strides[0]};
  to.count = found.sizes[0];
  return true;
}

bool is_tracked(PyObject* tensor) { return !untracked(tensor); }

bool saves_through_hooks() {
  if (torch_.saving_hooks == nullptr) return true;
  PyObject* const hooks = PyObject_CallFunctionObjArgs(torch_.saving_hooks, Py_True, nullptr);
  if (hooks == nullptr) PyErr_Clear();
  Py_XDECREF(hooks);
  return hooks != Py_None;
}

static bool negated(PyObject* tensor) {
  if (at::native::is_neg == nullptr || !abi::tensors_have_handles()) return !torch_.is_negated.says_no(tensor);
  return at::native::is_neg(*reinterpret_cast<const at::Tensor*>(abi::handle_of(tensor)));
}

bool look_into_plain(PyObject* from, View& view) {
  // A view with the negative bit is not ordinary memory.
  return is_of_torch(from) && look_into(from, view) && !negated(from);
}

bool read(PyObject* from, Object& to) {
  View view;
  if (!look_into_plain(from, view) || !untracked(from)) return false;
  Py_INCREF(from);
  to = Object(from, view);
  return true;
}

bool read(PyObject* from, DType& to) {
  for (size_t i = 0; i < torch_.dtypes.size(); ++i) {
    if (torch_.dtypes[i] == from) return to = static_cast<DType>(i), true;
  }
  return false;
}

void* bytes_of(PyObject* tensor, int64_t& count) {
  ExchangedTensor found;
  if (!is_of_torch(tensor) || torch_.exchange->look_into(tensor, &found) != 0) return nullptr;
  const bool bytes = found.device_type == kCpuDevice && found.kind == abi::kUnsigned && found.bits == 8;
  if (!bytes || found.dim != 1 || found.strides[0] != 1) return nullptr;
  count = found.sizes[0];
  return static_cast<char*>(found.data) + found.byte_offset;
}

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
  const bool made = sample.get() != nullptr && abi::describes(*torch_.exchange, sample.get(), kCudaDevice, index);
  PyErr_Clear();
  return made;
}

bool open_torch() {
  const std::pair<PyObject**, const char*> objects[] = {
      {&torch_.tensor, "torch.Tensor"},
      {&torch_.empty_strided, "torch._C._dynamo.guards._empty_strided_cpu"},
      {&torch_.empty_like, "torch.empty_like"},
      {&torch_.forward_mode, "torch.autograd.forward_ad.__dict__"},
      {&torch_.profiler, "torch.autograd.profiler.__dict__"},
      {&torch_.implementations, "torch.library._impls"},
  };
  const char* const watchers[] = {"torch._C._len_torch_dispatch_stack", "torch._C._len_torch_function_stack"};
  bool found = true;
  const auto look_up = [&found](const char* path) {
    PyObject* object = found ? find(path) : nullptr;
    found = object != nullptr;
    return object;
  };
  for (const auto& [object, path] : objects) *object = look_up(path);
  for (size_t i = 0; i < std::size(kKinds); ++i) torch_.dtypes[i] = look_up(kKinds[i].name);
  for (size_t i = 0; i < std::size(watchers); ++i) {
    if (PyObject* function = look_up(watchers[i])) torch_.watchers[i] = Question(function);
  }
  if (PyObject* function = look_up("torch._C._is_tracing")) torch_.is_tracing = Question(function);
  if (PyObject* function = look_up("torch._C._functorch.peek_interpreter_stack"))
    torch_.transforms = Question(function);
  torch_.saving_hooks = find("torch._C._autograd._top_saved_tensors_default_hooks");
  torch_.empty_on_gpu = find("torch._C._dynamo.guards._empty_strided_cuda");
  torch_.requires_grad = PyUnicode_InternFromString("requires_grad");
  torch_.profiling = PyUnicode_InternFromString("_is_profiler_enabled");
  torch_.level = PyUnicode_InternFromString("_current_level");
  PyObject* const table = look_up("torch.Tensor.__dlpack_c_exchange_api__");
  PyObject* const tensor = found ? PyObject_CallFunction(torch_.tensor, nullptr) : nullptr;
  PyObject* const is_neg = tensor != nullptr ? PyObject_GetAttrString(tensor, "is_neg") : nullptr;
  if (is_neg != nullptr) torch_.is_negated = Question(is_neg);
  PyObject* const float32 = torch_.dtypes[static_cast<size_t>(DType::float32)];
  PyObject* const sample =
      found ? PyObject_CallFunction(torch_.empty_strided, "(ii)(ii)O", 2, 3, 3, 1, float32) : nullptr;
  if (sample != nullptr) torch_.exchange = abi::exchange_in(table, sample);
  Py_XDECREF(sample);
  PyErr_Clear();
  const bool a_set = found && PySet_Check(torch_.implementations);
  return a_set && torch_.is_negated.any_self() && torch_.exchange != nullptr;
}

}  // namespace bicm
