// Any tensors: a thread processes one element at a time, computes its address in every tensor, and checks the dtype at
// every access. See memory.h for the interface.
#pragma once

#include "memory.h"

namespace bicm {
namespace cuda {

// 2^(31 + l) / d, rounded up, where 2^l is the first power of two that is no less than d: its product with x < 2^31
// is too large by less than 2^(31 + l) / d, a quotient's least distance from the next integer.
inline Reciprocal reciprocal_of(int64_t size) {
  uint32_t log = 0;
  while ((int64_t{1} << log) < size) ++log;
  return {static_cast<uint32_t>((uint64_t{1} << (31 + log)) / static_cast<uint64_t>(size) + 1), 31 + log};
}

// A problem with the reciprocals of its sizes, where indices have at most 31 bits.
template <class Problem>
Problem with_reciprocals(const Problem& given) {
  Problem problem = given;
  Layout& layout = problem.layout;
  layout.narrow = layout.elements <= INT32_MAX;
  for (int dim = 0; layout.narrow && dim < layout.dims; ++dim) {
    layout.reciprocals[dim] = reciprocal_of(layout.sizes[dim]);
  }
  return problem;
}

// The last index of a position `left` in dimensions that end with one of this size; `left` becomes that in the others.
BICM_DEVICE int64_t take_index(bool last, const Reciprocal& reciprocal, int64_t size, uint32_t& left) {
  if (last) return left;
  const uint32_t rest = static_cast<uint32_t>(static_cast<uint64_t>(left) * reciprocal.multiplier >> reciprocal.shift);
  const uint32_t index = left - rest * static_cast<uint32_t>(size);
  left = rest;
  return index;
}

// C is the compute type.
template <class C>
struct Strided {
  using Compute = C;
  static constexpr int kGroup = 1;
  template <int>
  using Part = Strided;
  struct Raw {
    C value;
  };
  struct Place {
    int64_t sample, begin;
    int64_t index[kMaxDims];
  };

  BICM_DEVICE static Place at(const Layout& layout, int64_t sample, int64_t begin, bool) {
    Place place = {};
    place.sample = sample;
    place.begin = begin;
    if (layout.narrow) {
      uint32_t left = static_cast<uint32_t>(begin);
      BICM_UNROLL(8)
      for (int back = 1; back <= kMaxDims; ++back) {
        const int dim = kMaxDims - back;
        if (dim < layout.dims)
          place.index[dim] = take_index(dim == 0, layout.reciprocals[dim], layout.sizes[dim], left);
      }
      return place;
    }
    int64_t left = begin;
    BICM_UNROLL(8)
    for (int back = 1; back <= kMaxDims; ++back) {
      const int dim = kMaxDims - back;
      if (dim >= layout.dims) continue;
      const int64_t rest = dim == 0 ? 0 : left / layout.sizes[dim];
      place.index[dim] = left - rest * layout.sizes[dim];
      left = rest;
    }
    return place;
  }

  BICM_DEVICE static Place in_row(const Layout& layout, int64_t sample, int64_t begin, bool) {
    return at(layout, sample, begin, false);
  }
  struct Row {
    const Operand* operand;
    int64_t sample;
  };
  BICM_DEVICE static Row row(const Operand& x, int64_t sample) { return {&x, sample}; }
  BICM_DEVICE static Place of_row(const Row& row, Place place) {
    place.sample = row.sample;
    return place;
  }
  BICM_DEVICE static Raw load(const Layout& layout, const Row& row, const Place& place) {
    return load(layout, *row.operand, of_row(row, place));
  }
  BICM_DEVICE static void widen(const Row&, const Raw& raw, C* values) { values[0] = raw.value; }
  BICM_DEVICE static void store(const Layout& layout, const Row& row, const Place& place, const C* values) {
    store(layout, *row.operand, of_row(row, place), values);
  }

  BICM_DEVICE static int64_t offset(const Layout& layout, const Operand& x, const Place& place) {
    int64_t sum = place.sample * x.batch_stride;
    if (x.dense) return sum + place.begin;
    BICM_UNROLL(8)
    for (int dim = 0; dim < kMaxDims; ++dim) {
      if (dim < layout.dims) sum += place.index[dim] * x.strides[dim];
    }
    return sum;
  }

  template <class T>
  BICM_DEVICE static C read(const Operand& x, int64_t offset) {
    return static_cast<C>(value_of(load_at(static_cast<const T*>(x.data) + offset)));
  }
  template <class T>
  BICM_DEVICE static void write(const Operand& x, int64_t offset, C value) {
    store_at(static_cast<T*>(x.data) + offset, round_to<T>(value));
  }

  BICM_DEVICE static Raw load(const Layout& layout, const Operand& x, const Place& place) {
    const int64_t from = offset(layout, x, place);
    switch (x.dtype) {
      case DType::float16: return {read<Half>(x, from)};
      case DType::bfloat16: return {read<BFloat16>(x, from)};
      case DType::float32: return {read<float>(x, from)};
      default: return {read<double>(x, from)};
    }
  }

  BICM_DEVICE static void widen(const Operand&, const Raw& raw, C* values) { values[0] = raw.value; }

  BICM_DEVICE static void store(const Layout& layout, const Operand& x, const Place& place, const C* values) {
    const int64_t to = offset(layout, x, place);
    switch (x.dtype) {
      case DType::float16: return write<Half>(x, to, values[0]);
      case DType::bfloat16: return write<BFloat16>(x, to, values[0]);
      case DType::float32: return write<float>(x, to, values[0]);
      default: return write<double>(x, to, values[0]);
    }
  }
};

}  // namespace cuda
}  // namespace bicm
