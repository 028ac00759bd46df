// The Python module: importing it registers the CPU kernels; it exposes their instruction set.
#include <Python.h>
#include <stdlib.h>

#include <stdexcept>
#include <string>

#include "cpu.h"
#include "direct.h"

namespace bicm {

const Kernels& active_kernels() {
  static const Kernels* const kernels = [] {
    const char* name = getenv("BICM_KERNELS_ISA");
    const Kernels* found = find_kernels(name == nullptr ? "" : name);
    if (found == nullptr) {
      throw std::invalid_argument("BICM_KERNELS_ISA=" + std::string(name) +
                                  ": this processor or build has no such instruction set; known are scalar, avx2, "
                                  "avx512, avx512bf16 and neon");
    }
    return found;
  }();
  return *kernels;
}

}  // namespace bicm

static PyObject* instruction_set(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(bicm::active_kernels().name);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

static PyObject* release_memory(PyObject*, PyObject*) { return PyLong_FromLongLong(bicm::release_blocks()); }

static PyObject* keep_memory(PyObject*, PyObject* bytes) {
  const int64_t most = PyLong_AsLongLong(bytes);
  if (PyErr_Occurred() != nullptr) return nullptr;
  bicm::keep_at_most(most);
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"instruction_set", instruction_set, METH_NOARGS, "The instruction set in use."},
                                {"keep_memory", keep_memory, METH_O, "Set the maximum number of unused bytes kept."},
                                {"release_memory", release_memory, METH_NOARGS, "Return kept memory to the system."},
                                {nullptr, nullptr, 0, nullptr}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  PyObject* created = PyModule_Create(&module);
  if (created == nullptr || bicm::add_direct(created)) return created;
  Py_DECREF(created);
  return nullptr;
}
