// Draws from torch's CPU generator, without torch's own loop over its words.
#pragma once

#include "python.h"

namespace bicm {

// Looks up what is needed of torch; where it is not there, no generator is read.
void open_generator();

// A torch.Generator, borrowed (None stands for torch's default one), or one for each sample.
struct Generators {
  PyObject* one = nullptr;
  Object each;

  int64_t count() const { return one != nullptr ? 1 : static_cast<int64_t>(PyTuple_Size(each.get())); }
  PyObject* operator[](int64_t i) const { return one != nullptr ? one : PyTuple_GetItem(each.get(), i); }
};
bool read(PyObject* from, Generators& to);

constexpr size_t kMostDims = 8;

// What torch.randn would return, float32, and the generators as it would leave them; throws, with nothing drawn, where
// that is not known.
Object generator_normal(Few<int64_t, kMostDims> shape, Generators generators);

// Drops `count` words of a generator; throws, with nothing dropped, where its state is of another kind.
bool generator_skip(int64_t count, Generators generator);

}  // namespace bicm
