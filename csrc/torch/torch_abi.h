// Layouts of torch that its stable ABI does not declare, each checked once against torch's own results.
//
// Where a check fails, the functions of the Python module that need the layout accept no call: the
// dispatcher, or torch's own generator, is used instead.
#pragma once

#include <Python.h>
#include <stdint.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <utility>

#include "../core/mersenne.h"

namespace bicm::abi {

// DLPack 1: the fields used here of the table behind torch.Tensor.__dlpack_c_exchange_api__.
struct ExchangedTensor {
  void* data;
  int32_t device_type, device_index, dim;
  uint8_t kind, bits;
  uint16_t lanes;
  int64_t *sizes, *strides;
  uint64_t byte_offset;
};
struct ManagedTensor {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  ExchangedTensor tensor;
};
struct Exchange {
  uint32_t major, minor;
  void *older, *allocate, *from_python;
  int (*to_python)(ManagedTensor* owned, void** object);
  int (*look_into)(void* object, ExchangedTensor* result);
};
constexpr int32_t kCpuDevice = 1, kCudaDevice = 2;
constexpr uint8_t kSigned = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4, kBool = 6;

// Whether a table describes `sample`, a contiguous (2, 3) float32 tensor on that device, as the tensor does.
bool describes(const Exchange& table, PyObject* sample, int32_t device_type, int32_t device_index);

// The table in a capsule; nullptr where it does not describe `sample`, such a tensor on the CPU.
const Exchange* exchange_in(PyObject* capsule, PyObject* sample);

// A tensor of torch's C++ inside Python's tensor, as the stable ABI knows it, and Python's tensor of one. `look_for_handles`
// finds out how, once; without it, or where it finds nothing, there are none.
bool tensors_have_handles();
void look_for_handles();
void forget_handles();
AtenTensorHandle handle_of(PyObject* tensor);
PyObject* object_of(AtenTensorHandle tensor);

// What Generator.get_state() holds: how many words are left until the next 624 are made (one, where none is), and which
// one is next. Behind the words stands the other half of a pair of normal numbers, which only draws of few numbers use.
struct GeneratorState {
  uint64_t seed;
  int32_t left, seeded;
  uint64_t next, words[kMersenneWords];
  unsigned char others[40];

  // The last word distinguishes one set of words from the next.
  std::pair<uint64_t, uint64_t> place() const { return {next, words[kMersenneWords - 1]}; }
};

// Whether the state of a freshly seeded generator has the seed and its words at the expected offsets.
bool is_freshly_seeded(const GeneratorState& state, uint64_t seed);

}  // namespace bicm::abi
