// The step ops and the losses as functions of the Python module.
#pragma once

#include <Python.h>

namespace bicm {

// Adds them to the module; leaves them out where torch lacks what they need. False: a Python error is set.
bool add_direct(PyObject* module);

// The losses among them.
bool add_direct_losses(PyObject* module);

}  // namespace bicm
