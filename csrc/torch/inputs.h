// Whether what tables were made from is as it was, answered in one call: Python asks it before every step of a scheduler.
#pragma once

#include <Python.h>

namespace bicm {

// Adds the functions to the module.
bool add_inputs(PyObject* module);

}  // namespace bicm
