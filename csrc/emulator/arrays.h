// From NumPy arrays to the plain structs that kernels take. bfloat16 has no NumPy dtype: such an array comes as a pair
// (uint16 array, "bfloat16").
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../core/operands.h"

namespace bicm {
namespace emulator {

namespace py = pybind11;

struct View {
  void* data;
  DType dtype;
  std::vector<int64_t> sizes, strides;  // strides count elements
};

View view_of(py::handle array);

// A Python number, or a 0-d or (B,) array that the kernel reads, and may read from now on.
Number number_of(py::handle value, int64_t batch);
Integer integer_of(py::handle value, int64_t batch);
NoiseKey key_of(py::handle seed, py::handle step, py::handle sample, bool counts, int64_t batch);

using Views = std::vector<std::pair<View, Operand*>>;

// Restricts CUDA kernels to these tensors, until the next call.
void watch(const Views& views);

// Fills the layout and the operands, and registers them for access checks. `merge` joins adjacent dimensions where
// every view allows it.
void lay_out(const Views& views, bool merge, Layout& layout);

using Units = std::optional<std::vector<std::pair<int64_t, int64_t>>>;

// Runs units of a CPU kernel in the order given; all of them if none are.
template <class Problem>
void run_units(void (*kernel)(const Problem&, int64_t, int64_t), const Problem& problem, int64_t all,
               const Units& units) {
  if (!units) return kernel(problem, 0, all);
  for (const auto& [begin, end] : *units) kernel(problem, begin, end);
}

void bind_noise(py::module_& module);
void bind_multistep(py::module_& module);
void bind_pseudo_huber(py::module_& module);
void bind_gaussian(py::module_& module);
void bind_reversible(py::module_& module);
void bind_cooperation(py::module_& module);

}  // namespace emulator
}  // namespace bicm
