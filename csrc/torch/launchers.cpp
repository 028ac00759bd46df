#include "launchers.h"

#include "cpu.h"

namespace bicm {
namespace {

const Launchers* launchers_ = nullptr;

template <auto Run, class... Given>
struct Entry {
  static int32_t call(Given... given, int32_t) {
    try {
      Run(given...);
      return 0;
    } catch (const std::exception&) {
      return 1;
    }
  }
};

template <class Problem>
void run(const Problem& problem) {
  Cpu::run(problem);
}
void step(const Gaussian& g, double*) {
  if (g.layout.batch > 0) Cpu::run(g);
}
// The problems of losses are changed by the CPU's kernels.
void value(const PseudoHuber& p, void* loss, double*) {
  PseudoHuber own = p;
  Cpu::sums(own, loss, p.sums);
}
void value_and_gradients(const PseudoHuber& p, void* loss, double*) {
  PseudoHuber own = p;
  Cpu::sums_and_gradients(own, loss, p.sums);
}
void gradients(const PseudoHuber& p) { Cpu::gradients(p, Tensor()); }
void scale(const KeptGradient& p) { Cpu::scale(p, Tensor()); }

constexpr Launchers kOnHost = {
    kLaunchersVersion,
    [] { return int32_t{0}; },
    Entry<&run<Noise>, const Noise&>::call,
    Entry<&run<NoisyPair>, const NoisyPair&>::call,
    Entry<&run<Multistep>, const Multistep&>::call,
    Entry<&run<Reversible>, const Reversible&>::call,
    Entry<&run<FixedPointDecode>, const FixedPointDecode&>::call,
    [](const Gaussian&) { return int64_t{1}; },
    Entry<&step, const Gaussian&, double*>::call,
    [](const PseudoHuber&) { return int64_t{1}; },
    Entry<&value, const PseudoHuber&, void*, double*>::call,
    Entry<&value_and_gradients, const PseudoHuber&, void*, double*>::call,
    Entry<&gradients, const PseudoHuber&>::call,
    Entry<&scale, const KeptGradient&>::call,
};

}  // namespace

bool has_launchers() { return launchers_ != nullptr; }

const Launchers& launchers() {
  STD_TORCH_CHECK(launchers_ != nullptr, "bicm_kernels: the launchers were taken away");
  return *launchers_;
}

PyObject* use_launchers(PyObject*, PyObject* capsule) {
  static PyObject* owner = nullptr;  // keeps the table
  launchers_ = nullptr;
  if (capsule != Py_None) {
    const auto* const found = static_cast<const Launchers*>(PyCapsule_GetPointer(capsule, kLaunchersCapsule));
    if (found == nullptr) return nullptr;
    if (found->version == kLaunchersVersion) launchers_ = found;
    if (launchers_ != nullptr && !makes_results_on_gpu(found->current_device())) launchers_ = nullptr;
  }
  Py_XDECREF(std::exchange(owner, Py_NewRef(capsule)));
  return PyBool_FromLong(launchers_ != nullptr);
}

PyObject* host_launchers(PyObject*, PyObject*) {
  return PyCapsule_New(const_cast<Launchers*>(&kOnHost), kLaunchersCapsule, nullptr);
}

}  // namespace bicm
