// Python's tensors and numbers as the step ops take them: the flavour of a schema that bypasses the dispatcher.
//
// Tensors are read through DLPack's exchange table, an ABI that torch provides for its exact type.
#pragma once

#include <Python.h>

#include <utility>

#include "noise.h"

namespace bicm {

// An object by its path, which begins with modules that are imported; nullptr, with an error, where there is none.
PyObject* find(const char* path);

// Looks up the functions of torch; false where one is missing.
bool open_torch();

// Whether torch makes results on a GPU, the current one, and describes them as lying there.
bool makes_results_on_gpu(int32_t index);

// Whether a torch.func transform is active, whose tensors wrap others.
bool transformed();

// Whether no tracing, transform or override is active; and whether no recording is active either.
bool nobody_transforms();
bool nobody_watches();

// Whether no implementation was registered from Python since the last check found none that replaces ours.
bool nobody_replaced_ops();
void know_implementations(int64_t count);

// A reference to a Python tensor, and its properties for a kernel.
class Object {
 public:
  Object() = default;
  explicit Object(PyObject* owned, const View& view = {}) : view(view), object_(owned) {}
  Object(const Object& other) : view(other.view), object_(other.object_) { Py_XINCREF(object_); }
  Object(Object&& other) noexcept : view(other.view), object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object other) noexcept {
    view = other.view;
    std::swap(object_, other.object_);
    return *this;
  }
  ~Object() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

  View view = {};

 private:
  PyObject* object_ = nullptr;
};

inline View view_of(const Object& object, Kinds kinds = Kinds::floating) {
  const bool floating = object.view.dtype != DType::int32 && object.view.dtype != DType::int64;
  STD_TORCH_CHECK(floating || kinds == Kinds::integers_too, "bicm_kernels: expected a tensor of another dtype");
  return object.view;
}

// Whether autograd would record an operation on a tensor.
bool is_tracked(PyObject* tensor);

// Whether hooks pack what is saved for the backward pass, or nobody knows.
bool saves_through_hooks();

// False unless it is a tensor of torch's own type, with plain memory, on the CPU or on a GPU that is called directly.
bool look_into_plain(PyObject* from, View& view);

// The same with no derivative to record.
bool read(PyObject* from, Object& to);

bool read(PyObject* from, DType& to);

inline bool read(PyObject* from, bool& to) {
  to = from == Py_True;
  return PyBool_Check(from);
}

inline bool read(PyObject* from, double& to) {
  if (!PyFloat_CheckExact(from)) return false;
  to = PyFloat_AsDouble(from);
  return true;
}

// Seeds above the signed range denote the integer with the same bits.
inline bool read(PyObject* from, int64_t& to) {
  if (!PyLong_CheckExact(from)) return false;
  int overflow;
  to = PyLong_AsLongLongAndOverflow(from, &overflow);
  if (overflow > 0) to = static_cast<int64_t>(PyLong_AsUnsignedLongLong(from));
  return overflow >= 0 && PyErr_Occurred() == nullptr;
}

// The address and length of a contiguous byte tensor on the CPU; null for anything else.
void* bytes_of(PyObject* tensor, int64_t& count);

// Whether an object is a tensor of torch's own type, on any device, that autograd does not track.
bool is_untracked_tensor(PyObject* object);

// Whether an object is a tensor, of torch's own type or of a subclass; and whether it is of the former.
bool is_tensor(PyObject* object);
bool is_plain_tensor(PyObject* object);

// Where a 0-d tensor lies in a 1-d one, by its address; -1 where it does not.
int64_t place_of(PyObject* element, PyObject* row);

// Whether such a tensor is on one of these devices, bits by DLPack's codes.
bool is_on(PyObject* tensor, int64_t devices);

// An uninitialised tensor in the dtype and layout of another; `streamed`: it will be written with non-temporal stores.
// On a GPU it is of the current stream; throws where that GPU is not the current one.
Object like(const Object& first, const View& view, bool streamed = false);

// The same in another dtype; throws where the tensor is not contiguous.
Object empty_in_layout_of(const Object& first, DType dtype);

inline Object row_like(const Object& first, int64_t size, DType dtype) {
  const int64_t stride = 1;
  return like(first, View{nullptr, &size, &stride, 1, dtype, first.view.device});
}

inline Object nothing_like(const Object&) { return Object(); }

inline bool is_sequence(PyObject* value) { return PyList_Check(value) || PyTuple_Check(value); }

inline bool is_pair(PyObject* value) {
  return is_sequence(value) && (PyList_Check(value) ? PyList_Size(value) : PyTuple_Size(value)) == 2;
}

// Visits the items of a list or tuple with whether each is the last; false for anything else, or where a visit says so.
template <class Visit>
bool each(PyObject* sequence, Visit visit) {
  const bool list = PyList_Check(sequence);
  if (!is_sequence(sequence)) return false;
  const Py_ssize_t count = list ? PyList_Size(sequence) : PyTuple_Size(sequence);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!visit(list ? PyList_GetItem(sequence, i) : PyTuple_GetItem(sequence, i), i == count - 1)) return false;
  }
  return true;
}

// Lets other threads have the interpreter for as long as it lives.
class Released {
 public:
  Released() : state_(PyEval_SaveThread()) {}
  ~Released() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

// At most N of something, without a heap.
template <class T, size_t N>
class Few {
 public:
  Few() = default;
  Few(std::initializer_list<T> items) {
    for (const T& item : items) items_[size_++] = item;
  }
  size_t size() const { return size_; }
  const T& operator[](size_t i) const { return items_[i]; }
  T* add() { return size_ < N ? &items_[size_++] : nullptr; }

 private:
  T items_[N] = {};
  size_t size_ = 0;
};

constexpr size_t kMostDims = 8;

// The number of elements; throws where it is 0 or overflows.
int64_t count_of(const Few<int64_t, kMostDims>& shape);

// As torch.empty on the host; throws where it would be empty.
Object empty_on_host(Few<int64_t, kMostDims> shape, DType dtype);

// The tensors of a step; the last two may be a pair (eps_uncond, eps_cond).
struct StepTensors : Few<Object, kMaxTerms + 1> {
  using Few::Few;
  bool paired = false;
};

// A number, or a tensor.
template <class T>
struct OrTensor {
  T value = 0;
  Object tensor;
  bool is_tensor() const { return tensor.get() != nullptr; }
};

struct PythonArguments {
  using Tensor = Object;
  using Tensors = StepTensors;
  using Coefficient = OrTensor<double>;
  using Coefficients = Few<Coefficient, kMaxTerms>;
  struct Guidance {
    Coefficient scale;
    bool given = false;
  };
  using Maybe = std::optional<Coefficient>;
  using Counter = OrTensor<int64_t>;
  using Seed = std::optional<Counter>;
  struct Mask {
    Replaced rows;
    int64_t count = 0;
    int32_t device = kHost;
    bool has_value() const { return rows.rows != nullptr || rows.places != nullptr; }
  };
};

// False for what is not a (B,) bool or int64 tensor, or None.
bool read(PyObject* from, PythonArguments::Mask& to);

using PythonStep = Step<PythonArguments>;

template <class T>
Number given(Inputs<PythonArguments>& inputs, const OrTensor<T>& value) {
  return value.is_tensor() ? inputs.number(value.tensor) : number_of(value.value);
}
inline Number given(Inputs<PythonArguments>& inputs, const PythonArguments::Maybe& value) {
  return value.has_value() ? given(inputs, *value) : number_of(0.0);
}
inline Number given(PythonStep& step, const PythonArguments::Guidance& guidance) {
  const bool paired = step.tensors().paired;
  STD_TORCH_CHECK(guidance.given == paired && paired == step.m.guided, "bicm_kernels: guidance goes with a pair");
  return given(step, guidance.scale);
}

struct KeyObjects {
  const PythonArguments::Counter &seed, &step, &sample;
};

inline NoiseKey key_of(const KeyObjects& key, int64_t batch, int32_t device) {
  const auto integer = [&](const PythonArguments::Counter& x) {
    if (x.is_tensor()) return integer_of(view_of(x.tensor, Kinds::integers_too), batch, device);
    return integer_of(x.value);
  };
  const NoiseKey numbers = key_of(KeyNumbers{key.seed.value, key.step.value, key.sample.value}, batch, device);
  const bool per_sample = key.seed.tensor.view.dim == 1;
  STD_TORCH_CHECK(!per_sample || (!key.sample.is_tensor() && key.sample.value == 0),
                  "bicm_kernels: a seed per sample leaves sample_id at 0");
  return {integer(key.seed), integer(key.step), integer(key.sample),
          numbers.counts && !per_sample && key.sample.tensor.view.dim == 0};
}

inline Replaced replaced_rows(const PythonArguments::Mask& mask, const View& first) {
  STD_TORCH_CHECK(!mask.has_value() || (mask.count == first.sizes[0] && mask.device == first.device),
                  "bicm_kernels: mask must be a (B,) bool tensor");
  return mask.rows;
}

inline NoiseKey key_given(const Inputs<PythonArguments>& inputs, const PythonArguments::Seed& seed,
                          const PythonArguments::Counter& at, const PythonArguments::Counter& sample) {
  STD_TORCH_CHECK(seed.has_value(), "bicm_kernels: noise without a seed");
  return key_of(KeyObjects{*seed, at, sample}, inputs.batch(), inputs.first().device);
}

inline void draw_noise(PythonStep& step, const PythonArguments::Coefficient& weight, const PythonArguments::Seed& seed,
                       const PythonArguments::Counter& at, const PythonArguments::Counter& sample) {
  STD_TORCH_CHECK(seed.has_value() || (!weight.is_tensor() && weight.value == 0.0),
                  "bicm_kernels: noise without a key");
  if (seed.has_value()) step.noise(given(step, weight), key_given(step, seed, at, sample));
}

}  // namespace bicm
