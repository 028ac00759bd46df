// Python's tensors and numbers as arguments of ops, read without torch's dispatcher.
#include <algorithm>
#include <string>

#include "launchers.h"
#include "python_lookup.h"

// Not part of torch's stable ABI: whether a tensor has the negative bit, for which Python's method takes ten times as long.
namespace at {
class Tensor;
namespace native {
__attribute__((weak)) bool is_neg(const Tensor& self);
}
}  // namespace at

namespace bicm {

Torch torch_;

namespace {

using abi::ExchangedTensor, abi::kCpuDevice, abi::kCudaDevice;

// As a view has it; -1 for a device on which no direct call runs.
int32_t device_of(const ExchangedTensor& found) {
  if (found.device_type == kCpuDevice) return kHost;
  if (found.device_type != kCudaDevice || !has_launchers()) return -1;
  static const int32_t gpu = aoti_torch_device_type_cuda();
  return device_code(gpu, found.device_index);
}

bool untracked(PyObject* tensor) {
  if (!aoti_torch_grad_mode_is_enabled()) return true;
  PyObject* follows = PyObject_GetAttr(tensor, torch_.requires_grad);
  Py_XDECREF(follows);
  return follows == Py_False;
}

}  // namespace

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
