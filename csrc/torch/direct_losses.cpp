// The losses and their derivatives called directly from Python, bypassing torch's dispatcher: see direct.cpp. Here tensors
// may have a derivative to record. It is Python that records it, from what the call returns.
#include "cpu.h"
#include "direct.h"
#include "launchers.h"
#include "pseudo_huber.h"
#include "python.h"
#include "torch_abi.h"

namespace bicm {
namespace {

// How a gradient is formed, as bicm_kernels/ops/reduction_functions.py numbers it.
enum Way : int64_t { backward, forward, automatic };

// A tensor of torch's C++, which Python's keeps: `Borrowed` gives it back. What autograd says of it is read beside.
// `device`: of the first that is read, -1 before.
bool read(PyObject* from, Tensor& to, int32_t& device) {
  View view;
  if (!look_into_plain(from, view)) return false;
  if (device < 0) device = view.device;
  to.release();
  to = Tensor(abi::handle_of(from));
  return true;
}

using bicm::read;

template <class T>
bool read(PyObject* from, T& to, int32_t&) {
  return read(from, to);
}

template <class T>
bool read(PyObject* from, std::optional<T>& to, int32_t& device) {
  return from == Py_None || read(from, to.emplace(), device);
}

template <class T>
constexpr bool kIsTensor = std::is_same_v<T, Tensor> || std::is_same_v<T, MaybeTensor>;

// The arguments of a call, whose tensors are Python's.
template <class... Arguments>
class Borrowed {
 public:
  Borrowed() = default;
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed() {
    apply([](auto&... argument) { (give_back(argument), ...); });
  }

  template <class Function>
  auto apply(Function function) {
    return std::apply(function, arguments_);
  }

  // Sets a bit for every one of the first, the states, that is tracked; false where another tensor is.
  bool read_all(PyObject* const* given, int states, int64_t& tracked) {
    int i = 0;
    const auto read_one = [&](auto& argument) {
      PyObject* const from = given[i++];
      if (!read(from, argument, device_)) return false;
      if (!kIsTensor<std::decay_t<decltype(argument)>> || from == Py_None || !is_tracked(from)) return true;
      tracked |= int64_t{1} << (i - 1);
      return i <= states;
    };
    return apply([&](auto&... argument) { return (read_one(argument) && ...); });
  }

  // Of the first state.
  bool on_gpu() const { return !on_host(device_); }

 private:
  static void give_back(Tensor& tensor) { tensor.release(); }
  static void give_back(MaybeTensor& tensor) {
    if (tensor.has_value()) tensor->release();
  }
  template <class Number>
  static void give_back(Number&) {}

  std::tuple<Arguments...> arguments_;
  int32_t device_ = -1;
};

// The CPU, called by Python.
struct DirectLoss {
  static constexpr int64_t kGrain = Cpu::kGrain;
  static constexpr bool kOnHost = true;

  template <class Problem, class Run>
  static void run(const Problem& p, Run run) {
    std::optional<Released> released;
    if (p.layout.batch * p.layout.elements > kGrain) released.emplace();
    run();
  }
  template <class Sums>
  static void sums(PseudoHuber& p, const Tensor& loss, const Sums& sums) {
    run(p, [&] { Cpu::sums(p, loss, sums); });
  }
  static void sums_and_gradients(PseudoHuber& p, const Tensor& loss, double* sums) {
    run(p, [&] { Cpu::sums_and_gradients(p, loss, sums); });
  }
  static void gradients(const PseudoHuber& p, const Tensor& sums) {
    run(p, [&] { Cpu::gradients(p, sums); });
  }
  static void scale(const KeptGradient& p, const Tensor& gradient) {
    run(p, [&] { Cpu::scale(p, gradient); });
  }
};

// A GPU, called by Python.
struct GpuLoss {
  static constexpr bool kOnHost = false;

  static void sums(PseudoHuber& p, const Tensor& loss, const Tensor& sums) {
    value(&Launchers::pseudo_huber, p, loss, sums);
  }
  static void sums_and_gradients(PseudoHuber& p, const Tensor& loss, const Tensor& sums) {
    value(&Launchers::pseudo_huber_with_gradient, p, loss, sums);
  }
  static void gradients(const PseudoHuber& p, const Tensor& sums) {
    launch(&Launchers::pseudo_huber_gradient, p, sums.device_index());
  }
  static void scale(const KeptGradient& p, const Tensor& gradient) {
    launch(&Launchers::scale_gradient, p, gradient.device_index());
  }

 private:
  template <class Entry>
  static void value(Entry launcher, PseudoHuber& p, const Tensor& loss, const Tensor& sums) {
    p.sums = static_cast<double*>(sums.data_ptr());
    const Tensor scratch = row_like(sums, launchers().pseudo_huber_scratch(p), DType::float64);
    launch(launcher, p, loss.data_ptr(), static_cast<double*>(scratch.data_ptr()), sums.device_index());
  }
};

PyObject* object_of(const Tensor& tensor) { return abi::object_of(tensor.get()); }

PyObject* objects_of(const std::vector<Tensor>& tensors) {
  PyObject* const tuple = PyTuple_New(static_cast<Py_ssize_t>(tensors.size()));
  Py_ssize_t i = 0;
  for (const Tensor& tensor : tensors) PyTuple_SetItem(tuple, i++, object_of(tensor));
  return tuple;
}

// (whether gradients are kept, which states are tracked, these, the value, what it leaves for its derivative)
PyObject* recorded(bool kept, int64_t needs, PyObject* const* states, const Tensor& value,
                   const std::vector<Tensor>& saved) {
  PyObject* const tracked = PyTuple_New(__builtin_popcountll(static_cast<uint64_t>(needs)));
  Py_ssize_t count = 0;
  for (int k = 0; needs >> k != 0; ++k) {
    if (needs >> k & 1) PyTuple_SetItem(tracked, count++, Py_NewRef(states[k]));
  }
  PyObject* const parts[] = {Py_NewRef(kept ? Py_True : Py_False), PyLong_FromLongLong(needs), tracked,
                             object_of(value), objects_of(saved)};
  PyObject* const result = PyTuple_New(std::size(parts));
  Py_ssize_t i = 0;
  for (PyObject* part : parts) PyTuple_SetItem(result, i++, part);
  return result;
}

// Runs what returns an object, or nullptr for a call that it does not support, where nobody has to see the call.
template <class Run>
PyObject* unseen(Run run) {
  PyObject* result = nullptr;
  try {
    if (abi::tensors_have_handles() && nobody_replaced_ops() && nobody_watches()) result = run();
  } catch (const std::exception&) {
    // The dispatcher's path finds the same error and raises a fuller message.
  }
  if (result != nullptr) return result;
  PyErr_Clear();
  Py_RETURN_NONE;
}

// Calls a function with what runs on the device.
template <class Run>
auto on_device(bool gpu, Run run) {
  return gpu ? run(GpuLoss()) : run(DirectLoss());
}

// A loss by its arguments, of which the first tensors are states.
template <int States, auto Read>
struct Loss;
template <int States, class... Arguments, void (*Read)(LossCall&, const Arguments&...)>
struct Loss<States, Read> {
  static constexpr Py_ssize_t kCount = sizeof...(Arguments);

  // (way, arguments) -> the value, or `recorded` where a state is tracked
  static PyObject* value(PyObject*, PyObject* const* given, Py_ssize_t count) {
    return unseen([&]() -> PyObject* {
      int64_t way = backward, needs = 0;
      Borrowed<Arguments...> arguments;
      if (count != 1 + kCount || !read(given[0], way) || !arguments.read_all(given + 1, States, needs)) return nullptr;
      LossCall call;
      arguments.apply([&](const auto&... argument) { Read(call, argument...); });
      const bool gpu = arguments.on_gpu();
      const auto alone = [&](auto device) { return call.template value_alone<decltype(device)>(); };
      if (needs == 0) return object_of(on_device(gpu, alone));
      const bool keeps = way != backward && call.can_keep(needs);
      if (keeps && (way == forward || !saves_through_hooks())) {
        const auto [loss, gradients] =
            on_device(gpu, [&](auto device) { return call.template value_and_gradients<decltype(device)>(needs); });
        return recorded(true, needs, given + 1, loss, gradients);
      }
      auto [loss, sums] = on_device(gpu, [&](auto device) { return call.template value<decltype(device)>(); });
      std::vector<Tensor> saved;
      saved.push_back(std::move(sums));
      return recorded(false, needs, given + 1, loss, saved);
    });
  }

  // (upstream, sums, needs, arguments) -> gradients
  static PyObject* derivative(PyObject*, PyObject* const* given, Py_ssize_t count) {
    return unseen([&]() -> PyObject* {
      int64_t needs, tracked = 0;
      Borrowed<Tensor, Tensor> ours;
      Borrowed<Arguments...> arguments;
      const bool fits = count == 3 + kCount && ours.read_all(given, 0, tracked) && read(given[2], needs) &&
                        arguments.read_all(given + 3, States, tracked);
      if (!fits || tracked != 0) return nullptr;
      LossCall call;
      arguments.apply([&](const auto&... argument) { Read(call, argument...); });
      return ours.apply([&](const Tensor& upstream, const Tensor& sums) {
        return objects_of(on_device(arguments.on_gpu(), [&](auto device) {
          return call.template gradients<decltype(device)>(upstream, sums, needs);
        }));
      });
    });
  }
};

// Not asked of a GPU, whose kernel reads the number, and returns at once.
bool is_one(const View& upstream) {
  const bool floating = upstream.dtype != DType::int32 && upstream.dtype != DType::int64;
  return on_host(upstream.device) && floating && upstream.dim == 0 &&
         load_number<double>(number_of(upstream, 1, upstream.device), 0) == 1.0;
}

// Some gradients are scaled and a launch failed: the dispatcher would scale them again.
struct ScaledInPart {};

void scale_on_gpu(const Tensor& upstream, const std::vector<Tensor>& gradients) {
  for (const Tensor& gradient : gradients) {
    try {
      scale_gradients<GpuLoss>(upstream, {gradient});
    } catch (const std::exception&) {
      if (&gradient == &gradients.front()) throw;
      throw ScaledInPart();
    }
  }
}

// (upstream, gradients) -> True once they are scaled in place
PyObject* scale_kept(PyObject*, PyObject* const* given, Py_ssize_t count) try {
  return unseen([&]() -> PyObject* {
    View upstream;
    if (count != 2 || !PyTuple_Check(given[1]) || !look_into_plain(given[0], upstream)) return nullptr;
    if (is_one(upstream)) Py_RETURN_TRUE;
    // The op owns its arguments.
    int32_t device = kHost;
    const auto owned = [&device](PyObject* tensor) {
      AtenTensorHandle handle = nullptr;
      View view;
      const bool plain = look_into_plain(tensor, view) && !is_tracked(tensor);
      device = view.device;
      STD_TORCH_CHECK(plain && aoti_torch_new_tensor_handle(abi::handle_of(tensor), &handle) == 0, "not plain");
      return Tensor(handle);
    };
    std::vector<Tensor> gradients;
    Tensor factor = owned(given[0]);
    each(given[1], [&](PyObject* gradient, bool) {
      gradients.push_back(owned(gradient));
      return gradients.size() == 1 || device_of(gradients.back()) == device_of(gradients.front());
    });
    if (on_host(device)) {
      scale_gradients<DirectLoss>(std::move(factor), std::move(gradients));
    } else {
      scale_on_gpu(factor, gradients);
    }
    Py_RETURN_TRUE;
  });
} catch (const ScaledInPart&) {
  PyErr_SetString(PyExc_RuntimeError, "bicm_kernels: a launch failed when some gradients had been scaled");
  return nullptr;
}

template <class Function>
PyMethodDef method(const char* name, Function function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace

bool add_direct_losses(PyObject* module) {
  using Distance = Loss<2, &pseudo_huber_of<LossNumbers>>;
  using Consistency = Loss<3, &consistency_of<LossNumbers>>;
  static PyMethodDef methods[] = {
      method("pseudo_huber", &Distance::value),        method("pseudo_huber_backward", &Distance::derivative),
      method("consistency_loss", &Consistency::value), method("consistency_loss_backward", &Consistency::derivative),
      method("scale_gradients_", &scale_kept),         {nullptr, nullptr, 0, nullptr},
  };
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace bicm
