// The step ops as functions of the Python module.
#pragma once

#include <Python.h>

namespace bicm {

// Looks up what the functions need of torch. Where it is not there, false: they return None for every call.
bool open_lane();

PyMethodDef* lane_methods();

}  // namespace bicm
