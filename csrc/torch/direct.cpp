// The step ops called directly from Python, bypassing torch's dispatcher, whose overhead exceeds a small
// kernel. They return None for unsupported calls. Supported are CPU tensors of torch's own type, without a derivative
// to record, outside modes and transforms. The dispatcher handles the others, and raises their errors.
#include "direct.h"

#include "cpu.h"
#include "gaussian.h"
#include "generator.h"
#include "preconditioning.h"
#include "python.h"
#include "reversible.h"

namespace bicm {

inline Number given(ExactStep& step, const PythonArguments::Coefficient& value) {
  return value.is_tensor() ? step.number(value.tensor) : step.number(value.value);
}
inline void guide_by(ExactStep& step, const PythonArguments::Guidance& guidance) {
  step.p.guidance_scale = given(step, guidance.scale);
}
inline Integer integer(ExactStep& step, const PythonArguments::Counter& value) {
  return value.is_tensor() ? step.integer(value.tensor) : step.integer(value.value);
}
inline void ratio_of(ExactStep& step, const PythonArguments::Counter& n, const PythonArguments::Counter& m) {
  step.p.n = integer(step, n);
  step.p.m = integer(step, m);
}

namespace {

bool read(PyObject* from, bool& to) {
  to = from == Py_True;
  return PyBool_Check(from);
}

bool read(PyObject* from, double& to) {
  if (!PyFloat_CheckExact(from)) return false;
  to = PyFloat_AsDouble(from);
  return true;
}

// Seeds above the signed range denote the integer with the same bits.
bool read(PyObject* from, int64_t& to) {
  if (!PyLong_CheckExact(from)) return false;
  int overflow;
  to = PyLong_AsLongLongAndOverflow(from, &overflow);
  if (overflow > 0) to = static_cast<int64_t>(PyLong_AsUnsignedLongLong(from));
  return overflow >= 0 && PyErr_Occurred() == nullptr;
}

template <class T>
bool read(PyObject* from, OrTensor<T>& to) {
  return read(from, to.value) || read(from, to.tensor);
}

template <class T>
bool read(PyObject* from, std::optional<T>& to) {
  return from == Py_None || read(from, to.emplace());
}

bool read(PyObject* from, PythonArguments::Guidance& to) {
  to.given = from != Py_None;
  return !to.given || read(from, to.scale);
}

bool is_sequence(PyObject* value) { return PyList_Check(value) || PyTuple_Check(value); }

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

template <class T, size_t N>
bool read(PyObject* from, Few<T, N>& to) {
  return each(from, [&](PyObject* item, bool) {
    T* place = to.add();
    return place != nullptr && read(item, *place);
  });
}

bool read(PyObject* from, StepTensors& to) {
  return each(from, [&](PyObject* item, bool last) {
    const bool pair = last && is_sequence(item);
    if (pair) return to.paired = true, read(item, static_cast<Few<Object, kMaxTerms + 1>&>(to));
    Object* place = to.add();
    return place != nullptr && read(item, *place);
  });
}

PyObject* returned(Object result) {
  if (result.get() != nullptr) return result.release();
  Py_RETURN_NONE;
}

template <class... Results>
PyObject* returned(std::tuple<Results...> results) {
  PyObject* tuple = PyTuple_New(sizeof...(Results));
  Py_ssize_t i = 0;
  if (tuple != nullptr) {
    std::apply([&](auto&... result) { (PyTuple_SetItem(tuple, i++, returned(std::move(result))), ...); }, results);
  }
  return tuple;
}

// Releases the interpreter lock during its lifetime.
class Released {
 public:
  Released() : state_(PyEval_SaveThread()) {}
  ~Released() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

int64_t grain_of(const Multistep& problem) { return problem.draws ? Cpu::kNoiseGrain : Cpu::kGrain; }
int64_t grain_of(const Noise&) { return Cpu::kNoiseGrain; }
int64_t grain_of(const NoisyPair&) { return Cpu::kNoiseGrain; }
int64_t grain_of(const Reversible&) { return Cpu::kGrain; }
int64_t grain_of(const FixedPointDecode&) { return Cpu::kGrain; }

// The CPU, called by Python.
struct Direct {
  template <class Problem>
  static void run(const Problem& problem, const Object&) {
    std::optional<Released> released;
    if (problem.layout.batch * problem.layout.elements > grain_of(problem)) released.emplace();
    Cpu::run(problem);
  }
};

// Fills a tensor with keyed numbers, and returns it.
template <Distribution D>
Object draw(Object out, PythonArguments::Seed seed, PythonArguments::Counter at, PythonArguments::Counter sample_id) {
  Draw<Direct, D>::template fill<PythonArguments>(out, seed, at, sample_id);
  return out;
}

struct ExactArguments {
  using Tensor = Object;
  using Tensors = Few<Object, kMaxTerms + 2>;
  using Coefficients = PythonArguments::Coefficients;
  using Guidance = PythonArguments::Guidance;
  using Ratio = PythonArguments::Counter;
  static bool multiplies(const Ratio& n, const Ratio& m) {
    const auto checked = [](const Ratio& part) { return part.is_tensor() ? int64_t{1} : part.value; };
    const bool differ = ExactNumbers::multiplies(checked(n), checked(m));
    return differ || n.is_tensor() || m.is_tensor();
  }
};

// An exact step that records overflow if requested; returns the new buffer, or the given one where none is needed.
template <Increment I, bool Inverse>
std::tuple<Object, Object> exact_step(Object last, StepTensors operands, Object info,
                                      PythonArguments::Coefficients coefficients, PythonArguments::Guidance guidance,
                                      Few<PythonArguments::Counter, 2> ratio, int64_t fraction_bits,
                                      std::optional<Object> overflow, PythonArguments::Counter mark) {
  ExactArguments::Tensors tensors = {last};
  for (size_t i = 0; i < operands.size(); ++i) *tensors.add() = operands[i];
  STD_TORCH_CHECK(ratio.size() == 2 && guidance.given == operands.paired, "bicm_kernels: a ratio has two parts");
  ExactStep step(last, Kinds::integers_too);
  prepare_exact<I, Inverse, ExactArguments>(step, tensors, info, coefficients, guidance, ratio[0], ratio[1],
                                            fraction_bits);
  STD_TORCH_CHECK(step.p.guided == operands.paired, "bicm_kernels: guidance goes with a pair");
  Object out = like(last, step.first());
  step.add(out, step.p.out);
  Object info_out = step.p.multiplies ? like(info, info.view) : info;
  if (step.p.multiplies) step.add(info_out, step.p.info_out);
  if (overflow.has_value()) step.overflow(*overflow, integer(step, mark));
  step.run(Direct(), step.p, last);
  return {out, info_out};
}

// Encodes, and records overflow if requested.
Object encode_state(Object x, int64_t fraction_bits, DType dtype, std::optional<Object> overflow,
                    PythonArguments::Counter mark) {
  ExactStep step(x, Kinds::floating);
  Object out = empty_in_layout_of(x, dtype);
  prepare_encode(step, x, out, fraction_bits);
  if (overflow.has_value()) step.overflow(*overflow, integer(step, mark));
  step.run(Direct(), step.p, x);
  return out;
}

template <bool OfTorch, class Result, class... Arguments>
PyObject* call(Result (*op)(Arguments...), PyObject* const* given, Py_ssize_t count) {
  std::tuple<Arguments...> arguments;
  const auto read_all = [&](auto&... argument) { return (read(*given++, argument) && ...); };
  try {
    const bool ours = !OfTorch || nobody_replaced_ops();
    if (ours && count == sizeof...(Arguments) && nobody_watches() && std::apply(read_all, arguments)) {
      return returned(std::apply(op, std::move(arguments)));
    }
  } catch (const std::exception&) {
    // The dispatcher's path finds the same error and raises a fuller message.
  }
  PyErr_Clear();
  Py_RETURN_NONE;
}

// `OfTorch`: an op of torch that may be overridden.
template <auto Op, bool OfTorch>
PyObject* entry(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call<OfTorch>(Op, arguments, count);
}

bool is_signed(PyObject* integer) {
  int overflow;
  PyLong_AsLongLongAndOverflow(integer, &overflow);
  return overflow == 0;
}

// A number, a type or None as overloads take them; or a tensor, which selects the overload with tensors.
bool is_plain(PyObject* value, bool& tensors) {
  DType dtype;
  if (value == Py_None || PyFloat_CheckExact(value) || PyBool_Check(value)) return true;
  if (PyLong_CheckExact(value)) return is_signed(value);
  if (is_untracked_tensor(value)) return tensors = true;
  return read(value, dtype);
}

// The tensors of a step in a new list, with a pair flattened.
PyObject* opened(PyObject* operands, bool& paired) {
  PyObject* list = PyList_New(0);
  const auto append = [list](PyObject* item, bool) {
    return is_untracked_tensor(item) && PyList_Append(list, item) == 0;
  };
  const bool plain = each(operands, [&](PyObject* item, bool last) {
    paired = last && is_sequence(item);
    return paired ? each(item, append) : append(item, last);
  });
  if (plain) return list;
  Py_DECREF(list);
  return nullptr;
}

// The layout of an op's calls, from its row.
struct Shape {
  // Of a guided op the first argument is a sequence of tensors, the last of which may be a pair.
  bool guided;
  // Where numbers begin, and where guidance_scale is. -1 here and below: there is none.
  Py_ssize_t first_number, guidance;
  // How many tensors have no weight, where the others have.
  Py_ssize_t unweighted;
  // The noise weight and its seed.
  Py_ssize_t noise, seed;
};

bool is_zero(PyObject* value) { return PyFloat_CheckExact(value) && PyFloat_AsDouble(value) == 0.0; }

// Called with an op's shape, its call, and the devices on which kernels run (bits by DLPack's codes). The arguments as
// the dispatcher's overloads take them: in a tuple for the one with numbers, in a list for the one with tensors. None
// for an unsupported call. Supported: tensors of torch's own type without a derivative, numbers of Python's own types,
// no tracing or transforms. Also None where kernels could not detect the error: weights of no tensor, noise without a
// seed.
PyObject* schema_arguments(PyObject*, PyObject* const* given, Py_ssize_t) {
  const auto number = [&](Py_ssize_t i) { return PyLong_AsSsize_t(PyTuple_GetItem(given[0], i)); };
  const Shape shape = {number(0) != 0, number(1), number(2), number(3), number(4), number(5)};
  const Py_ssize_t count = PyTuple_Size(given[1]);
  const auto item = [&](Py_ssize_t i) { return PyTuple_GetItem(given[1], i); };
  bool paired = false, of_tensors = false, plain = PyTuple_Check(given[1]) && nobody_transforms();
  const auto plain_number = [&of_tensors](PyObject* value, bool) { return is_plain(value, of_tensors); };
  PyObject* taken = PyTuple_New(count);
  for (Py_ssize_t i = 0; plain && i < count; ++i) {
    PyObject* value = item(i);
    if (shape.guided && i == 0) {
      value = opened(value, paired);
      plain = value != nullptr;
    } else if (i == shape.guidance && (value == Py_None) == paired) {
      plain = false;
      value = nullptr;
    } else if (i == shape.guidance && !paired) {
      value = PyFloat_FromDouble(0.0);
    } else if (i < shape.first_number) {
      plain = value == Py_None || is_untracked_tensor(value);
      Py_INCREF(value);
    } else {
      plain = is_sequence(value) ? each(value, plain_number) : plain_number(value, true);
      Py_INCREF(value);
    }
    if (value != nullptr) PyTuple_SetItem(taken, i, value);
  }
  if (plain && shape.unweighted >= 0) {
    PyObject* const weights = item(shape.first_number);
    plain = is_sequence(weights) && PySequence_Size(weights) == PySequence_Size(item(0)) - shape.unweighted;
  }
  if (plain && shape.noise >= 0 && item(shape.seed) == Py_None) {
    plain = shape.unweighted >= 0 && is_zero(item(shape.noise));
  }
  if (plain) {
    PyObject* const first = PyTuple_GetItem(taken, 0);
    PyObject* const tensor = shape.guided ? PyList_GetItem(first, 0) : first;
    plain = tensor != nullptr && is_on(tensor, PyLong_AsLong(given[2]));
  }
  PyObject* result = !plain ? Py_NewRef(Py_None) : of_tensors ? PySequence_List(taken) : Py_NewRef(taken);
  Py_DECREF(taken);
  if (!plain) PyErr_Clear();
  return result;
}

PyObject* known(PyObject*, PyObject* count) {
  know_implementations(PyLong_AsLongLong(count));
  Py_RETURN_NONE;
}

template <auto Op, bool OfTorch = true>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<Op, OfTorch>)), METH_FASTCALL,
          nullptr};
}

}  // namespace

bool add_direct(PyObject* module) {
  using A = PythonArguments;
  static PyMethodDef methods[] = {
      method<&FormStep<Direct, Form::affine>::run<A>>("ddim_step"),
      method<&FormStep<Direct, Form::bdia>::run<A>>("bdia_step"),
      method<&FormStep<Direct, Form::bdia_inverse>::run<A>>("bdia_inverse_step"),
      method<&AffineStep<Direct>::run<A>>("affine_step"),
      method<&AddNoise<Direct>::run<A>>("add_noise"),
      method<&DenoisedStep<Direct>::run<A>>("denoised_step"),
      method<&GaussianStep<Direct>::run<A>>("gaussian_step"),
      method<&ScaleInput<Direct>::run<A>>("scale_input"),
      method<&Denoise<Direct>::run<A>>("denoise"),
      method<&Renoise<Direct>::run<A>>("renoise"),
      method<&draw<Distribution::normal>>("normal"),
      method<&draw<Distribution::uniform>>("uniform"),
      method<&GivenPair<Direct>::run<A>>("noisy_pair"),
      method<&GeneratedPair<Direct>::run<A>>("generated_pair"),
      method<&exact_step<Increment::affine, false>>("exact_affine_step"),
      method<&exact_step<Increment::affine, true>>("exact_affine_inverse_step"),
      method<&exact_step<Increment::bdia, false>>("bdia_exact_step"),
      method<&exact_step<Increment::bdia, true>>("bdia_exact_inverse_step"),
      method<&generator_normal, false>("generator_normal"),
      method<&encode_state>("fixed_point_encode"),
      method<&fixed_point_decode<Direct, Object, DType>>("fixed_point_decode"),
      {"know_implementations", known, METH_O, nullptr},
      {"schema_arguments", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&schema_arguments)),
       METH_FASTCALL, nullptr},
      {nullptr, nullptr, 0, nullptr},
  };
  if (!open_torch()) return true;
  open_generator();
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace bicm
