// Functions and objects of torch, looked up once: what the sources share that take Python's tensors.
#pragma once

#include <array>

#include "python.h"
#include "torch_abi.h"

namespace bicm {

// In the order of DType.
struct Kind {
  uint8_t kind, bits;
  const char* name;
};
inline constexpr Kind kKinds[] = {{abi::kFloat, 16, "torch.float16"}, {abi::kBfloat, 16, "torch.bfloat16"},
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
extern Torch torch_;

inline bool is_of_torch(PyObject* object) { return reinterpret_cast<PyObject*>(Py_TYPE(object)) == torch_.tensor; }

// What a kernel needs of a tensor; false where none can take it.
bool look_into(PyObject* object, View& view);

}  // namespace bicm
