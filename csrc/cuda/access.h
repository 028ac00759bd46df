// The only ways to a tensor in global memory, so that the emulator sees every access.
#pragma once

#include <stddef.h>

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

// Whole groups at multiples of kAccess, 128 bits at a time.
template <size_t Bytes>
BICM_DEVICE void load_wide(void* to, const void* from) {
  see_load(from, Bytes, kAccess);
  __builtin_memcpy(__builtin_assume_aligned(to, kAccess), __builtin_assume_aligned(from, kAccess), Bytes);
}

template <size_t Bytes>
BICM_DEVICE void store_wide(void* to, const void* from) {
  see_store(to, Bytes, kAccess);
  __builtin_memcpy(__builtin_assume_aligned(to, kAccess), __builtin_assume_aligned(from, kAccess), Bytes);
}

}  // namespace cuda
}  // namespace bicm
