// How a thread's group of adjacent elements moves between dense tensors and registers: 128 bits at a time where the
// group is whole and aligned, element by element where it is not. One policy per kind of memory; strided.h has the
// third. Policies share one interface:
//
//   Place at(layout, sample, begin, aligned)    the group's address, and how many of its elements exist
//   Row row(operand, sample)                    a sample of a tensor; the following take it in place of the tensor
//   Place in_row(layout, sample, begin, whole)  a group of it; `whole` is known when a kernel is compiled
//   Raw load(layout, operand, place)            the bits, in flight until `widen` uses them
//   void widen(operand, raw, values)            the values in the compute type
//   void store(layout, operand, place, values)  rounded once to the operand's dtype
//
// Those of groups that are one access take a RoundPlace, too; rounds.h says which groups a thread has.
//
// A thread reads its group of every input before it writes, so outputs may alias inputs exactly.
#pragma once

#include "../core/half.h"
#include "access.h"

namespace bicm {
namespace cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

BICM_HD float value_of(Half x) { return half_to_float(x.bits); }
BICM_HD float value_of(BFloat16 x) { return bfloat16_to_float(x.bits); }
BICM_HD float value_of(float x) { return x; }
BICM_HD double value_of(double x) { return x; }

template <class T>
using Value = decltype(value_of(T{}));

BICM_HD void round_value(float x, Half& to) { to.bits = float_to_half(x); }
BICM_HD void round_value(float x, BFloat16& to) { to.bits = float_to_bfloat16(x); }
BICM_HD void round_value(float x, float& to) { to = x; }
BICM_HD void round_value(double x, double& to) { to = x; }

// The compute type's value as an element; float64 reaches the halves through float32, as in torch.
template <class T, class C>
BICM_HD T round_to(C x) {
  T element;
  round_value(static_cast<Value<T>>(x), element);
  return element;
}

BICM_HD int64_t size_in_bytes(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64: return 8;
    case DType::float32:
    case DType::int32: return 4;
    default: return 2;
  }
}

// Whether whole groups of x are aligned to kAccess in every sample.
inline bool access_aligned(const Layout& layout, const Operand& x) {
  const int64_t row = layout.batch == 1 ? 0 : x.batch_stride * size_in_bytes(x.dtype);
  return (reinterpret_cast<int64_t>(x.data) | row) % kAccess == 0;
}

template <size_t Bytes>
constexpr int kWords = Bytes < 4 ? 1 : Bytes / 4;

// A group's bits. Elements are extracted and inserted by shifts, because registers cannot be indexed.
template <int Words>
struct alignas(kAccess) Bits {
  uint32_t word[Words];

  template <class T>
  BICM_DEVICE T get(int i) const {
    if constexpr (sizeof(T) == 8) {
      return bit_cast<T>(static_cast<uint64_t>(word[2 * i + 1]) << 32 | word[2 * i]);
    } else if constexpr (sizeof(T) == 4) {
      return bit_cast<T>(word[i]);
    } else {
      return bit_cast<T>(static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2))));
    }
  }

  // Into zeros.
  template <class T>
  BICM_DEVICE void put(int i, T element) {
    if constexpr (sizeof(T) == 8) {
      const uint64_t bits = bit_cast<uint64_t>(element);
      word[2 * i] = static_cast<uint32_t>(bits);
      word[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    } else if constexpr (sizeof(T) == 4) {
      word[i] = bit_cast<uint32_t>(element);
    } else {
      word[i / 2] |= static_cast<uint32_t>(bit_cast<uint16_t>(element)) << (16 * (i % 2));
    }
  }
};

// `whole`: all of the group exists, and it is aligned to kAccess.
struct DensePlace {
  int64_t sample, begin;
  int count;
  bool whole;
};

// The bytes between a whole, aligned group and the start of its row, the same in every tensor of a round. A loop that
// counts bytes multiplies nothing by an element's size.
struct RoundPlace {
  int64_t offset;
};

// A sample of a dense tensor, whose address is computed once.
struct DenseRow {
  void* data;
  DType dtype;
  static constexpr int64_t batch_stride = 0;
};

// The empty statement keeps the compiler from computing the address again for every group; `Keeps`: there are registers
// for it.
template <bool Keeps>
BICM_DEVICE DenseRow row_of(const Operand& x, int64_t sample, int64_t size) {
  char* data = static_cast<char*>(x.data) + sample * x.batch_stride * size;
#if defined(__CUDA_ARCH__)
  if constexpr (Keeps) {
    size_t address = __cvta_generic_to_global(data);
    asm volatile("" : "+l"(address));
    data = static_cast<char*>(__cvta_global_to_generic(address));
  }
#endif
  return {data, x.dtype};
}

// Whether a group is moved in vectors where it is whole.
template <class T, int Group>
constexpr bool kVectors = Group > 1 && Group * sizeof(T) >= 8;

// X is Operand or DenseRow.
template <class T, class X>
BICM_DEVICE T* dense_address(const X& x, const DensePlace& place) {
  return static_cast<T*>(x.data) + place.sample * x.batch_stride + place.begin;
}

template <class T, class X>
BICM_DEVICE T* dense_address(const X& x, const RoundPlace& place) {
  return reinterpret_cast<T*>(static_cast<char*>(x.data) + place.offset);
}

template <class T, int Group, class X, class Raw>
BICM_DEVICE void load_dense(const X& x, const DensePlace& place, Raw& raw) {
  const T* from = dense_address<T>(x, place);
  if (kVectors<T, Group> && place.whole) {
    load_wide<Group * sizeof(T)>(raw.word, from);
    return;
  }
  BICM_UNROLL(8)
  for (int i = 0; i < Group; ++i) {
    if (i < place.count) raw.put(i, load_at(from + i));
  }
}

template <class T, int Group, class X, class Raw>
BICM_DEVICE void load_dense(const X& x, const RoundPlace& place, Raw& raw) {
  load_wide<Group * sizeof(T)>(raw.word, dense_address<T>(x, place));
}

template <class T, int Group, class C>
BICM_DEVICE auto rounded(const C* values) {
  Bits<kWords<Group * sizeof(T)>> raw = {};
  BICM_UNROLL(8)
  for (int i = 0; i < Group; ++i) raw.put(i, round_to<T>(values[i]));
  return raw;
}

template <class T, int Group, class X, class C>
BICM_DEVICE void store_dense(const X& x, const DensePlace& place, const C* values) {
  T* to = dense_address<T>(x, place);
  const auto raw = rounded<T, Group>(values);
  if (kVectors<T, Group> && place.whole) {
    store_wide<Group * sizeof(T)>(to, raw.word);
    return;
  }
  BICM_UNROLL(8)
  for (int i = 0; i < Group; ++i) {
    if (i < place.count) store_at(to + i, raw.template get<T>(i));
  }
}

template <class T, int Group, class X, class C>
BICM_DEVICE void store_dense(const X& x, const RoundPlace& place, const C* values) {
  store_wide<Group * sizeof(T)>(dense_address<T>(x, place), rounded<T, Group>(values).word);
}

template <class T, int Group, class Raw, class C>
BICM_DEVICE void widen_dense(const Raw& raw, C* values) {
  BICM_UNROLL(8)
  for (int i = 0; i < Group; ++i) values[i] = value_of(raw.template get<T>(i));
}

template <class C, int Group>
struct Dense {
  using Compute = C;
  using Place = DensePlace;
  using Row = DenseRow;
  static constexpr int kGroup = Group;

  BICM_DEVICE static Place at(const Layout& layout, int64_t sample, int64_t begin, bool aligned) {
    const int64_t left = layout.elements - begin;
    return {sample, begin, left < Group ? static_cast<int>(left) : Group, aligned && left >= Group};
  }
  BICM_DEVICE static Place in_row(const Layout& layout, int64_t, int64_t begin, bool whole) {
    if (whole) return {0, begin, Group, true};
    const int64_t left = layout.elements - begin;
    return {0, begin, left < Group ? static_cast<int>(left) : Group, false};
  }
};

template <class T, int Group>
struct PackedGroup : Dense<Value<T>, Group> {
  using Dense<Value<T>, Group>::kGroup;
  using C = Value<T>;
  using Raw = Bits<kWords<Group * sizeof(T)>>;

  BICM_DEVICE static DenseRow row(const Operand& x, int64_t sample) {
    return row_of<sizeof(T) < 8>(x, sample, sizeof(T));
  }

  template <class X, class Place>
  BICM_DEVICE static Raw load(const Layout&, const X& x, const Place& place) {
    Raw raw = {};
    load_dense<T, kGroup>(x, place, raw);
    return raw;
  }
  template <class X>
  BICM_DEVICE static void widen(const X&, const Raw& raw, C* values) {
    widen_dense<T, kGroup>(raw, values);
  }
  template <class X, class Place>
  BICM_DEVICE static void store(const Layout&, const X& x, const Place& place, const C* values) {
    store_dense<T, kGroup>(x, place, values);
  }
};

// Every operand is dense and holds T. Part: groups of another size, whose elements move one by one.
template <class T>
struct Packed : PackedGroup<T, sizeof(T) == 2 ? 8 : 4> {
  template <int Group>
  using Part = PackedGroup<T, Group>;
};

template <int Group>
struct MixedGroup : Dense<float, Group> {
  using Dense<float, Group>::kGroup;
  using Raw = Bits<Group>;  // halves fill the first half

  BICM_DEVICE static DenseRow row(const Operand& x, int64_t sample) {
    return row_of<true>(x, sample, size_in_bytes(x.dtype));
  }

  template <class X>
  BICM_DEVICE static Raw load(const Layout&, const X& x, const DensePlace& place) {
    Raw raw = {};
    if (x.dtype == DType::float32) {
      load_dense<float, kGroup>(x, place, raw);
    } else {
      load_dense<Half, kGroup>(x, place, raw);
    }
    return raw;
  }

  template <class X>
  BICM_DEVICE static void widen(const X& x, const Raw& raw, float* values) {
    switch (x.dtype) {
      case DType::float16: return widen_dense<Half, kGroup>(raw, values);
      case DType::bfloat16: return widen_dense<BFloat16, kGroup>(raw, values);
      default: return widen_dense<float, kGroup>(raw, values);
    }
  }

  template <class X>
  BICM_DEVICE static void store(const Layout&, const X& x, const DensePlace& place, const float* values) {
    switch (x.dtype) {
      case DType::float16: return store_dense<Half, kGroup>(x, place, values);
      case DType::bfloat16: return store_dense<BFloat16, kGroup>(x, place, values);
      default: return store_dense<float, kGroup>(x, place, values);
    }
  }
};

// Every operand is dense and float32 or a half; the dtype is checked at run time, once per group.
struct Mixed : MixedGroup<8> {
  template <int Group>
  using Part = MixedGroup<Group>;
};

}  // namespace cuda
}  // namespace bicm
