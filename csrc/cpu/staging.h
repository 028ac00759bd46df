// Converts between tensors of any dtype and stride and buffers of the compute type in the first-level cache. A kernel
// processes contiguous numbers of one type; differences between tensors are handled here.
#pragma once

#include "halves.h"
#include "kernels.h"

BICM_NAMESPACE_BEGIN

struct Unit {
  int64_t sample, begin, count;
};

BICM_HD Unit unit_at(const Layout& layout, int64_t unit) {
  const int64_t per_sample = units_per_sample(layout);
  const int64_t begin = unit % per_sample * kChunk;
  const int64_t left = layout.elements - begin;
  return {unit / per_sample, begin, left < kChunk ? left : kChunk};
}

// Calls visit(offset, place, length) for every run of elements along the last dimension:
// `offset` of the run's first element in the tensor, its `place` in the unit.
template <class Visit>
inline void for_runs(const Layout& layout, const Operand& x, const Unit& unit, Visit visit) {
  const int last = layout.dims - 1;
  int64_t index[kMaxDims];
  int64_t rest = unit.begin;
  for (int dim = last; dim >= 0; --dim) {
    index[dim] = rest % layout.sizes[dim];
    rest /= layout.sizes[dim];
  }
  int64_t place = 0;
  while (place < unit.count) {
    int64_t offset = unit.sample * x.batch_stride;
    for (int dim = 0; dim <= last; ++dim) offset += index[dim] * x.strides[dim];
    int64_t length = layout.sizes[last] - index[last];
    if (length > unit.count - place) length = unit.count - place;
    visit(offset, place, length);
    place += length;
    index[last] += length;
    for (int dim = last; dim > 0 && index[dim] == layout.sizes[dim]; --dim) {
      index[dim] = 0;
      ++index[dim - 1];
    }
  }
}

template <class T, class C>
inline const C* load_as(const Layout& layout, const Operand& x, const Unit& unit, C* buffer) {
  const T* data = static_cast<const T*>(x.data);
  if (x.dense) {
    widen_all(data + unit.sample * x.batch_stride + unit.begin, buffer, unit.count);
  } else {
    const int64_t stride = x.strides[layout.dims - 1];
    for_runs(layout, x, unit, [&](int64_t offset, int64_t place, int64_t length) {
      for (int64_t i = 0; i < length; ++i) buffer[place + i] = static_cast<C>(widen(data[offset + i * stride]));
    });
  }
  return buffer;
}

template <class C>
BICM_HD bool is_compute_type(const Operand& x) {
  return x.dense && x.dtype == (Same<C, double>::value ? DType::float64 : DType::float32);
}

BICM_HD int64_t size_in_memory(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64: return 8;
    case DType::float32:
    case DType::int32: return 4;
    default: return 2;
  }
}

// Prefetches a unit's memory while noise is computed.
inline void prefetch_unit(const Operand& x, const Unit& unit) {
  if (!x.dense) return;
  const int64_t size = size_in_memory(x.dtype);
  const char* data = static_cast<const char*>(x.data) + (unit.sample * x.batch_stride + unit.begin) * size;
  for (int64_t i = 0; i < unit.count * size; i += 64) __builtin_prefetch(data + i, 0, 2);
}

// The unit's elements of x in the compute type: in place if they are contiguous already, otherwise staged in the
// buffer.
template <class C>
inline const C* load_unit(const Layout& layout, const Operand& x, const Unit& unit, C* buffer) {
  if (is_compute_type<C>(x)) return static_cast<const C*>(x.data) + unit.sample * x.batch_stride + unit.begin;
  switch (x.dtype) {
    case DType::float16: return load_as<Half>(layout, x, unit, buffer);
    case DType::bfloat16: return load_as<BFloat16>(layout, x, unit, buffer);
    case DType::float32: return load_as<float>(layout, x, unit, buffer);
    default: return load_as<double>(layout, x, unit, buffer);
  }
}

// Copies with non-temporal stores: whole cache lines where aligned, ordinary stores at the ends.
inline void stream_bytes(const unsigned char* from, unsigned char* to, int64_t bytes) {
#if defined(BICM_STREAMS)
  constexpr int64_t width = 4 * kLanes;
  int64_t head = -static_cast<int64_t>(reinterpret_cast<uintptr_t>(to)) & (width - 1);
  if (head > bytes) head = bytes;
  __builtin_memcpy(to, from, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + width <= bytes; i += width) {
    Ints x;
    __builtin_memcpy(&x, from + i, sizeof(x));
#if defined(BICM_ISA_AVX512)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), (__m512i)x);
#else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)x);
#endif
  }
  __builtin_memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
#else
  __builtin_memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

// Streamed stores are weakly ordered: a thread must fence before another may read what it wrote.
inline void finish_streams() {
#if defined(BICM_STREAMS)
  _mm_sfence();
#endif
}

template <class T, class C>
inline void store_as(const Layout& layout, const Operand& x, const Unit& unit, const C* from) {
  T* data = static_cast<T*>(x.data);
  if (x.dense && x.streams) {
    alignas(64) T rounded[kChunk];
    const T* results = rounded;
    if constexpr (Same<T, C>::value) {
      results = from;
    } else {
      narrow_all(from, rounded, unit.count);
    }
    stream_bytes(reinterpret_cast<const unsigned char*>(results),
                 reinterpret_cast<unsigned char*>(data + unit.sample * x.batch_stride + unit.begin),
                 unit.count * static_cast<int64_t>(sizeof(T)));
    return;
  }
  if (x.dense) {
    narrow_all(from, data + unit.sample * x.batch_stride + unit.begin, unit.count);
    return;
  }
  const int64_t stride = x.strides[layout.dims - 1];
  for_runs(layout, x, unit, [&](int64_t offset, int64_t place, int64_t length) {
    for (int64_t i = 0; i < length; ++i) data[offset + i * stride] = Narrow<T>::from(from[place + i]);
  });
}

// Rounds the unit's results once to the tensor's dtype and stores them.
template <class C>
inline void store_unit(const Layout& layout, const Operand& x, const Unit& unit, const C* from) {
  switch (x.dtype) {
    case DType::float16: return store_as<Half>(layout, x, unit, from);
    case DType::bfloat16: return store_as<BFloat16>(layout, x, unit, from);
    case DType::float32: return store_as<float>(layout, x, unit, from);
    default: return store_as<double>(layout, x, unit, from);
  }
}

BICM_NAMESPACE_END
