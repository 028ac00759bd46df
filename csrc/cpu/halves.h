// float32, float16 and bfloat16 in memory: an element, or a vector that is widened and rounded in registers.
#pragma once

#include "../core/half.h"
#include "lanes.h"

BICM_NAMESPACE_BEGIN

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

BICM_HD float widen(float x) { return x; }
BICM_HD double widen(double x) { return x; }
BICM_HD int64_t widen(int32_t x) { return x; }
BICM_HD int64_t widen(int64_t x) { return x; }
BICM_HD float widen(Half x) { return half_to_float(x.bits); }
BICM_HD float widen(BFloat16 x) { return bfloat16_to_float(x.bits); }

template <class T>
struct Narrow {
  template <class C>
  BICM_HD static T from(C x) {
    return static_cast<T>(x);
  }
};
template <>
struct Narrow<Half> {
  template <class C>
  BICM_HD static Half from(C x) {
    return {float_to_half(static_cast<float>(x))};
  }
};
template <>
struct Narrow<BFloat16> {
  template <class C>
  BICM_HD static BFloat16 from(C x) {
    return {float_to_bfloat16(static_cast<float>(x))};
  }
};

#if defined(BICM_VECTOR)

// The bytes of a vector of float32, in two sizes.
#if defined(BICM_ISA_AVX512)
using Bytes = __m512i;
using HalfBytes = __m256i;
BICM_HD void stream_bytes_of(Bytes x, void* to) { _mm512_stream_si512(static_cast<Bytes*>(to), x); }
BICM_HD void stream_bytes_of(HalfBytes x, void* to) { _mm256_stream_si256(static_cast<HalfBytes*>(to), x); }
#elif defined(BICM_ISA_AVX2)
using Bytes = __m256i;
using HalfBytes = __m128i;
BICM_HD void stream_bytes_of(Bytes x, void* to) { _mm256_stream_si256(static_cast<Bytes*>(to), x); }
BICM_HD void stream_bytes_of(HalfBytes x, void* to) { _mm_stream_si128(static_cast<HalfBytes*>(to), x); }
#else
using Bytes = uint8x16_t;
using HalfBytes = uint8x8_t;
#endif

template <class Vector>
BICM_HD Vector load_vector(const void* from) {
  Vector x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

// kStreams: with non-temporal stores, to memory that is aligned to what is stored.
template <bool kStreams, class Vector>
BICM_HD void store_vector(Vector x, void* to) {
  if constexpr (kStreams) {
    stream_bytes_of(x, to);  // where BICM_STREAMS
  } else {
    __builtin_memcpy(to, &x, sizeof(x));
  }
}

BICM_HD Floats load_floats(const float* from) { return load_vector<Floats>(from); }

BICM_HD HalfBytes to_halves(Floats x) {
#if defined(BICM_ISA_AVX512)
  return _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(BICM_ISA_AVX2)
  return _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (HalfBytes)vcvt_f16_f32((float32x4_t)x);
#endif
}

BICM_HD Floats from_halves(HalfBytes x) {
#if defined(BICM_ISA_AVX512)
  return (Floats)_mm512_cvtph_ps(x);
#elif defined(BICM_ISA_AVX2)
  return (Floats)_mm256_cvtph_ps(x);
#else
  return (Floats)vcvt_f32_f16((float16x4_t)x);
#endif
}

BICM_HD Floats load_floats(const Half* from) { return from_halves(load_vector<HalfBytes>(from)); }

// By instruction: the compiler's own conversions between words and halves take three times as many.
BICM_HD Floats load_floats(const BFloat16* from) {
  const HalfBytes x = load_vector<HalfBytes>(from);
#if defined(BICM_ISA_AVX512)
  return bit_cast<Floats>((Words)_mm512_cvtepu16_epi32(x) << 16);
#elif defined(BICM_ISA_AVX2)
  return bit_cast<Floats>((Words)_mm256_cvtepu16_epi32(x) << 16);
#else
  return (Floats)vshll_n_u16((uint16x4_t)x, 16);
#endif
}

struct Pair {
  Floats first, second;
};

template <class T>
BICM_HD Pair load_pair(const T* from) {
  return {load_floats(from), load_floats(from + kLanes)};
}

#if defined(BICM_ISA_AVX512)
// The words of a register for its permutation: first + step i.
typedef uint16_t Places __attribute__((vector_size(4 * kLanes)));
BICM_HD Bytes places(int first, int step) {
  Places place = {};
  for (int i = 0; i < 2 * kLanes; ++i) place[i] = static_cast<uint16_t>(first + i * step / 2);
  return (Bytes)place;
}

// Words to the high halves of lanes in one instruction, and zeros to the low ones.
BICM_HD Pair pair_of_bfloat16s(Bytes x) {
  constexpr __mmask32 high = 0xAAAAAAAAu;
  return {(Floats)_mm512_maskz_permutexvar_epi16(high, places(0, 1), x),
          (Floats)_mm512_maskz_permutexvar_epi16(high, places(kLanes, 1), x)};
}

BICM_HD Pair load_pair(const BFloat16* from) { return pair_of_bfloat16s(load_vector<Bytes>(from)); }
#endif

#if defined(BICM_ISA_AVX512BF16)
// Whether there are numbers that the processor's instruction for bfloat16 does not round as we do: it flushes subnormal
// numbers, and keeps bits of a NaN.
BICM_HD bool any_special(Floats x, Floats y) {
  constexpr int quiet_nan = 0x01, subnormal = 0x20, signaling_nan = 0x80,
                special = quiet_nan | subnormal | signaling_nan;
  return (_mm512_fpclass_ps_mask((__m512)x, special) | _mm512_fpclass_ps_mask((__m512)y, special)) != 0;
}
#endif

BICM_HD bool any_nan(Floats x, Floats y) {
#if defined(BICM_ISA_AVX512)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_UNORD_Q) != 0;
#elif defined(BICM_ISA_NEON)
  return vminvq_u32((uint32x4_t)((x == x) & (y == y))) == 0;
#else
  const __m256 nan = _mm256_cmp_ps((__m256)x, (__m256)y, _CMP_UNORD_Q);
  return !_mm256_testz_ps(nan, nan);
#endif
}

// A NaN becomes the one that rounding leaves alone.
BICM_HD Floats plain_nan(Floats x) {
  const Words bits = bit_cast<Words>(x), nan = (bits & 0x80000000u) | 0x7FC00000u;
  return LaneOps<Floats>::select((bits & 0x7FFFFFFFu) > 0x7F800000u, bit_cast<Floats>(nan), x);
}

// Rounded once, in the high half of every word.
BICM_HD Words round_to_bfloat16(Floats x) {
  const Words bits = bit_cast<Words>(x), up = bits + 0x7FFFu;
#if defined(BICM_ISA_AVX512)
  const Bytes one = _mm512_set1_epi32(1);
  const __mmask16 odd = _mm512_test_epi32_mask((Bytes)bits, _mm512_set1_epi32(0x10000));
  return (Words)_mm512_mask_add_epi32((Bytes)up, odd, (Bytes)up, one);
#else
  return up + (bits >> 16 & 1u);
#endif
}

// Two vectors side by side, rounded once: instructions that narrow take two. Returns the numbers that are in memory then.
template <bool kStreams>
BICM_HD Pair store_pair(Floats x, Floats y, float* to) {
  store_vector<kStreams>((Bytes)x, to);
  store_vector<kStreams>((Bytes)y, to + kLanes);
  return {x, y};
}

template <bool kStreams>
BICM_HD Pair store_pair(Floats x, Floats y, Half* to) {
  const HalfBytes first = to_halves(x), second = to_halves(y);
  store_vector<kStreams>(first, to);
  store_vector<kStreams>(second, to + kLanes);
  return {from_halves(first), from_halves(second)};
}

template <bool kStreams>
BICM_HD Pair store_pair(Floats x, Floats y, BFloat16* to) {
#if defined(BICM_ISA_AVX512BF16)
  if (__builtin_expect(!any_special(x, y), 1)) {
    const Bytes both = (Bytes)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
    store_vector<kStreams>(both, to);
    return pair_of_bfloat16s(both);
  }
#endif
  Words high = round_to_bfloat16(x), higher = round_to_bfloat16(y);
  if (__builtin_expect(any_nan(x, y), 0)) {
    high = round_to_bfloat16(plain_nan(x));
    higher = round_to_bfloat16(plain_nan(y));
  }
#if defined(BICM_ISA_AVX512)
  store_vector<kStreams>(_mm512_permutex2var_epi16((Bytes)high, places(1, 4), (Bytes)higher), to);
#elif defined(BICM_ISA_NEON)
  store_vector<kStreams>((Bytes)vuzp2q_u16((uint16x8_t)high, (uint16x8_t)higher), to);
#else
  // Quarters of the first vector and of the second take turns.
  const Bytes mixed = _mm256_packus_epi32((Bytes)(high >> 16), (Bytes)(higher >> 16));
  store_vector<kStreams>(_mm256_permute4x64_epi64(mixed, 0xD8), to);
#endif
  return {bit_cast<Floats>(high & 0xFFFF0000u), bit_cast<Floats>(higher & 0xFFFF0000u)};
}

#endif

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

template <class T, class C>
inline void widen_all(const T* from, C* to, int64_t count) {
  int64_t i = 0;
#if defined(BICM_VECTOR)
  if constexpr (sizeof(T) == 2 && Same<C, float>::value) {
    for (; i + kLanes <= count; i += kLanes) store_vector<false>(load_floats(from + i), to + i);
  }
#endif
  for (; i < count; ++i) to[i] = static_cast<C>(widen(from[i]));
}

template <class T, class C>
inline void narrow_all(const C* from, T* to, int64_t count) {
  int64_t i = 0;
#if defined(BICM_VECTOR)
  if constexpr (sizeof(T) == 2 && Same<C, float>::value) {
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      store_pair<false>(load_floats(from + i), load_floats(from + i + kLanes), to + i);
    }
  }
#endif
  for (; i < count; ++i) to[i] = Narrow<T>::from(from[i]);
}

BICM_NAMESPACE_END
