// Draws from torch's CPU generator, without torch's own loop over its words.
#pragma once

#include "python.h"

namespace bicm {

// Looks up the functions of torch; if one is missing, no generator is read.
void open_generator();

// A torch.Generator, borrowed (None: torch's default one), or one for each sample.
struct Generators {
  PyObject* one = nullptr;
  Object each;

  int64_t count() const { return one != nullptr ? 1 : static_cast<int64_t>(PyTuple_Size(each.get())); }
  PyObject* operator[](int64_t i) const { return one != nullptr ? one : PyTuple_GetItem(each.get(), i); }
};
bool read(PyObject* from, Generators& to);

// The result of torch.randn, float32, and the generators' states after it; throws, with nothing drawn, where
// these are not known.
Object generator_normal(Few<int64_t, kMostDims> shape, Generators generators);

}  // namespace bicm
