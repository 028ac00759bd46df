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

template <class C>
struct Part;
template <>
struct Part<float> {
  typedef float Lanes __attribute__((vector_size(4 * kDoubles)));
};
template <>
struct Part<double> {
  typedef Doubles Lanes;
};

BICM_HD Doubles to_doubles(Doubles x) { return x; }
BICM_HD Doubles to_doubles(Part<float>::Lanes x) {
#if defined(BICM_ISA_AVX512)
  return (Doubles)_mm512_cvtps_pd((__m256)x);
#elif defined(BICM_VECTOR)
  return (Doubles)_mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, Doubles);
#endif
}

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

template <class Term, class C, class Source>
BICM_HD void add_round(const Source& source, int64_t i, Doubles* total) {
  for (int k = 0; k < kAccumulators / kDoubles; ++k) {
    total[k] += Term::of(to_doubles(source.template lanes<typename Part<C>::Lanes>(i + k * kDoubles)));
  }
}

template <class Term, class C, class Source>
double sum_of(const Source& source, int64_t count) {
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

BICM_NAMESPACE_END
