// Whether something intercepts, records or replaces ops: then calls take the way through the dispatcher.
#include <memory>
#include <vector>

#include "python_lookup.h"

// Not part of torch's stable ABI. Since torch 1.9: whether a record function is active.
namespace at {
__attribute__((weak)) bool hasCallbacks();
}
// Python's functions for these take ten times as long: the active torch.func transforms; and TorchScript's tracing state,
// null where it does not trace.
namespace at::functorch {
struct DynamicLayer;
__attribute__((weak)) const std::vector<DynamicLayer>& getDynamicLayerStack();
}  // namespace at::functorch
namespace torch::jit::tracer {
struct TracingState;
__attribute__((weak)) const std::shared_ptr<TracingState>& getTracingState();
}  // namespace torch::jit::tracer

namespace bicm {

// Whether operations are recorded: by the profiler only, where torch does not export the full check.
static bool recorded() {
  if (at::hasCallbacks != nullptr) return at::hasCallbacks();
  return PyDict_GetItemWithError(torch_.profiler, torch_.profiling) != Py_False;
}

void know_implementations(int64_t count) { torch_.known_implementations = static_cast<Py_ssize_t>(count); }

bool nobody_replaced_ops() { return PySet_Size(torch_.implementations) == torch_.known_implementations; }

bool transformed() {
  if (at::functorch::getDynamicLayerStack != nullptr) return !at::functorch::getDynamicLayerStack().empty();
  return !torch_.transforms.says_no();
}

static bool traced() {
  if (torch::jit::tracer::getTracingState != nullptr) return torch::jit::tracer::getTracingState() != nullptr;
  return !torch_.is_tracing.says_no();
}

bool nobody_transforms() {
  for (const Question& watcher : torch_.watchers) {
    if (!watcher.says_no()) return false;
  }
  PyObject* level = PyDict_GetItemWithError(torch_.forward_mode, torch_.level);
  return level != nullptr && PyLong_AsLong(level) < 0 && !transformed() && !traced();
}

bool nobody_watches() { return nobody_transforms() && !recorded(); }

bool saves_through_hooks() {
  if (torch_.saving_hooks == nullptr) return true;
  PyObject* const hooks = PyObject_CallFunctionObjArgs(torch_.saving_hooks, Py_True, nullptr);
  if (hooks == nullptr) PyErr_Clear();
  Py_XDECREF(hooks);
  return hooks != Py_None;
}

}  // namespace bicm
