// The lane types of an instruction set, and the few functions that core/ needs of a lane type. AVX-512, AVX2 and NEON use
// the compiler's vector types, so that core/ is written once with ordinary operators; scalar code is one lane.
#pragma once

#include "../core/normal.h"

#if defined(BICM_ISA_AVX512) || defined(BICM_ISA_AVX2)
#include <immintrin.h>
#define BICM_VECTOR 1
#define BICM_STREAMS 1  // has non-temporal stores
#elif defined(BICM_ISA_NEON)
#include <arm_neon.h>
#define BICM_VECTOR 1
#endif

BICM_NAMESPACE_BEGIN

#if defined(BICM_VECTOR)

#if defined(BICM_ISA_AVX512)
constexpr int kLanes = 16;
#elif defined(BICM_ISA_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

template <>
struct LaneOps<Floats> {
  using Int = Ints;
  using Word = Words;
  BICM_HD static Floats to_float(Ints x) { return __builtin_convertvector(x, Floats); }
  BICM_HD static Ints truncate(Floats x) { return __builtin_convertvector(x, Ints); }
  BICM_HD static Floats all(float x) { return Floats{} + x; }
  // a b + c, rounded once: to reproduce torch's arithmetic; in this library's own only where a b is exact.
  BICM_HD static Floats fused(Floats a, Floats b, Floats c) {
#if defined(BICM_ISA_AVX512)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(BICM_ISA_AVX2)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
  }
  BICM_HD static Floats add_exact(Floats a, float b, float c) { return fused(a, all(b), all(c)); }
  BICM_HD static Floats add_exact(Floats a, float b, Floats c) { return fused(a, all(b), c); }
  BICM_HD static Floats where_odd(Words bits, Floats yes, Floats no) {
#if defined(BICM_ISA_AVX512)
    return (Floats)_mm512_mask_blend_ps(_mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(1)), (__m512)no,
                                        (__m512)yes);
#else
    return select(-(Ints)(bits & 1u), yes, no);
#endif
  }
  BICM_HD static Floats select(Ints mask, Floats yes, Floats no) {
    return bit_cast<Floats>((bit_cast<Ints>(yes) & mask) | (bit_cast<Ints>(no) & ~mask));
  }
  BICM_HD static Floats flip_sign(Floats x, Words bits) {
#if defined(BICM_ISA_AVX512)
    return (Floats)_mm512_ternarylogic_epi32((__m512i)x, (__m512i)bits, _mm512_set1_epi32(INT32_MIN), 0x78);
#else
    return bit_cast<Floats>(bit_cast<Words>(x) ^ (bits & 0x80000000u));
#endif
  }
#if defined(BICM_ISA_AVX512)
  BICM_HD static Floats to_float(Words x) { return (Floats)_mm512_cvtepu32_ps((__m512i)x); }
  BICM_HD static Floats square_root(Floats x) { return (Floats)_mm512_sqrt_ps((__m512)x); }
#elif defined(BICM_ISA_NEON)
  BICM_HD static Floats to_float(Words x) { return __builtin_convertvector(x, Floats); }
  BICM_HD static Floats square_root(Floats x) { return (Floats)vsqrtq_f32((float32x4_t)x); }
#else
  // No unsigned conversion in AVX2: both halves are exact, so the sum is the only rounding.
  BICM_HD static Floats to_float(Words x) {
    return add_exact(to_float((Ints)(x >> 16)), 65536.0f, to_float((Ints)(x & 0xFFFFu)));
  }
  BICM_HD static Floats square_root(Floats x) { return (Floats)_mm256_sqrt_ps((__m256)x); }
#endif
};

#if defined(BICM_ISA_NEON)

// Products of the lower and of the upper two lanes; their low words, and their high words.
template <>
struct WordOps<Words> {
  BICM_HD static void multiply_wide(Words a, uint32_t multiplier, Words& high, Words& low) {
    const uint32x4_t x = (uint32x4_t)a, m = vdupq_n_u32(multiplier);
    const uint32x4_t lower = (uint32x4_t)vmull_u32(vget_low_u32(x), vget_low_u32(m));
    const uint32x4_t upper = (uint32x4_t)vmull_high_u32(x, m);
    low = (Words)vuzp1q_u32(lower, upper);
    high = (Words)vuzp2q_u32(lower, upper);
  }
  BICM_HD static Words xor_three(Words a, Words b, uint32_t key) { return a ^ b ^ key; }
};

using PhiloxWord = Words;
BICM_HD void set_counter(Words& words, int i, uint32_t word) { words[i] = word; }
BICM_HD uint32_t get_counter(const Words& words, int i) { return words[i]; }

#else

// One 32-bit word in the low half of each 64-bit lane: the layout of the multiplication instruction.
typedef uint64_t WideWords __attribute__((vector_size(4 * kLanes)));

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

// The high halves are arbitrary.
using PhiloxWord = WideWords;
BICM_HD void set_counter(WideWords& words, int i, uint32_t word) { words[i] = word | 0xBAD0000000000000ull; }
BICM_HD uint32_t get_counter(const WideWords& words, int i) { return static_cast<uint32_t>(words[i]); }

#endif

// As many counters as philox takes at once, in its layout.
constexpr int kCounters = sizeof(PhiloxWord) / sizeof(PhiloxWord{}[0]);

// Several vectors processed as one. A single chain of dependent operations is bound by latency;
// a group interleaves the chains of its parts, operation by operation.
template <class T, int N>
struct Group {
  T part[N];
};

template <class T, int N>
BICM_HD const T& part_of(const Group<T, N>& group, int i) {
  return group.part[i];
}
BICM_HD float part_of(float all, int) { return all; }

#define BICM_GROUP_OPERATOR(op)                                                 \
  template <class T, int N>                                                     \
  BICM_HD Group<T, N> operator op(const Group<T, N>& a, const Group<T, N>& b) { \
    Group<T, N> result;                                                         \
    for (int i = 0; i < N; ++i) result.part[i] = a.part[i] op b.part[i];        \
    return result;                                                              \
  }                                                                             \
  template <class T, int N, class Scalar>                                       \
  BICM_HD Group<T, N> operator op(const Group<T, N>& a, Scalar b) {             \
    Group<T, N> result;                                                         \
    for (int i = 0; i < N; ++i) result.part[i] = a.part[i] op b;                \
    return result;                                                              \
  }
BICM_GROUP_OPERATOR(+)
BICM_GROUP_OPERATOR(-)
BICM_GROUP_OPERATOR(*)
BICM_GROUP_OPERATOR(&)
BICM_GROUP_OPERATOR(^)
BICM_GROUP_OPERATOR(>>)
BICM_GROUP_OPERATOR(<<)
#undef BICM_GROUP_OPERATOR

template <class T, int N>
BICM_HD Group<T, N> operator-(const Group<T, N>& a) {
  Group<T, N> result;
  for (int i = 0; i < N; ++i) result.part[i] = -a.part[i];
  return result;
}

template <class T, int N>
struct LaneOps<Group<T, N>> {
  using Int = Group<typename LaneOps<T>::Int, N>;
  using Word = Group<typename LaneOps<T>::Word, N>;
  template <class I>
  BICM_HD static Group<T, N> to_float(const Group<I, N>& x) {
    Group<T, N> result;
    for (int i = 0; i < N; ++i) result.part[i] = LaneOps<T>::to_float(x.part[i]);
    return result;
  }
  BICM_HD static Int truncate(const Group<T, N>& x) {
    Int result;
    for (int i = 0; i < N; ++i) result.part[i] = LaneOps<T>::truncate(x.part[i]);
    return result;
  }
  BICM_HD static Group<T, N> all(float x) {
    Group<T, N> result;
    for (int i = 0; i < N; ++i) result.part[i] = LaneOps<T>::all(x);
    return result;
  }
  BICM_HD static Group<T, N> fused(const Group<T, N>& a, const Group<T, N>& b, const Group<T, N>& c) {
    Group<T, N> result;
    for (int i = 0; i < N; ++i) result.part[i] = LaneOps<T>::fused(a.part[i], b.part[i], c.part[i]);
    return result;
  }
  template <class Addend>
  BICM_HD static Group<T, N> add_exact(const Group<T, N>& a, float b, const Addend& c) {
    Group<T, N> result;
    for (int i = 0; i < N; ++i) result.part[i] = LaneOps<T>::add_exact(a.part[i], b, part_of(c, i));
    return result;
  }
  BICM_HD static Group<T, N> where_odd(const Word& bits, const Group<T, N>& yes, const Group<T, N>& no) {
    Group<T, N> result;
    for (int i = 0; i < N; ++i) result.part[i] = LaneOps<T>::where_odd(bits.part[i], yes.part[i], no.part[i]);
    return result;
  }
  BICM_HD static Group<T, N> select(const Int& mask, const Group<T, N>& yes, const Group<T, N>& no) {
    Group<T, N> result;
    for (int i = 0; i < N; ++i) result.part[i] = LaneOps<T>::select(mask.part[i], yes.part[i], no.part[i]);
    return result;
  }
  BICM_HD static Group<T, N> flip_sign(const Group<T, N>& x, const Word& bits) {
    Group<T, N> result;
    for (int i = 0; i < N; ++i) result.part[i] = LaneOps<T>::flip_sign(x.part[i], bits.part[i]);
    return result;
  }
  BICM_HD static Group<T, N> square_root(const Group<T, N>& x) {
    Group<T, N> result;
    for (int i = 0; i < N; ++i) result.part[i] = LaneOps<T>::square_root(x.part[i]);
    return result;
  }
};

template <class T, int N>
struct WordOps<Group<T, N>> {
  BICM_HD static void multiply_wide(const Group<T, N>& a, uint32_t multiplier, Group<T, N>& high, Group<T, N>& low) {
    for (int i = 0; i < N; ++i) WordOps<T>::multiply_wide(a.part[i], multiplier, high.part[i], low.part[i]);
  }
  BICM_HD static Group<T, N> xor_three(const Group<T, N>& a, const Group<T, N>& b, uint32_t key) {
    Group<T, N> result;
    for (int i = 0; i < N; ++i) result.part[i] = WordOps<T>::xor_three(a.part[i], b.part[i], key);
    return result;
  }
};

#else

constexpr int kLanes = 1;
using Floats = float;
constexpr int kCounters = 1;
using PhiloxWord = uint32_t;
BICM_HD void set_counter(uint32_t& words, int, uint32_t word) { words = word; }
BICM_HD uint32_t get_counter(uint32_t words, int) { return words; }

#endif

BICM_NAMESPACE_END
