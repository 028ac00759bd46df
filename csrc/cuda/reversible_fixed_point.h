// How a thread's group of fixed-point states, buffers and floating tensors moves: policies like those of memory.h,
// whose raw bits become float64 values or integers. A tensor's dtype is checked once per group.
#pragma once

#include "../core/reversible.h"
#include "strided.h"

namespace bicm {
namespace cuda {

// A state's element; as an integer, with int64's value for missing elements.
struct Fixed32 {
  int32_t q;
};
struct Fixed64 {
  int64_t q;
};

constexpr int32_t kMissing32 = -0x7FFFFFFF - 1;

BICM_HD int64_t value_of(Fixed32 x) { return x.q == kMissing32 ? kMissing : x.q; }
BICM_HD int64_t value_of(Fixed64 x) { return x.q; }
BICM_HD void round_value(int64_t x, Fixed32& to) { to.q = x == kMissing ? kMissing32 : static_cast<int32_t>(x); }
BICM_HD void round_value(int64_t x, Fixed64& to) { to.q = x; }

template <int Group, class Raw>
BICM_DEVICE void integers_of(const Operand& x, const Raw& raw, int64_t* integers) {
  if (x.dtype == DType::int32) return widen_dense<Fixed32, Group>(raw, integers);
  widen_dense<Fixed64, Group>(raw, integers);
}

// In float64; a state is decoded.
template <int Group, class Raw>
BICM_DEVICE void values_of(const Operand& x, const Raw& raw, double unit, double* values) {
  switch (x.dtype) {
    case DType::float16: return widen_dense<Half, Group>(raw, values);
    case DType::bfloat16: return widen_dense<BFloat16, Group>(raw, values);
    case DType::float32: return widen_dense<float, Group>(raw, values);
    case DType::float64: return widen_dense<double, Group>(raw, values);
    default: break;
  }
  int64_t integers[Group];
  integers_of<Group>(x, raw, integers);
  BICM_UNROLL(8)
  for (int i = 0; i < Group; ++i) values[i] = decode(integers[i], kLargest, unit);
}

// Four elements: two accesses of 16 bytes for an int64 state, one for float32 and int32, one of 8 bytes for halves.
struct DenseFixed : Dense<double, 4> {
  using Raw = Bits<8>;

  BICM_DEVICE static bool exists(const Place& place, int i) { return i < place.count; }

  BICM_DEVICE static Raw load(const Layout&, const Operand& x, const Place& place) {
    Raw raw = {};
    switch (size_in_bytes(x.dtype)) {
      case 2: load_dense<Half, kGroup>(x, place, raw); break;
      case 4: load_dense<Fixed32, kGroup>(x, place, raw); break;
      default: load_dense<Fixed64, kGroup>(x, place, raw);
    }
    return raw;
  }
  BICM_DEVICE static void store(const Layout&, const Operand& x, const Place& place, const int64_t* integers) {
    if (x.dtype == DType::int32) return store_dense<Fixed32, kGroup>(x, place, integers);
    store_dense<Fixed64, kGroup>(x, place, integers);
  }
  BICM_DEVICE static void store(const Layout&, const Operand& x, const Place& place, const double* values) {
    switch (x.dtype) {
      case DType::float16: return store_dense<Half, kGroup>(x, place, values);
      case DType::bfloat16: return store_dense<BFloat16, kGroup>(x, place, values);
      case DType::float32: return store_dense<float, kGroup>(x, place, values);
      default: return store_dense<double, kGroup>(x, place, values);
    }
  }
};

// One element of any tensor.
struct StridedFixed {
  using Base = Strided<double>;
  using Integers = Strided<int64_t>;
  using Place = Base::Place;
  using Raw = Bits<2>;
  static constexpr int kGroup = 1;

  BICM_DEVICE static bool exists(const Place&, int) { return true; }

  BICM_DEVICE static Place at(const Layout& layout, int64_t sample, int64_t begin, bool aligned) {
    return Base::at(layout, sample, begin, aligned);
  }

  template <class T>
  BICM_DEVICE static Raw read(const Operand& x, int64_t offset) {
    Raw raw = {};
    raw.put(0, load_at(static_cast<const T*>(x.data) + offset));
    return raw;
  }

  BICM_DEVICE static Raw load(const Layout& layout, const Operand& x, const Place& place) {
    const int64_t from = Base::offset(layout, x, place);
    switch (size_in_bytes(x.dtype)) {
      case 2: return read<Half>(x, from);
      case 4: return read<Fixed32>(x, from);
      default: return read<Fixed64>(x, from);
    }
  }
  BICM_DEVICE static void store(const Layout& layout, const Operand& x, const Place& place, const int64_t* integers) {
    const int64_t to = Base::offset(layout, x, place);
    if (x.dtype == DType::int32) return Integers::write<Fixed32>(x, to, integers[0]);
    Integers::write<Fixed64>(x, to, integers[0]);
  }
  BICM_DEVICE static void store(const Layout& layout, const Operand& x, const Place& place, const double* values) {
    Base::store(layout, x, place, values);
  }
};

}  // namespace cuda
}  // namespace bicm
