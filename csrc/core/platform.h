// Compiler-dependent definitions for core/: host or device, and the namespace.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define BICM_HD __host__ __device__ __forceinline__
#else
#define BICM_HD inline __attribute__((always_inline))
#endif

// Before a loop that must be unrolled: its arrays are in registers.
#if defined(__CUDA_ARCH__)
#define BICM_UNROLL(count) _Pragma("unroll")
#elif defined(__CUDACC__)
#define BICM_UNROLL(count)
#else
#define BICM_PRAGMA(text) _Pragma(#text)
#define BICM_UNROLL(count) BICM_PRAGMA(GCC unroll count)
#endif

// Before a rarely executed loop that must not be unrolled: copies of its body would slow the common path.
#if defined(__CUDA_ARCH__)
#define BICM_LOOP _Pragma("unroll 1")
#else
#define BICM_LOOP
#endif

// Every unit that is compiled once per instruction set has its own inline namespace. Without it the
// linker may take the AVX-512 copy of an inline function for the baseline and crash older processors.
#if !defined(BICM_ISA)
#define BICM_ISA portable
#endif

#define BICM_NAMESPACE_BEGIN \
  namespace bicm {           \
  inline namespace BICM_ISA {
#define BICM_NAMESPACE_END \
  }                        \
  }

BICM_NAMESPACE_BEGIN

template <class To, class From>
BICM_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

BICM_NAMESPACE_END
