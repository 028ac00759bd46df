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

struct Identity {
  BICM_HD static Doubles of(Doubles x) { return x; }
};
struct Square {
  BICM_HD static Doubles of(Doubles x) { return x * x; }
};

// The sum of Term over a buffer with room for whole rounds of accumulators.
template <class Term, class C>
double sum_of(C* x, int64_t count) {
  constexpr int parts = kAccumulators / kDoubles;
  const int64_t end = (count + kAccumulators - 1) / kAccumulators * kAccumulators;
  for (int64_t i = count; i < end; ++i) x[i] = C(0);
  Doubles total[parts] = {};
  for (int64_t i = 0; i < end; i += kAccumulators) {
    for (int k = 0; k < parts; ++k) {
      typename Part<C>::Lanes lanes;
      __builtin_memcpy(&lanes, x + i + k * kDoubles, sizeof(lanes));
      total[k] += Term::of(__builtin_convertvector(lanes, Doubles));
    }
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

template <class C>
void form_residual(const PseudoHuber& p, const Unit& unit, const Preconditioning<C>& weights, Buffers<C>& buffers) {
  const C* prediction = load_unit(p.layout, p.prediction, unit, buffers.prediction);
  const C* target = load_unit(p.layout, p.target, unit, buffers.target);
  C* residual = buffers.residual;
  if (!p.denoises) {
    for (int64_t i = 0; i < unit.count; ++i) residual[i] = prediction[i] - target[i];
    return;
  }
  const C* x = load_unit(p.layout, p.x, unit, buffers.x);
  const C c_skip = weights.c_skip, c_out = weights.c_out;
#pragma GCC ivdep
  for (int64_t i = 0; i < unit.count; ++i) residual[i] = (c_skip * x[i] + c_out * prediction[i]) - target[i];
}

template <class C>
double sum_unit(const PseudoHuber& p, C c, int64_t count, Buffers<C>& buffers) {
  C* residual = buffers.residual;
  if (p.distance == Distance::vector) return sum_of<Square>(residual, count);
  for (int64_t i = 0; i < count; ++i) residual[i] = pseudo_huber_distance(residual[i] * residual[i], c);
  return sum_of<Identity>(residual, count);
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
      form_residual(p, unit, weights, buffers);
      total = total + sum_unit(p, c, unit.count, buffers);
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
    form_residual(p, unit, weights, buffers);
    if (p.distance == Distance::elementwise) {
      C* r = buffers.residual;
      for (int64_t j = 0; j < unit.count; ++j) {
        const C length = root(r[j] * r[j] + c * c);
        r[j] = length == C(0) ? C(0) : r[j] / length;
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
