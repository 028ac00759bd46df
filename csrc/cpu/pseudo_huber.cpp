// Pseudo-Huber losses on one unit at a time: the residual into a buffer, then its sum or its gradients.
#include "../core/pseudo_huber.h"

#include "staging.h"

BICM_NAMESPACE_BEGIN
namespace {

// A sum is shared by this many accumulators on every instruction set: element i of a unit goes to accumulator
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

// What lies in a buffer, as a function of the place.
template <class C>
struct Stored {
  const C* data;
  BICM_HD C operator()(int64_t i) const { return data[i]; }
  template <class Lanes>
  BICM_HD Lanes lanes(int64_t i) const {
    return load_lanes<Lanes>(data + i);
  }
};

// The residual, never stored.
template <class C, bool Denoises>
struct Residual {
  const C *prediction, *target, *x;
  C c_skip, c_out;
  BICM_HD C operator()(int64_t i) const {
    return (Denoises ? c_skip * x[i] + c_out * prediction[i] : prediction[i]) - target[i];
  }
  template <class Lanes>
  BICM_HD Lanes lanes(int64_t i) const {
    const Lanes y = load_lanes<Lanes>(prediction + i);
    return (Denoises ? c_skip * load_lanes<Lanes>(x + i) + c_out * y : y) - load_lanes<Lanes>(target + i);
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

template <class C>
struct Buffers {
  alignas(64) C prediction[kChunk];
  alignas(64) C target[kChunk];
  alignas(64) C x[kChunk];
  alignas(64) C residual[kChunk];
  alignas(64) C out[kChunk];
};

// Calls visit with the unit's residual, its inputs loaded.
template <class C, class Visit>
BICM_HD void with_residual(const PseudoHuber& p, const Unit& unit, const Preconditioning<C>& weights,
                           Buffers<C>& buffers, Visit visit) {
  const C* prediction = load_unit(p.layout, p.prediction, unit, buffers.prediction);
  const C* target = load_unit(p.layout, p.target, unit, buffers.target);
  if (!p.denoises) return visit(Residual<C, false>{prediction, target, nullptr, C(0), C(1)});
  const C* x = load_unit(p.layout, p.x, unit, buffers.x);
  visit(Residual<C, true>{prediction, target, x, weights.c_skip, weights.c_out});
}

template <class C>
void form_residual(const PseudoHuber& p, const Unit& unit, const Preconditioning<C>& weights, Buffers<C>& buffers) {
  C* out = buffers.residual;
  with_residual(p, unit, weights, buffers, [&](const auto& residual) {
#pragma GCC ivdep
    for (int64_t i = 0; i < unit.count; ++i) out[i] = residual(i);
  });
}

#if defined(BICM_VECTOR)
BICM_HD void stream(Floats x, float* to) {
#if defined(BICM_ISA_AVX512)
  _mm512_stream_ps(to, (__m512)x);
#else
  _mm256_stream_ps(to, (__m256)x);
#endif
}

// The usual case of training, F's gradient alone and larger than the cache: from registers to memory.
inline bool stream_scaled(const PseudoHuber& p, const Unit& unit, const Preconditioning<float>& weights, float factor,
                          Buffers<float>& buffers) {
  const Operand& to = p.gradient[0];
  const bool alone = p.wanted[0] && !p.wanted[1] && !p.wanted[2] && p.distance == Distance::vector;
  if (!alone || !to.streams || !is_compute_type<float>(to) || unit.count % kLanes != 0) return false;
  float* out = static_cast<float*>(to.data) + unit.sample * to.batch_stride + unit.begin;
  if (reinterpret_cast<uintptr_t>(out) % sizeof(Floats) != 0) return false;
  with_residual(p, unit, weights, buffers, [&](const auto& residual) {
    for (int64_t i = 0; i < unit.count; i += kLanes) stream(factor * residual.template lanes<Floats>(i), out + i);
  });
  return true;
}
#endif
template <class C>
bool stream_scaled(const PseudoHuber&, const Unit&, const Preconditioning<C>&, C, Buffers<C>&) {
  return false;
}

template <class C>
double sum_unit(const PseudoHuber& p, const Unit& unit, const Preconditioning<C>& weights, C c, Buffers<C>& buffers) {
  double total = 0.0;
  if (p.distance == Distance::vector) {
    with_residual(p, unit, weights, buffers,
                  [&](const auto& residual) { total = sum_of<Square, C>(residual, unit.count); });
    return total;
  }
  form_residual(p, unit, weights, buffers);
  C* r = buffers.residual;
  for (int64_t i = 0; i < unit.count; ++i) r[i] = pseudo_huber_distance(r[i] * r[i], c);
  return sum_of<Identity, C>(Stored<C>{r}, unit.count);
}

template <class C>
void sums(const PseudoHuber& p, int64_t begin, int64_t end) {
  Buffers<C> buffers;
  const int64_t chunks = sum_chunks(p.layout), units = units_per_sample(p.layout);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / chunks, first = item % chunks * kUnitsPerSum;
    const int64_t last = units - first < kUnitsPerSum ? units : first + kUnitsPerSum;
    const Preconditioning<C> weights = denoising_weights<C>(p, sample);
    const C c = static_cast<C>(transition_of(p, sample));
    double total = 0.0;
    for (int64_t i = first; i < last; ++i) {
      const Unit unit = unit_at(p.layout, sample * units + i);
      total = total + sum_unit(p, unit, weights, c, buffers);
    }
    p.sums[item] = total;
  }
}

template <class C>
void store_scaled(const PseudoHuber& p, const Operand& to, const Unit& unit, C factor, Buffers<C>& buffers) {
  const bool in_place = is_compute_type<C>(to) && !to.streams;
  C* out = in_place ? static_cast<C*>(to.data) + unit.sample * to.batch_stride + unit.begin : buffers.out;
  const C* residual = buffers.residual;
#pragma GCC ivdep
  for (int64_t i = 0; i < unit.count; ++i) out[i] = factor * residual[i];
  if (!in_place) store_unit(p.layout, to, unit, out);
}

template <class C>
void gradients(const PseudoHuber& p, int64_t begin, int64_t end) {
  Buffers<C> buffers;
  int64_t sample = -1;
  Preconditioning<C> weights = {};
  C factor[kLossInputs] = {}, c = C(0);
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit = unit_at(p.layout, i);
    if (unit.sample != sample) {
      sample = unit.sample;
      weights = denoising_weights<C>(p, sample);
      c = static_cast<C>(transition_of(p, sample));
      const double shared = factor_of(p, sample, p.sums[sample]);
      factor[0] = static_cast<C>(shared * static_cast<double>(weights.c_out));
      factor[1] = static_cast<C>(-shared);
      factor[2] = static_cast<C>(shared * static_cast<double>(weights.c_skip));
    }
    if (stream_scaled(p, unit, weights, factor[0], buffers)) continue;
    form_residual(p, unit, weights, buffers);
    if (p.distance == Distance::elementwise) {
      C* r = buffers.residual;
      for (int64_t j = 0; j < unit.count; ++j) {
        r[j] = r[j] / nonzero(root(r[j] * r[j] + c * c));
      }
    }
    for (int k = 0; k < kLossInputs; ++k) {
      if (p.wanted[k]) store_scaled(p, p.gradient[k], unit, factor[k], buffers);
    }
  }
  finish_streams();
}

}  // namespace

void pseudo_huber(const PseudoHuber& p, int64_t begin, int64_t end) {
  (p.float64 ? sums<double> : sums<float>)(p, begin, end);
}

void pseudo_huber_gradient(const PseudoHuber& p, int64_t begin, int64_t end) {
  (p.float64 ? gradients<double> : gradients<float>)(p, begin, end);
}

BICM_NAMESPACE_END
