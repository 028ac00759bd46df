// All accesses to tensors in global memory, so that the emulator can check and count them.
#pragma once

#include <stddef.h>

#include <type_traits>

#include "launch.h"

namespace bicm {
namespace cuda {

constexpr int kAccess = 16;  // bytes of the widest access

#if defined(BICM_EMULATE)
inline void see_load(const void* from, size_t bytes, size_t alignment) { emulator::count_read(from, bytes, alignment); }
inline void see_store(void* to, size_t bytes, size_t alignment) { emulator::count_write(to, bytes, alignment); }
#else
BICM_DEVICE void see_load(const void*, size_t, size_t) {}
BICM_DEVICE void see_store(void*, size_t, size_t) {}
#endif

template <class T>
BICM_DEVICE T load_at(const T* from) {
  see_load(from, sizeof(T), alignof(T));
  return *from;
}

template <class T>
BICM_DEVICE void store_at(T* to, T value) {
  see_store(to, sizeof(T), alignof(T));
  *to = value;
}

// Whole groups of a tensor aligned to kAccess, 128 bits at a time; a smaller group in one access.
template <size_t Bytes>
constexpr size_t kWideAlignment = Bytes < kAccess ? Bytes : kAccess;

#if defined(__CUDA_ARCH__)
// Forces one instruction: the compiler splits a copy of 16 bytes where another branch copies 8.
BICM_DEVICE void load_vector(uint32_t* to, const uint4* from) {
  const uint4 x = *from;
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
BICM_DEVICE void load_vector(uint32_t* to, const uint2* from) {
  const uint2 x = *from;
  to[0] = x.x, to[1] = x.y;
}
#endif

template <size_t Bytes>
BICM_DEVICE void load_wide(uint32_t* to, const void* from) {
  constexpr size_t alignment = kWideAlignment<Bytes>;
  see_load(from, Bytes, alignment);
#if defined(__CUDA_ARCH__)
  using Vector = std::conditional_t < Bytes<kAccess, uint2, uint4>;
  BICM_UNROLL(8)
  for (size_t i = 0; i < Bytes / alignment; ++i)
    load_vector(to + i * alignment / 4, static_cast<const Vector*>(from) + i);
#else
  __builtin_memcpy(to, from, Bytes);
#endif
}

template <size_t Bytes>
BICM_DEVICE void store_wide(void* to, const void* from) {
  constexpr size_t alignment = kWideAlignment<Bytes>;
  see_store(to, Bytes, alignment);
  __builtin_memcpy(__builtin_assume_aligned(to, alignment), __builtin_assume_aligned(from, kAccess), Bytes);
}

// A number that several threads read and write concurrently: volatile, which the hardware treats as relaxed atomic.
template <class T>
BICM_DEVICE T load_relaxed(const T* from) {
  see_load(from, sizeof(T), alignof(T));
  return *static_cast<const volatile T*>(from);
}

template <class T>
BICM_DEVICE void store_relaxed(T* to, T value) {
  see_store(to, sizeof(T), alignof(T));
  *static_cast<volatile T*>(to) = value;
}

// Adds 1 to a number that blocks count with; whether it was `most`, behind which it begins at 0 again.
BICM_DEVICE bool count_to(unsigned* counter, unsigned most) {
  see_load(counter, sizeof(unsigned), alignof(unsigned));
  see_store(counter, sizeof(unsigned), alignof(unsigned));
  return atomicInc(counter, most) == most;
}

}  // namespace cuda
}  // namespace bicm
