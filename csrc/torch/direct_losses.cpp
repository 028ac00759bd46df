// The losses and their derivatives called directly from Python, bypassing torch's dispatcher: see direct.cpp. Here tensors
// may have a derivative to record. It is Python that records it, from what the call returns.
#include "cpu.h"
#include "direct.h"
#include "pseudo_huber.h"
#include "python.h"
#include "torch_abi.h"

namespace bicm {
namespace {

// How a gradient is formed, as bicm_kernels/ops/reduction_functions.py numbers it.
enum Way : int64_t { backward, forward, automatic };

// A tensor of torch's C++. What autograd says of it is read beside.
bool read(PyObject* from, Tensor& to) {
  View view;
  AtenTensorHandle handle;
  if (!look_into_plain(from, view) || aoti_torch_new_tensor_handle(abi::handle_of(from), &handle) != 0) return false;
  to = Tensor(handle);
  return true;
}

using bicm::read;

template <class T>
bool read(PyObject* from, std::optional<T>& to) {
  return from == Py_None || read(from, to.emplace());
}

template <class T>
constexpr bool kIsTensor = std::is_same_v<T, Tensor> || std::is_same_v<T, MaybeTensor>;

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

PyObject* object_of(const Tensor& tensor) { return abi::object_of(tensor.get()); }

PyObject* objects_of(const std::vector<Tensor>& tensors) {
  PyObject* const tuple = PyTuple_New(static_cast<Py_ssize_t>(tensors.size()));
  Py_ssize_t i = 0;
  for (const Tensor& tensor : tensors) PyTuple_SetItem(tuple, i++, object_of(tensor));
  return tuple;
}

// (whether gradients are kept, the value, what it leaves for its derivative)
PyObject* recorded(bool kept, const Tensor& value, const std::vector<Tensor>& saved) {
  return Py_BuildValue("(ONN)", kept ? Py_True : Py_False, object_of(value), objects_of(saved));
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
      std::tuple<Arguments...> arguments;
      if (count != 1 + kCount || !read(given[0], way) || !read_all(given + 1, arguments, needs)) return nullptr;
      LossCall call;
      std::apply([&](const auto&... argument) { Read(call, argument...); }, arguments);
      if (needs == 0) return object_of(call.template value_alone<DirectLoss>());
      const bool keeps = way != backward && call.can_keep(needs);
      if (keeps && (way == forward || !saves_through_hooks())) {
        const auto [loss, gradients] = call.template value_and_gradients<DirectLoss>(needs);
        return recorded(true, loss, gradients);
      }
      auto [loss, sums] = call.template value<DirectLoss>();
      std::vector<Tensor> saved;
      saved.push_back(std::move(sums));
      return recorded(false, loss, saved);
    });
  }

  // (upstream, sums, needs, arguments) -> gradients
  static PyObject* derivative(PyObject*, PyObject* const* given, Py_ssize_t count) {
    return unseen([&]() -> PyObject* {
      Tensor upstream, sums;
      int64_t needs, tracked = 0;
      std::tuple<Arguments...> arguments;
      const bool fits = count == 3 + kCount && read(given[0], upstream) && read(given[1], sums) &&
                        read(given[2], needs) && !is_tracked(given[0]) && read_all(given + 3, arguments, tracked);
      if (!fits || tracked != 0) return nullptr;
      LossCall call;
      std::apply([&](const auto&... argument) { Read(call, argument...); }, arguments);
      return objects_of(call.template gradients<DirectLoss>(upstream, sums, needs));
    });
  }

 private:
  // Sets a bit for every state that is tracked; false where another tensor is.
  static bool read_all(PyObject* const* given, std::tuple<Arguments...>& arguments, int64_t& tracked) {
    int i = 0;
    const auto read_one = [&](auto& argument) {
      PyObject* const from = given[i++];
      if (!read(from, argument)) return false;
      if (!kIsTensor<std::decay_t<decltype(argument)>> || from == Py_None || !is_tracked(from)) return true;
      tracked |= int64_t{1} << (i - 1);
      return i <= States;
    };
    return std::apply([&](auto&... argument) { return (read_one(argument) && ...); }, arguments);
  }
};

// (upstream, gradients) -> True once they are scaled in place
PyObject* scale_kept(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return unseen([&]() -> PyObject* {
    Tensor upstream;
    if (count != 2 || !PyTuple_Check(given[1]) || !read(given[0], upstream)) return nullptr;
    const View view = view_of(upstream);
    if (view.dim == 0 && load_number<double>(number_of(view, 1, view.device), 0) == 1.0) Py_RETURN_TRUE;
    std::vector<Tensor> gradients(static_cast<size_t>(PyTuple_Size(given[1])));
    Py_ssize_t i = 0;
    for (Tensor& gradient : gradients) {
      PyObject* const from = PyTuple_GetItem(given[1], i++);
      if (!read(from, gradient) || is_tracked(from)) return nullptr;
    }
    scale_gradients<DirectLoss>(std::move(upstream), std::move(gradients));
    Py_RETURN_TRUE;
  });
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
