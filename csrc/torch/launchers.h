// Kernels on an NVIDIA GPU, called by Python past the dispatcher: through the CUDA library's table, which Python hands
// over where such calls are wanted.
#pragma once

#include "../cuda/launchers.h"
#include "python.h"

namespace bicm {

// The table in use. Without one, calls on a GPU go through the dispatcher: no tensor of a GPU is read then, and a call
// that has read one throws.
bool has_launchers();
const Launchers& launchers();

// A GPU's number for torch, from a view's device.
inline int32_t index_of(int32_t device) { return device % 256 - 1; }

// Launches one problem. The interpreter is let go: a launch waits where the GPU's queue is full, perhaps for work that
// another thread of Python has yet to launch.
template <class Entry, class... Arguments>
void launch(Entry Launchers::* entry, const Arguments&... arguments) {
  const Entry launcher = launchers().*entry;
  const Released released;
  STD_TORCH_CHECK(launcher(arguments...) == 0, "bicm_kernels: the kernel was not launched");
}

// Called with a capsule of a table, or None. Whether the table is in use: not where it is another version's, or where
// torch makes no results on the current GPU or describes them in an unknown way.
PyObject* use_launchers(PyObject* module, PyObject* capsule);

// The CPU's kernels as such a table, for tests and counts of calls where there is no GPU.
PyObject* host_launchers(PyObject* module, PyObject*);

}  // namespace bicm
