// Sums of many numbers in float64: the same bits on every instruction set.
#pragma once

#include "lanes.h"

BICM_NAMESPACE_BEGIN

// A sum is split over this many accumulators on every instruction set: element i of a unit is added to accumulator
// i % kAccumulators, and they are added in one fixed order, so the bits do not depend on the width of a vector.
constexpr int kAccumulators = 32;

#if defined(BICM_VECTOR)
constexpr int kDoubles = kLanes / 2;
#else
constexpr int kDoubles = 2;
#endif
typedef double Doubles __attribute__((vector_size(8 * kDoubles)));

// What is read of a buffer at a time: a whole register of float32, or doubles.
template <class C>
struct Part;
template <>
struct Part<float> {
#if defined(BICM_VECTOR)
  typedef Floats Lanes;
#else
  typedef float Lanes __attribute__((vector_size(4 * kDoubles)));
#endif
};
template <>
struct Part<double> {
  typedef Doubles Lanes;
};

struct Identity {
  BICM_HD static Doubles of(Doubles x) { return x; }
};
struct Square {
  BICM_HD static Doubles of(Doubles x) { return x * x; }
};

template <class Lanes, class C>
BICM_HD Lanes load_lanes(const C* from) {
  Lanes lanes;
  __builtin_memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

// A buffer's elements as a function of the index.
template <class C>
struct Stored {
  const C* data;
  BICM_HD C operator()(int64_t i) const { return data[i]; }
  template <class Lanes>
  BICM_HD Lanes lanes(int64_t i) const {
    return load_lanes<Lanes>(data + i);
  }
};

// Adds a term of every lane.
template <class Term>
BICM_HD void add_lanes(Doubles x, Doubles* total) {
  total[0] += Term::of(x);
}
template <class Term>
BICM_HD void add_lanes(Part<float>::Lanes x, Doubles* total) {
#if defined(BICM_ISA_AVX512)
  total[0] += Term::of((Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)));
  total[1] += Term::of((Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1)));
#elif defined(BICM_ISA_AVX2)
  total[0] += Term::of((Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)));
  total[1] += Term::of((Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1)));
#elif defined(BICM_ISA_NEON)
  total[0] += Term::of((Doubles)vcvt_f64_f32(vget_low_f32((float32x4_t)x)));
  total[1] += Term::of((Doubles)vcvt_high_f64_f32((float32x4_t)x));
#else
  total[0] += Term::of(__builtin_convertvector(x, Doubles));
#endif
}

template <class Term, class C, class Source>
BICM_HD void add_round(const Source& source, int64_t i, Doubles* total) {
  using Lanes = typename Part<C>::Lanes;
  constexpr int width = sizeof(Lanes) / sizeof(C);
  for (int k = 0; k < kAccumulators; k += width) {
    add_lanes<Term>(source.template lanes<Lanes>(i + k), total + k / kDoubles);
  }
}

// Sources are copies: numbers behind a reference would be read again after every store.
template <class Term, class C, class Source>
double sum_of(Source source, int64_t count) {
  Doubles total[kAccumulators / kDoubles] = {};
  int64_t i = 0;
  for (; i + kAccumulators <= count; i += kAccumulators) add_round<Term, C>(source, i, total);
  if (i < count) {
    C rest[kAccumulators] = {};
    for (int64_t j = i; j < count; ++j) rest[j - i] = source(j);
    add_round<Term, C>(Stored<C>{rest}, 0, total);
  }
  double single[kAccumulators];
  __builtin_memcpy(single, total, sizeof(single));
  for (int half = kAccumulators / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) single[j] = single[j] + single[j + half];
  }
  return single[0];
}

// A source's elements into a buffer.
template <class C, class Source>
void evaluate(Source source, int64_t count, C* out) {
  int64_t i = 0;
#if defined(BICM_VECTOR)
  using Lanes = typename Part<C>::Lanes;
  constexpr int width = sizeof(Lanes) / sizeof(C);
  for (; i + width <= count; i += width) {
    const Lanes x = source.template lanes<Lanes>(i);
    __builtin_memcpy(out + i, &x, sizeof(x));
  }
#endif
#pragma GCC ivdep
  for (; i < count; ++i) out[i] = source(i);
}

BICM_NAMESPACE_END
