#include "dispatcher.h"

#include <algorithm>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "python.h"
#include "torch_abi.h"

namespace bicm {
namespace {

// By its full name alone: for torch's handles there are two others.
template <class T>
StableIValue stable(const T& value) {
  return torch::stable::detail::from(value);
}

// What an argument of a schema with numbers may be.
enum class Kind { tensors, tensor, maybe_tensor, numbers, number, maybe_number, integer, maybe_integer, flag, dtype };

constexpr std::pair<const char*, Kind> kTypes[] = {{"Tensor[]", Kind::tensors},      {"Tensor", Kind::tensor},
                                                   {"Tensor(a!)", Kind::tensor},     {"Tensor?", Kind::maybe_tensor},
                                                   {"float[]", Kind::numbers},       {"float", Kind::number},
                                                   {"float?", Kind::maybe_number},   {"SymInt", Kind::integer},
                                                   {"SymInt?", Kind::maybe_integer}, {"bool", Kind::flag},
                                                   {"ScalarType", Kind::dtype}};

// What an op's row says of its calls.
struct PlainOp {
  // Of a guided op the first argument is a sequence of tensors, the last of which may be a pair.
  int guided;
  // Where numbers begin, and where guidance_scale is. -1 here and below: there is none.
  Py_ssize_t first_number, guidance;
  // How many tensors have no weight, where the others have.
  Py_ssize_t unweighted;
  // The number that weighs noise, and its seed.
  Py_ssize_t noise, seed;
  // An exact step, whose calls are spelled as `exact_call` reads them.
  int exact;
  std::string name;
  std::vector<Kind> kinds;
  // For each result, the place of the number that asks for it.
  std::vector<Py_ssize_t> asked;
  Object bare;
};
constexpr char kCapsule[] = "bicm_kernels.PlainOp";

// Of a call that is plain.
struct Found {
  bool paired = false, of_tensors = false;
  PyObject* first = nullptr;
};

bool is_number(PyObject* value, Found& found) {
  if (PyFloat_CheckExact(value) || PyBool_Check(value)) return true;
  if (PyLong_CheckExact(value)) {
    int overflow;
    PyLong_AsLongLongAndOverflow(value, &overflow);
    return overflow == 0;
  }
  return is_untracked_tensor(value) && (found.of_tensors = true);
}

bool fits(Kind kind, PyObject* value, Found& found) {
  DType dtype;
  switch (kind) {
    case Kind::maybe_tensor:
      if (value == Py_None) return true;
      [[fallthrough]];
    case Kind::tensor:
      if (found.first == nullptr) found.first = value;
      return is_untracked_tensor(value);
    case Kind::tensors:
      return each(value, [&](PyObject* item, bool last) {
        found.paired = last && is_pair(item);
        if (found.first == nullptr) found.first = item;
        return found.paired ? each(item, [](PyObject* x, bool) { return is_untracked_tensor(x); })
                            : is_untracked_tensor(item);
      });
    case Kind::numbers: return each(value, [&](PyObject* item, bool) { return is_number(item, found); });
    case Kind::maybe_number:
    case Kind::maybe_integer:
      if (value == Py_None) return true;
      [[fallthrough]];
    case Kind::number:
    case Kind::integer:
      return is_number(value, found) && (kind == Kind::number || kind == Kind::maybe_number || !PyFloat_Check(value));
    case Kind::flag: return PyBool_Check(value);
    case Kind::dtype: return read(value, dtype);
  }
  return false;
}

Py_ssize_t size_of(PyObject* sequence) {
  return PyTuple_Check(sequence) ? PyTuple_Size(sequence) : PyList_Check(sequence) ? PyList_Size(sequence) : -1;
}

bool is_zero(PyObject* value) { return PyFloat_CheckExact(value) && PyFloat_AsDouble(value) == 0.0; }

bool is_plain(const PlainOp& op, PyObject* call, long long devices, Found& found) {
  const auto item = [call](Py_ssize_t i) { return PyTuple_GetItem(call, i); };
  const Py_ssize_t count = static_cast<Py_ssize_t>(op.kinds.size());
  if (!PyTuple_Check(call) || PyTuple_Size(call) != count || !nobody_transforms()) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const bool unguided = i == op.guidance && item(i) == Py_None;
    if (i == op.guidance && unguided == found.paired) return false;
    if (!unguided && !fits(op.kinds[static_cast<size_t>(i)], item(i), found)) return false;
  }
  if (op.unweighted >= 0 && size_of(item(op.first_number)) != size_of(item(0)) - op.unweighted) return false;
  const bool draws_unkeyed = op.noise >= 0 && item(op.seed) == Py_None;
  if (draws_unkeyed && (op.unweighted < 0 || !is_zero(item(op.noise)))) return false;
  return found.first != nullptr && is_on(found.first, devices);
}

// The arguments as the dispatcher's overloads take them.
PyObject* schema_arguments(const PlainOp& op, PyObject* call, const Found& found) {
  PyObject* const taken = PySequence_List(call);
  if (taken == nullptr || !op.guided) return taken;
  PyObject* const tensors = PyList_New(0);
  const auto append = [&](PyObject* item, bool) { return PyList_Append(tensors, item) == 0; };
  each(PyTuple_GetItem(call, 0),
       [&](PyObject* item, bool last) { return last && found.paired ? each(item, append) : append(item, last); });
  PyList_SetItem(taken, 0, tensors);
  if (!found.paired) PyList_SetItem(taken, op.guidance, PyFloat_FromDouble(0.0));
  return taken;
}

double number_in(PyObject* value) {
  return PyFloat_CheckExact(value) ? PyFloat_AsDouble(value) : static_cast<double>(PyLong_AsLongLong(value));
}

// The arguments of a call as the dispatcher's stable interface takes them, which owns them from the call on.
class Stack {
 public:
  // While the interpreter is let go, torch must not drop the last of its references to a tensor of Python's: it would
  // ask for the interpreter each time. `keeps`: the interpreter is let go.
  Stack(size_t size, bool keeps) : values_(size), keeps_(keeps) {}
  ~Stack() {
    for (AtenTensorHandle tensor : kept_) aoti_torch_delete_tensor_object(tensor);
  }

  StableIValue* values() { return values_.data(); }

  void add(Kind kind, PyObject* value) { values_[used_++] = made(kind, value); }
  void add(double value) { values_[used_++] = stable(value); }

 private:
  StableIValue made(Kind kind, PyObject* value) {
    DType dtype;
    switch (kind) {
      case Kind::tensor: return stable(handle(value));
      case Kind::maybe_tensor: return value == Py_None ? stable(std::nullopt) : stable(std::optional(handle(value)));
      case Kind::tensors: return list(value, [this](PyObject* item) { return stable(handle(item)); });
      case Kind::numbers: return list(value, [](PyObject* item) { return stable(number_in(item)); });
      case Kind::number: return stable(number_in(value));
      case Kind::maybe_number: return value == Py_None ? stable(std::nullopt) : stable(std::optional(number_in(value)));
      case Kind::integer: return stable(int64_t{PyLong_AsLongLong(value)});
      case Kind::maybe_integer:
        return value == Py_None ? stable(std::nullopt) : stable(std::optional(int64_t{PyLong_AsLongLong(value)}));
      case Kind::flag: return stable(value == Py_True);
      case Kind::dtype: return read(value, dtype), stable(torch_code(dtype));
    }
    return 0;
  }

  template <class Make>
  StableIValue list(PyObject* sequence, Make make) {
    StableListHandle made;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(static_cast<size_t>(size_of(sequence)) + 1, &made));
    const auto append = [&](PyObject* item, bool) {
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_push_back(made, make(item)));
      return true;
    };
    each(sequence,
         [&](PyObject* item, bool last) { return is_sequence(item) ? each(item, append) : append(item, last); });
    return stable(made);
  }

  AtenTensorHandle handle(PyObject* tensor) {
    AtenTensorHandle given, kept;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(abi::handle_of(tensor), &given));
    if (keeps_) {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(abi::handle_of(tensor), &kept));
      kept_.push_back(kept);
    }
    return given;
  }

  std::vector<StableIValue> values_;
  std::vector<AtenTensorHandle> kept_;
  bool keeps_;
  size_t used_ = 0;
};

PyObject* taken(StableIValue result, bool asked) {
  const auto handle = torch::stable::detail::to<AtenTensorHandle>(result);
  PyObject* const object = asked ? abi::object_of(handle) : Py_NewRef(Py_None);
  aoti_torch_delete_tensor_object(handle);
  return object;
}

// Whether a call is over before it would pay to let other threads have the interpreter.
bool is_short(PyObject* first) {
  constexpr int64_t kShort = 4096;
  static const int32_t host = aoti_torch_device_type_cpu();
  int32_t device;
  int64_t elements;
  return aoti_torch_get_device_type(abi::handle_of(first), &device) == 0 && device == host &&
         aoti_torch_get_numel(abi::handle_of(first), &elements) == 0 && elements <= kShort;
}

// The results of a call that writes none, or nullptr for one that failed.
PyObject* called(const PlainOp& op, PyObject* call, const Found& found, PyObject* outs) {
  const Py_ssize_t count = static_cast<Py_ssize_t>(op.kinds.size()), written = outs == Py_None ? 0 : PyTuple_Size(outs);
  const bool lets_go = !is_short(found.first);
  Stack stack(std::max(op.kinds.size() + static_cast<size_t>(written), op.asked.size()), lets_go);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (i == op.guidance && !found.paired) {
      stack.add(0.0);
    } else {
      stack.add(op.kinds[static_cast<size_t>(i)], PyTuple_GetItem(call, i));
    }
  }
  for (Py_ssize_t i = 0; i < written; ++i) stack.add(Kind::tensor, PyTuple_GetItem(outs, i));
  AOTITorchError failed;
  {
    std::optional<Released> released;
    if (lets_go) released.emplace();
    failed = torch_call_dispatcher(op.name.c_str(), written != 0 ? "out" : "", stack.values(), TORCH_ABI_VERSION);
  }
  if (failed != 0) return nullptr;
  if (written != 0) return written == 1 ? Py_NewRef(PyTuple_GetItem(outs, 0)) : Py_NewRef(outs);
  if (op.asked.empty()) return Py_NewRef(PyTuple_GetItem(call, 0));
  const auto result = [&](size_t k) {
    const bool asked = op.asked[k] < 0 || PyTuple_GetItem(call, op.asked[k]) != Py_None;
    return taken(stack.values()[k], asked);
  };
  if (op.asked.size() == 1) return result(0);
  PyObject* const results = PyTuple_New(static_cast<Py_ssize_t>(op.asked.size()));
  for (size_t k = 0; k < op.asked.size(); ++k) PyTuple_SetItem(results, static_cast<Py_ssize_t>(k), result(k));
  return results;
}

// What Python's overload returned, with None for a result that was not asked for.
PyObject* as_asked(const PlainOp& op, PyObject* call, PyObject* results) {
  if (results == nullptr || op.asked.size() == 1) return results;
  const Object owned(results);
  if (op.asked.empty()) return Py_NewRef(PyTuple_GetItem(call, 0));
  const Py_ssize_t count = static_cast<Py_ssize_t>(op.asked.size());
  const Object made(PySequence_Tuple(results));
  if (made.get() == nullptr || PyTuple_Size(made.get()) != count) return nullptr;
  PyObject* const found = PyTuple_New(count);
  for (Py_ssize_t k = 0; k < count; ++k) {
    const Py_ssize_t place = op.asked[static_cast<size_t>(k)];
    const bool asked = place < 0 || PyTuple_GetItem(call, place) != Py_None;
    PyTuple_SetItem(found, k, Py_NewRef(asked ? PyTuple_GetItem(made.get(), k) : Py_None));
  }
  return found;
}

bool are_plain(PyObject* outs) {
  return outs == Py_None || each(outs, [](PyObject* out, bool) { return is_untracked_tensor(out); });
}

}  // namespace

PyObject* plain_op(PyObject*, PyObject* arguments) {
  PyObject *asked, *types, *bare;
  const char* name;
  PlainOp op;
  if (!PyArg_ParseTuple(arguments, "(pnnnnnp)O!sO!O", &op.guided, &op.first_number, &op.guidance, &op.unweighted,
                        &op.noise, &op.seed, &op.exact, &PyTuple_Type, &asked, &name, &PyTuple_Type, &types, &bare)) {
    return nullptr;
  }
  op.name = name;
  op.bare = Object(Py_NewRef(bare));
  each(asked, [&](PyObject* place, bool) { return op.asked.push_back(PyLong_AsSsize_t(place)), true; });
  const bool known = each(types, [&](PyObject* type, bool) {
    for (const auto& [text, kind] : kTypes) {
      if (PyUnicode_CompareWithASCIIString(type, text) == 0) return op.kinds.push_back(kind), true;
    }
    return false;
  });
  if (!known) return PyErr_SetString(PyExc_ValueError, "bicm_kernels: a type that no op has"), nullptr;
  return PyCapsule_New(new PlainOp(std::move(op)), kCapsule, nullptr);
}

// The schema's arguments of an exact step without overflow, from (first state, other tensors, info, coefficients,
// guidance_scale, (n, m), fraction_bits, overflow, mark); nullptr for other calls.
static PyObject* exact_call(PyObject* call) {
  if (!PyTuple_Check(call) || PyTuple_Size(call) != 9) return nullptr;
  const auto item = [call](Py_ssize_t i) { return PyTuple_GetItem(call, i); };
  PyObject *const others = item(1), *const ratio = item(5);
  if (!is_sequence(others) || !PyTuple_Check(ratio) || PyTuple_Size(ratio) != 2 || item(7) != Py_None) return nullptr;
  PyObject* const tensors = PyTuple_New(1 + size_of(others));
  PyTuple_SetItem(tensors, 0, Py_NewRef(item(0)));
  Py_ssize_t used = 1;
  each(others, [&](PyObject* tensor, bool) { return PyTuple_SetItem(tensors, used++, Py_NewRef(tensor)) == 0; });
  const Object owned(tensors);
  PyObject *const n = PyTuple_GetItem(ratio, 0), *const m = PyTuple_GetItem(ratio, 1);
  return PyTuple_Pack(7, tensors, item(2), item(3), item(4), n, m, item(6));
}

// A step that multiplies by 1 returns the buffer that it was given.
static PyObject* with_buffer(PyObject* step, PyObject* results) {
  const bool found = results != nullptr && PyTuple_Check(results) && PyTuple_Size(results) == 2;
  PyObject *const n = PyTuple_GetItem(step, 4), *const m = PyTuple_GetItem(step, 5);
  if (!found || PyObject_RichCompareBool(n, m, Py_EQ) != 1) return results;
  const Object owned(results);
  return PyTuple_Pack(2, PyTuple_GetItem(results, 0), PyTuple_GetItem(step, 1));
}

PyObject* call_through_dispatcher(PyObject*, PyObject* const* given, Py_ssize_t) {
  const auto* const op = static_cast<const PlainOp*>(PyCapsule_GetPointer(given[0], kCapsule));
  if (op == nullptr) return nullptr;
  PyObject* const outs = given[3];
  const Object exact(op->exact != 0 ? exact_call(given[1]) : nullptr);
  PyObject* const call = op->exact != 0 ? exact.get() : given[1];
  if (call == nullptr) return PyErr_Clear(), Py_NewRef(Py_NotImplemented);
  Found found;
  PyObject* result = nullptr;
  try {
    if (is_plain(*op, call, PyLong_AsLongLong(given[2]), found) && are_plain(outs)) {
      if (found.of_tensors && outs == Py_None) {
        result = schema_arguments(*op, call, found);
      } else if (!found.of_tensors && abi::tensors_have_handles()) {
        result = called(*op, call, found, outs);
        if (op->exact != 0) result = with_buffer(call, result);
      } else if (!found.of_tensors && outs == Py_None) {
        const Object taken(schema_arguments(*op, call, found));
        const Object in_order(taken.get() == nullptr ? nullptr : PySequence_Tuple(taken.get()));
        if (in_order.get() == nullptr) throw std::bad_alloc();
        PyObject* const results = as_asked(*op, call, PyObject_CallObject(op->bare.get(), in_order.get()));
        return op->exact != 0 ? with_buffer(call, results) : results;
      }
    }
  } catch (const std::exception&) {
    // Running out of memory.
  }
  if (result == nullptr) PyErr_Clear();
  return result != nullptr ? result : Py_NewRef(Py_NotImplemented);
}

}  // namespace bicm
