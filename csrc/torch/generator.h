// Draws from torch's CPU generator, without torch's own loop over its words.
#pragma once

#include "python.h"

namespace bicm {

// Looks up what is needed of torch; where it is not there, no generator is read.
void open_generator();

// A torch.Generator, borrowed; None stands for torch's default one.
struct Generator {
  PyObject* object = nullptr;
};
bool read(PyObject* from, Generator& to);

constexpr size_t kMostDims = 8;

// What torch.randn would return, float32, and the generator as it would leave it; throws, with nothing drawn, where
// that is not known.
Object generator_normal(Few<int64_t, kMostDims> shape, Generator generator);

}  // namespace bicm
