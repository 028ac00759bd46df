// The step ops as functions of the Python module.
#pragma once

#include <Python.h>

namespace bicm {

// Adds them to the module; leaves them out where torch lacks what they need. False: a Python error is set.
bool add_direct(PyObject* module);

}  // namespace bicm
