#include "torch_abi.h"

namespace bicm::abi {
namespace {

bool describes(const Exchange& table, PyObject* sample, unsigned long long address) {
  ExchangedTensor found = {};
  if (table.look_into(sample, &found) != 0 || found.dim != 2 || found.device_type != kCpuDevice) return false;
  const bool shape = found.sizes[0] == 2 && found.sizes[1] == 3 && found.strides[0] == 3 && found.strides[1] == 1;
  return shape && found.kind == kFloat && found.bits == 32 && found.lanes == 1 &&
         reinterpret_cast<uintptr_t>(found.data) + found.byte_offset == address;
}

}  // namespace

const Exchange* exchange_in(PyObject* capsule, PyObject* sample) {
  const auto* const table = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  PyObject* const address = PyObject_CallMethod(sample, "data_ptr", nullptr);
  const bool holds = table != nullptr && address != nullptr && table->major == 1 && table->to_python != nullptr &&
                     table->look_into != nullptr && describes(*table, sample, PyLong_AsUnsignedLongLong(address));
  Py_XDECREF(address);
  PyErr_Clear();
  return holds ? table : nullptr;
}

bool is_freshly_seeded(const GeneratorState& state, uint64_t seed) {
  return state.seed == seed && state.left == 1 && state.seeded == 1 && state.next == 0 && state.words[0] == seed;
}

}  // namespace bicm::abi
