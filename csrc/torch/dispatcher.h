// Plain calls of ops that Python hands to torch's dispatcher through this library.
#pragma once

#include <Python.h>

namespace bicm {

// Called once for an op: what its row says of its calls, its name, the types of its schema's arguments, and the function
// that stands for it where torch's tensors cannot be had from Python's. A capsule for the function below.
PyObject* plain_op(PyObject* module, PyObject* arguments);

// Called with that capsule, a call, the devices on which kernels run (bits by DLPack's codes), and the tensors to write to
// or None. The results; or, where a number is a tensor, the arguments in a list, for the overload with tensors.
//
// NotImplemented for a call that is not plain: tensors of torch's own type without a derivative, numbers of Python's own
// types, nobody who traces or transforms; or that no kernel could tell from another: weights of no tensor, noise without a
// seed. And for one that failed, because the caller finds the same and says it better.
PyObject* call_through_dispatcher(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace bicm
