// The step ops called directly from Python, bypassing torch's dispatcher, whose overhead exceeds a small
// kernel. They return None for unsupported calls. Supported are tensors of torch's own type on the CPU, and on a GPU
// where its launchers are given, without a derivative to record, outside modes and transforms. The dispatcher handles
// the others, and raises their errors.
#include "direct.h"

#include "cpu.h"
#include "dispatcher.h"
#include "gaussian.h"
#include "generator.h"
#include "inputs.h"
#include "launchers.h"
#include "preconditioning.h"
#include "python.h"
#include "reversible.h"
#include "torch_abi.h"

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

using bicm::read;

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

template <class T, size_t N>
bool read(PyObject* from, Few<T, N>& to) {
  return each(from, [&](PyObject* item, bool) {
    T* place = to.add();
    return place != nullptr && read(item, *place);
  });
}

bool read(PyObject* from, StepTensors& to) {
  return each(from, [&](PyObject* item, bool last) {
    const bool pair = last && is_pair(item);
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

int64_t grain_of(const Multistep& problem) { return problem.draws ? Cpu::kNoiseGrain : Cpu::kGrain; }
int64_t grain_of(const Noise&) { return Cpu::kNoiseGrain; }
int64_t grain_of(const NoisyPair&) { return Cpu::kNoiseGrain; }
int64_t grain_of(const Reversible&) { return Cpu::kGrain; }
int64_t grain_of(const FixedPointDecode&) { return Cpu::kGrain; }

void launch_on(int32_t gpu, const Multistep& problem, const Object&) { launch(&Launchers::multistep, problem, gpu); }
void launch_on(int32_t gpu, const Noise& problem, const Object&) { launch(&Launchers::noise, problem, gpu); }
void launch_on(int32_t gpu, const NoisyPair& problem, const Object&) { launch(&Launchers::noisy_pair, problem, gpu); }
void launch_on(int32_t gpu, const Reversible& problem, const Object&) { launch(&Launchers::reversible, problem, gpu); }
void launch_on(int32_t gpu, const FixedPointDecode& problem, const Object&) {
  launch(&Launchers::fixed_point_decode, problem, gpu);
}
// The scratch memory is given back at once: whatever takes it next runs later on the same stream.
void launch_on(int32_t gpu, const Gaussian& problem, const Object& first) {
  const Object scratch = row_like(first, launchers().gaussian_scratch(problem), DType::float64);
  launch(&Launchers::gaussian, problem, static_cast<double*>(scratch.view.data), gpu);
}

// The tensors' device, called by Python.
struct Direct {
  template <class Problem>
  static void run(const Problem& problem, const Object& first) {
    if (!on_host(first.view.device)) return launch_on(index_of(first.view.device), problem, first);
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

PyObject* known(PyObject*, PyObject* count) {
  know_implementations(PyLong_AsLongLong(count));
  Py_RETURN_NONE;
}

PyObject* forget(PyObject*, PyObject*) {
  abi::forget_handles();
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
      method<&empty_on_host>("empty_on_host"),
      method<&encode_state>("fixed_point_encode"),
      method<&fixed_point_decode<Direct, Object, DType>>("fixed_point_decode"),
      {"know_implementations", known, METH_O, nullptr},
      {"forget_handles", forget, METH_NOARGS, nullptr},
      {"use_launchers", use_launchers, METH_O, nullptr},
      {"host_launchers", host_launchers, METH_NOARGS, nullptr},
      {"plain_op", plain_op, METH_VARARGS, nullptr},
      {"call_through_dispatcher", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_through_dispatcher)),
       METH_FASTCALL, nullptr},
      {nullptr, nullptr, 0, nullptr},
  };
  if (!open_torch()) return true;
  open_generator();
  abi::look_for_handles();
  return PyModule_AddFunctions(module, methods) == 0 && add_direct_losses(module) && add_inputs(module);
}

}  // namespace bicm
