// The functions of `bicm_kernels.inputs`, whose Python twins say what they mean.
#include "inputs.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <vector>

#include "python.h"
#include "torch_abi.h"

namespace bicm {
namespace {

constexpr char kCapsule[] = "bicm_kernels.Inputs";

// Bits of an answer, as `bicm_kernels.inputs` names them.
constexpr long kReady = 1, kSingle = 2, kOther = 4, kAlike = 16;

struct Named {
  Object name, value;
};

// What was read of an object's attributes.
struct Inputs {
  struct Source : Named {
    bool is_tensor = false;
    // -1: without a version counter.
    long long version = -1;
  };
  std::vector<Source> sources;
  std::vector<Object> absent;
  // The attribute that holds the options, and those.
  Object configuration;
  std::vector<Named> options;
  // Whether a tensor with a gradient to record makes a difference.
  bool records = false;
};

// Names that are asked for, and what was looked up once.
struct Known {
  PyObject *version, *pending, *step_index, *foresees, *scaled;
  // torch.compiler's attributes, and the one that says whether a graph is made.
  PyObject *compiler, *compiling;
  // OrderedDict's own `__setitem__`.
  objobjargproc set_item;
};
Known known_;

Object kept(PyObject* borrowed) { return Object(Py_NewRef(borrowed)); }

long long version_of(PyObject* tensor) {
  const Object version(PyObject_GetAttr(tensor, known_.version));
  return version.get() == nullptr ? -1 : PyLong_AsLongLong(version.get());
}

// The same object, or an equal one that is no tensor: two tensors of equal numbers may differ later.
bool same(PyObject* now, PyObject* then) {
  if (now == then) return true;
  if (now == nullptr || is_tensor(now) || is_tensor(then)) return false;
  return PyObject_RichCompareBool(now, then, Py_EQ) == 1;
}

bool are_unchanged(const Inputs& inputs, PyObject* own) {
  const bool records = inputs.records && aoti_torch_grad_mode_is_enabled();
  for (const auto& source : inputs.sources) {
    PyObject* const now = PyDict_GetItemWithError(own, source.name.get());
    if (!same(now, source.value.get())) return false;
    if (source.version >= 0 && version_of(now) != source.version) return false;
    if (records && source.is_tensor && is_tracked(now)) return false;
  }
  for (const Object& name : inputs.absent) {
    if (PyDict_GetItemWithError(own, name.get()) != nullptr) return false;
  }
  if (inputs.options.empty()) return true;
  PyObject* const configuration = PyDict_GetItemWithError(own, inputs.configuration.get());
  if (configuration == nullptr) return false;
  // Attributes, which may differ from the items.
  const Object attributes(PyObject_GenericGetDict(configuration, nullptr));
  if (attributes.get() == nullptr || !PyDict_Check(attributes.get())) return false;
  for (const auto& [name, value] : inputs.options) {
    if (!same(PyDict_GetItemWithError(attributes.get(), name.get()), value.get())) return false;
  }
  return true;
}

// Whether torch runs a graph's code outside of Dynamo, which Python asks for itself.
bool compiles() { return PyDict_GetItemWithError(known_.compiler, known_.compiling) != Py_False; }

// What is known of a call's arguments, one after the other.
class Look {
 public:
  // False for an argument that Python has to look at.
  bool at(PyObject* argument) {
    if (!is_tensor(argument)) return true;
    if (!is_plain_tensor(argument)) return false;
    if (!abi::tensors_have_handles()) return answer_ = kReady | kOther, true;
    const AtenTensorHandle tensor = abi::handle_of(argument);
    static const int32_t single = aoti_torch_dtype_float32();
    int32_t dtype = -1;
    int64_t dim = -1;
    aoti_torch_get_dtype(tensor, &dtype);
    aoti_torch_get_dim(tensor, &dim);
    if (dtype != single) answer_ |= kOther;
    if ((dtype != single && dim != 0) || is_tracked(argument)) answer_ &= ~(kSingle | kAlike);
    if (dim != 0 && !is_alike(tensor, dim)) answer_ &= ~kAlike;
    return true;
  }

  long answer() const { return dim_ > 0 ? answer_ : answer_ & ~kAlike; }

 private:
  bool is_alike(AtenTensorHandle tensor, int64_t dim) {
    static const int32_t host = aoti_torch_device_type_cpu(), strided = aoti_torch_layout_strided();
    int32_t device = -1, layout = -1;
    int64_t* sizes = nullptr;
    aoti_torch_get_device_type(tensor, &device);
    aoti_torch_get_layout(tensor, &layout);
    if (device != host || layout != strided || aoti_torch_get_sizes(tensor, &sizes) != 0) return false;
    if (dim_ == 0) sizes_ = sizes, dim_ = dim;
    return dim == dim_ && std::equal(sizes, sizes + dim, sizes_);
  }

  long answer_ = kReady | kSingle | kAlike;
  const int64_t* sizes_ = nullptr;
  int64_t dim_ = 0;
};

long look_at_all(PyObject* arguments, PyObject* named) {
  Look look;
  if (!each(arguments, [&](PyObject* argument, bool) { return look.at(argument); })) return 0;
  PyObject *name, *argument;
  for (Py_ssize_t at = 0; PyDict_Next(named, &at, &name, &argument) != 0;) {
    if (!look.at(argument)) return 0;
  }
  return look.answer();
}

const Inputs* inputs_in(PyObject* capsule) {
  return static_cast<const Inputs*>(PyCapsule_GetPointer(capsule, kCapsule));
}

PyObject* answered(bool answer) {
  PyErr_Clear();
  return PyBool_FromLong(answer);
}

// (((name, value, version or None), ...), (name of an absent attribute, ...), name of the configuration,
// ((option, value), ...), whether gradients matter)
PyObject* note(PyObject*, PyObject* arguments) {
  PyObject *sources, *absent, *configuration, *options;
  int records;
  if (!PyArg_ParseTuple(arguments, "O!O!OO!p", &PyTuple_Type, &sources, &PyTuple_Type, &absent, &configuration,
                        &PyTuple_Type, &options, &records)) {
    return nullptr;
  }
  auto* const inputs = new Inputs;
  inputs->records = records != 0;
  inputs->configuration = kept(configuration);
  const auto item = [](PyObject* tuple, Py_ssize_t i) { return PyTuple_GetItem(tuple, i); };
  each(sources, [&](PyObject* source, bool) {
    PyObject *const value = item(source, 1), *const version = item(source, 2);
    inputs->sources.push_back(
        {{kept(item(source, 0)), kept(value)}, is_tensor(value), version == Py_None ? -1 : PyLong_AsLongLong(version)});
    return true;
  });
  each(absent, [&](PyObject* name, bool) { return inputs->absent.push_back(kept(name)), true; });
  each(options, [&](PyObject* option, bool) {
    return inputs->options.push_back({kept(item(option, 0)), kept(item(option, 1))}), true;
  });
  return PyCapsule_New(inputs, kCapsule, [](PyObject* capsule) { delete inputs_in(capsule); });
}

// (inputs, attributes)
PyObject* unchanged(PyObject*, PyObject* const* given, Py_ssize_t) {
  const Inputs* const inputs = inputs_in(given[0]);
  return inputs == nullptr ? nullptr : answered(are_unchanged(*inputs, given[1]));
}

// (inputs, attributes, arguments, named arguments)
PyObject* ready(PyObject*, PyObject* const* given, Py_ssize_t) {
  const Inputs* const inputs = inputs_in(given[0]);
  if (inputs == nullptr) return nullptr;
  const bool ready = !compiles() && are_unchanged(*inputs, given[1]);
  const long answer = ready ? look_at_all(given[2], given[3]) : 0;
  PyErr_Clear();
  return PyLong_FromLong(answer);
}

// What was made ahead for a tensor: (weak reference, version, step, result, inputs).
bool was_made_for(PyObject* pending, PyObject* own, PyObject* tensor) {
  if (!PyTuple_Check(pending) || PyTuple_Size(pending) != 5) return false;
  const auto item = [pending](Py_ssize_t i) { return PyTuple_GetItem(pending, i); };
  const Object referred(PyObject_CallNoArgs(item(0)));
  if (referred.get() != tensor) return false;
  PyObject* const step = PyDict_GetItemWithError(own, known_.step_index);
  if (step == nullptr || !same(step, item(2)) || version_of(tensor) != PyLong_AsLongLong(item(1))) return false;
  // Autograd has no record of the result as a function of the tensor.
  if (is_tracked(tensor)) return false;
  const Inputs* const inputs = inputs_in(item(4));
  return inputs != nullptr && are_unchanged(*inputs, own);
}

// (attributes, tensor)
PyObject* foreseen(PyObject*, PyObject* const* given, Py_ssize_t) {
  PyObject *const own = given[0], *const tensor = given[1];
  PyObject* const pending = PyDict_GetItemWithError(own, known_.pending);
  if (pending == nullptr || pending == Py_None || compiles()) return PyErr_Clear(), Py_NewRef(Py_None);
  const Object owned = kept(pending);
  PyDict_SetItem(own, known_.pending, Py_None);
  if (!was_made_for(pending, own, tensor)) {
    PyErr_Clear();
    PyDict_SetItem(own, known_.foresees, Py_False);
    return Py_NewRef(Py_None);
  }
  if (PyDict_GetItemWithError(own, known_.scaled) == Py_False) PyDict_SetItem(own, known_.scaled, Py_True);
  return Py_NewRef(PyTuple_GetItem(pending, 3));
}

// (class, name, value, ...): an object of a subclass of OrderedDict with these items and attributes.
PyObject* output(PyObject*, PyObject* const* given, Py_ssize_t count) {
  auto* const cls = reinterpret_cast<PyTypeObject*>(given[0]);
  const auto make = reinterpret_cast<newfunc>(PyType_GetSlot(cls, Py_tp_new));
  static PyObject* const nothing = PyTuple_New(0);
  Object made(make(cls, nothing, nullptr));
  if (made.get() == nullptr) return nullptr;
  const Object attributes(PyObject_GenericGetDict(made.get(), nullptr));
  if (attributes.get() == nullptr) return nullptr;
  for (Py_ssize_t i = 1; i + 1 < count; i += 2) {
    if (PyDict_SetItem(attributes.get(), given[i], given[i + 1]) != 0) return nullptr;
    if (known_.set_item(made.get(), given[i], given[i + 1]) != 0) return nullptr;
  }
  return made.release();
}

// (row of numbers, tensor): which of the numbers a 0-d tensor is, by its address; None where it is none of them.
PyObject* place_in(PyObject*, PyObject* const* given, Py_ssize_t) {
  const int64_t place = transformed() ? -1 : place_of(given[1], given[0]);
  PyErr_Clear();
  return place < 0 ? Py_NewRef(Py_None) : PyLong_FromLongLong(place);
}

template <PyObject* (*Function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(Function)), METH_FASTCALL, nullptr};
}

}  // namespace

bool add_inputs(PyObject* module) {
  static PyMethodDef methods[] = {
      {"note", note, METH_VARARGS, nullptr}, method<&unchanged>("unchanged"), method<&ready>("ready"),
      method<&foreseen>("foreseen"),         method<&output>("output"),       method<&place_in>("place_in"),
      {nullptr, nullptr, 0, nullptr},
  };
  const std::pair<PyObject**, const char*> names[] = {{&known_.version, "_version"},
                                                      {&known_.pending, "_pending"},
                                                      {&known_.step_index, "_step_index"},
                                                      {&known_.foresees, "_foresees"},
                                                      {&known_.scaled, "is_scale_input_called"},
                                                      {&known_.compiling, "_is_compiling_flag"}};
  for (const auto& [place, name] : names) *place = PyUnicode_InternFromString(name);
  PyObject* const ordered = find("collections.OrderedDict");
  known_.compiler = find("torch.compiler.__dict__");
  if (ordered != nullptr && PyType_Check(ordered)) {
    void* const slot = PyType_GetSlot(reinterpret_cast<PyTypeObject*>(ordered), Py_mp_ass_subscript);
    known_.set_item = reinterpret_cast<objobjargproc>(slot);
  }
  Py_XDECREF(ordered);
  PyErr_Clear();
  // Python's own functions are used where torch has another way to say that a graph is made.
  const bool known = known_.compiler != nullptr && PyDict_Check(known_.compiler) && known_.set_item != nullptr &&
                     PyDict_GetItemWithError(known_.compiler, known_.compiling) == Py_False;
  return !known || PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace bicm
