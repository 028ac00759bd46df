// The lane types of an instruction set, and the few functions that core/ asks of a lane type. AVX-512 and AVX2 use the
// compiler's vector types, so that core/ is written once with ordinary operators; scalar code is one lane.
#pragma once

#include "../core/normal.h"

#if defined(BICM_ISA_AVX512) || defined(BICM_ISA_AVX2)
#include <immintrin.h>
#define BICM_VECTOR 1
#endif

BICM_NAMESPACE_BEGIN

#if defined(BICM_VECTOR)

#if defined(BICM_ISA_AVX512)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
// One 32-bit word in the low half of each 64-bit lane: the form in which the machine multiplies.
typedef uint64_t WideWords __attribute__((vector_size(4 * kLanes)));

template <>
struct LaneOps<Floats> {
  using Int = Ints;
  using Word = Words;
  BICM_HD static Floats to_float(Ints x) { return __builtin_convertvector(x, Floats); }
  BICM_HD static Floats select(Ints mask, Floats yes, Floats no) {
    return bit_cast<Floats>((bit_cast<Ints>(yes) & mask) | (bit_cast<Ints>(no) & ~mask));
  }
#if defined(BICM_ISA_AVX512)
  BICM_HD static Floats to_float(Words x) { return (Floats)_mm512_cvtepu32_ps((__m512i)x); }
  BICM_HD static Floats square_root(Floats x) { return (Floats)_mm512_sqrt_ps((__m512)x); }
#else
  // No unsigned conversion in AVX2: both halves are exact, so the sum is the only rounding.
  BICM_HD static Floats to_float(Words x) {
    return to_float((Ints)(x >> 16)) * 65536.0f + to_float((Ints)(x & 0xFFFFu));
  }
  BICM_HD static Floats square_root(Floats x) { return (Floats)_mm256_sqrt_ps((__m256)x); }
#endif
};

template <>
struct WordOps<WideWords> {
  BICM_HD static void multiply_wide(WideWords a, uint32_t multiplier, WideWords& high, WideWords& low) {
    const WideWords m = WideWords{} + multiplier;
#if defined(BICM_ISA_AVX512)
    low = (WideWords)_mm512_mul_epu32((__m512i)a, (__m512i)m);
#else
    low = (WideWords)_mm256_mul_epu32((__m256i)a, (__m256i)m);
#endif
    high = low >> 32;
  }
  BICM_HD static WideWords xor_three(WideWords a, WideWords b, uint32_t key) {
#if defined(BICM_ISA_AVX512)
    return (WideWords)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, _mm512_set1_epi64(key), 0x96);
#else
    return a ^ b ^ static_cast<uint64_t>(key);
#endif
  }
};

#else

constexpr int kLanes = 1;
using Floats = float;

#endif

BICM_NAMESPACE_END
