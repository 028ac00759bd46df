// Groups of any tensors: every element finds its own address, and every access asks for the dtype. See memory.h for the
// interface.
#pragma once

#include "memory.h"

namespace bicm {
namespace cuda {

// C is the compute type.
template <class C>
struct Strided {
  using Compute = C;
  static constexpr int kGroup = 4;
  struct Raw {
    C element[kGroup];
  };
  // A position in the sample's dimensions, and how many elements follow it in the last one, itself included.
  struct Index {
    int64_t at[kMaxDims];
    int64_t left;
  };
  struct Place {
    int64_t sample, begin;
    int count;
    Index index;
  };

  BICM_DEVICE static Place at(const Layout& layout, int64_t sample, int64_t begin, bool) {
    const int64_t left = layout.elements - begin;
    return {sample, begin, left < kGroup ? static_cast<int>(left) : kGroup, index_of(layout, begin)};
  }

  BICM_DEVICE static Index index_of(const Layout& layout, int64_t element) {
    Index index = {};
    BICM_UNROLL(8)
    for (int dim = kMaxDims - 1; dim >= 0; --dim) {
      if (dim >= layout.dims) continue;
      const int64_t rest = dim == 0 ? 0 : element / layout.sizes[dim];
      index.at[dim] = element - rest * layout.sizes[dim];
      if (dim == layout.dims - 1) index.left = layout.sizes[dim] - index.at[dim];
      element = rest;
    }
    return index;
  }

  BICM_DEVICE static int64_t offset(const Layout& layout, const Operand& x, const Index& index) {
    int64_t sum = 0;
    BICM_UNROLL(8)
    for (int dim = 0; dim < kMaxDims; ++dim) {
      if (dim < layout.dims) sum += index.at[dim] * x.strides[dim];
    }
    return sum;
  }

  // Calls visit(i, offset of element i) for the elements that exist. Only a group that crosses the end of the last
  // dimension has to divide again.
  template <class Visit>
  BICM_DEVICE static void for_elements(const Layout& layout, const Operand& x, const Place& place, Visit visit) {
    const int64_t row = place.sample * x.batch_stride;
    const int64_t first = row + (x.dense ? place.begin : offset(layout, x, place.index));
    const int64_t stride = x.dense ? 1 : x.strides[layout.dims - 1];
    BICM_UNROLL(8)
    for (int i = 0; i < kGroup; ++i) {
      if (i >= place.count) continue;
      const bool crosses = !x.dense && i >= place.index.left;
      visit(i, crosses ? row + offset(layout, x, index_of(layout, place.begin + i)) : first + i * stride);
    }
  }

  template <class T>
  BICM_DEVICE static C read(const Operand& x, int64_t offset) {
    return static_cast<C>(value_of(static_cast<const T*>(x.data)[offset]));
  }
  template <class T>
  BICM_DEVICE static void write(const Operand& x, int64_t offset, C value) {
    static_cast<T*>(x.data)[offset] = round_to<T>(value);
  }

  BICM_DEVICE static Raw load(const Layout& layout, const Operand& x, const Place& place) {
    Raw raw = {};
    for_elements(layout, x, place, [&](int i, int64_t offset) {
      switch (x.dtype) {
        case DType::float16: raw.element[i] = read<Half>(x, offset); break;
        case DType::bfloat16: raw.element[i] = read<BFloat16>(x, offset); break;
        case DType::float32: raw.element[i] = read<float>(x, offset); break;
        default: raw.element[i] = read<double>(x, offset); break;
      }
    });
    return raw;
  }

  BICM_DEVICE static void widen(const Operand&, const Raw& raw, C* values) {
    BICM_UNROLL(8)
    for (int i = 0; i < kGroup; ++i) values[i] = raw.element[i];
  }

  BICM_DEVICE static void store(const Layout& layout, const Operand& x, const Place& place, const C* values) {
    for_elements(layout, x, place, [&](int i, int64_t offset) {
      switch (x.dtype) {
        case DType::float16: write<Half>(x, offset, values[i]); break;
        case DType::bfloat16: write<BFloat16>(x, offset, values[i]); break;
        case DType::float32: write<float>(x, offset, values[i]); break;
        default: write<double>(x, offset, values[i]); break;
      }
    });
  }
};

}  // namespace cuda
}  // namespace bicm
