// Pseudo-Huber losses on one unit at a time: the residual into a buffer, then its sum or its gradients.
#include "../core/pseudo_huber.h"

#include "staging.h"
#include "sums.h"

BICM_NAMESPACE_BEGIN
namespace {

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

template <class C>
struct Buffers {
  alignas(64) C prediction[kChunk];
  alignas(64) C target[kChunk];
  alignas(64) C x[kChunk];
  alignas(64) C residual[kChunk];
  alignas(64) C out[kChunk];
  alignas(64) double terms[kChunk];  // where elements have weights
};

// Calls visit with the unit's residual, after loading its inputs.
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

// The usual case of training, only F's gradient and larger than the cache: from registers to memory.
inline bool stream_scaled(const PseudoHuber& p, const Unit& unit, const Preconditioning<float>& weights, float factor,
                          Buffers<float>& buffers) {
  const Operand& to = p.gradient[0];
  const bool alone = p.wanted[0] && !p.wanted[1] && !p.wanted[2] && sums_squares(p) && !p.weighs;
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

// Values shared by the elements of a sample.
template <class C>
struct Factors {
  Preconditioning<C> weights;
  C c, power, factor[kLossInputs];
  bool plain;  // elementwise: the plain formulas suffice
};

template <class C>
Factors<C> numbers_of(const PseudoHuber& p, int64_t sample) {
  return {denoising_weights<C>(p, sample), static_cast<C>(transition_of(p, sample)), C(1), {}, true};
}

template <class C>
void find_factors(const PseudoHuber& p, int64_t sample, double sum, Factors<C>& f) {
  const Slope slope = slope_of(p, sample, sum, f.weights);
  f.power = static_cast<C>(slope.power);
  f.factor[0] = static_cast<C>(slope.factor * static_cast<double>(f.weights.c_out));
  f.factor[1] = static_cast<C>(-slope.factor);
  f.factor[2] = static_cast<C>(slope.factor * static_cast<double>(f.weights.c_skip));
  f.plain = plain_slopes(sum, f.c);
}

// Elementwise distances times a power of two, which is 1 where the plain formula suffices.
template <class C>
void form_distances(const C* r, C c, C scale, int64_t count, C* distance) {
  if (scale == C(1)) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) distance[i] = pseudo_huber_distance(r[i] * r[i], c);
  } else {
    for (int64_t i = 0; i < count; ++i) distance[i] = distance_anywhere(r[i], c, scale);
  }
}

// r / sqrt(r^2 + c^2), in place.
template <class C>
void form_slopes(const Factors<C>& f, int64_t count, C* r) {
  if (f.plain) {
    for (int64_t i = 0; i < count; ++i) r[i] = r[i] / nonzero(root(r[i] * r[i] + f.c * f.c));
  } else if (f.c == C(0)) {
    for (int64_t i = 0; i < count; ++i) r[i] = slope_without_c(r[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) r[i] = slope_anywhere(r[i], f.c);
  }
}

template <class C>
double sum_weighed_unit(const PseudoHuber& p, const Unit& unit, const Factors<C>& f, Buffers<C>& buffers) {
  form_residual(p, unit, f.weights, buffers);
  const C *r = buffers.residual, *weight = load_unit(p.layout, p.element_weight, unit, buffers.prediction);
  for (int64_t i = 0; i < unit.count; ++i) buffers.terms[i] = weighed_term(p, r[i], f.c, weight[i]);
  return sum_of<Identity, double>(Stored<double>{buffers.terms}, unit.count);
}

// Of residuals, or elementwise distances, times a power of two.
template <class C>
double sum_unit(const PseudoHuber& p, const Unit& unit, const Factors<C>& f, C scale, Buffers<C>& buffers) {
  if (p.weighs) return sum_weighed_unit(p, unit, f, buffers);
  double total = 0.0;
  if (sums_squares(p) && scale == C(1)) {
    with_residual(p, unit, f.weights, buffers,
                  [&](const auto& residual) { total = sum_of<Square, C>(residual, unit.count); });
    return total;
  }
  form_residual(p, unit, f.weights, buffers);
  C* r = buffers.residual;
  if (sums_squares(p)) {
    for (int64_t i = 0; i < unit.count; ++i) r[i] = r[i] * scale;
    return sum_of<Square, C>(Stored<C>{r}, unit.count);
  }
  form_distances(r, f.c, scale, unit.count, r);
  return sum_of<Identity, C>(Stored<C>{r}, unit.count);
}

// From the buffer, which holds the residual or its elementwise slope.
template <class C>
void store_gradients(const PseudoHuber& p, const Unit& unit, const Factors<C>& f, Buffers<C>& buffers) {
  for (int k = 0; k < kLossInputs; ++k) {
    if (p.wanted[k]) store_scaled(p.layout, p.gradient[k], unit, f.factor[k], buffers.residual, buffers.out);
  }
}

template <class C>
void differentiate_unit(const PseudoHuber& p, const Unit& unit, const Factors<C>& f, Buffers<C>& buffers) {
  if (f.power == C(1) && stream_scaled(p, unit, f.weights, f.factor[0], buffers)) return;
  form_residual(p, unit, f.weights, buffers);
  C* r = buffers.residual;
  if (p.weighs) {
    const C* weight = load_unit(p.layout, p.element_weight, unit, buffers.prediction);
    for (int64_t i = 0; i < unit.count; ++i) r[i] = weighed_slope(p, r[i], f.c, f.power, weight[i]);
  } else if (p.distance == Distance::elementwise) {
    form_slopes(f, unit.count, r);
  } else if (f.power != C(1)) {
    for (int64_t i = 0; i < unit.count; ++i) r[i] = r[i] * f.power;
  }
  store_gradients(p, unit, f, buffers);
}

// An elementwise distance's sum and gradients, which are independent.
template <class C>
double sum_and_differentiate_unit(const PseudoHuber& p, const Unit& unit, const Factors<C>& f, C scale,
                                  Buffers<C>& buffers) {
  form_residual(p, unit, f.weights, buffers);
  C *r = buffers.residual, *distance = buffers.prediction;  // the inputs are no longer needed
  if (f.plain) {
    for (int64_t i = 0; i < unit.count; ++i) {
      const C square = r[i] * r[i];
      distance[i] = pseudo_huber_distance(square, f.c);
      r[i] = r[i] / nonzero(root(square + f.c * f.c));
    }
  } else {
    form_distances(r, f.c, scale, unit.count, distance);
    form_slopes(f, unit.count, r);
  }
  store_gradients(p, unit, f, buffers);
  return sum_of<Identity, C>(Stored<C>{distance}, unit.count);
}

// Units [first, last) of a sample; elementwise, with their gradients if AtOnce.
template <class C>
double sum_units(const PseudoHuber& p, int64_t first, int64_t last, const Factors<C>& f, C scale, bool at_once,
                 Buffers<C>& buffers) {
  double total = 0.0;
  for (int64_t i = first; i < last; ++i) {
    const Unit unit = unit_at(p.layout, i);
    total = total +
            (at_once ? sum_and_differentiate_unit(p, unit, f, scale, buffers) : sum_unit(p, unit, f, scale, buffers));
  }
  return total;
}

template <class C, bool Differentiates>
void sums(const PseudoHuber& p, int64_t begin, int64_t end) {
  Buffers<C> buffers;
  const int64_t chunks = sum_chunks(p.layout), units = units_per_sample(p.layout);
  const bool at_once = Differentiates && p.distance == Distance::elementwise && !p.weighs;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / chunks, place = item % chunks * kUnitsPerSum, first = sample * units + place;
    const int64_t last = first + (units - place < kUnitsPerSum ? units - place : kUnitsPerSum);
    Factors<C> f = numbers_of<C>(p, sample);
    if (at_once) find_factors(p, sample, 0.0, f);  // which do not depend on the sum
    double total = sum_units(p, first, last, f, C(1), at_once, buffers);
    // Squares of float32 are float64.
    const bool holds = (sums_squares(p) && sizeof(C) < sizeof(double)) || p.weighs;
    if (p.weighs) total = weighed_sum(total);
    if (!holds && !trusted(p, total, f.c)) {
      const C scale = scale_of(p, total, f.c);
      f.plain = false;
      total = keep_sum(p, sum_units(p, first, last, f, scale, at_once, buffers), scale);
    }
    p.sums[item] = total;
    if (!Differentiates || at_once) continue;
    find_factors(p, sample, total, f);
    for (int64_t i = first; i < last; ++i) differentiate_unit(p, unit_at(p.layout, i), f, buffers);
  }
  if (Differentiates) finish_streams();
}

template <class C>
void gradients(const PseudoHuber& p, int64_t begin, int64_t end) {
  Buffers<C> buffers;
  int64_t sample = -1;
  Factors<C> f = {};
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit = unit_at(p.layout, i);
    if (unit.sample != sample) {
      sample = unit.sample;
      f = numbers_of<C>(p, sample);
      find_factors(p, sample, p.sums[sample], f);
    }
    differentiate_unit(p, unit, f, buffers);
  }
  finish_streams();
}

template <class C>
void scale(const KeptGradient& p, int64_t begin, int64_t end) {
  alignas(64) C buffer[kChunk];
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit = unit_at(p.layout, i);
    const C factor = load_number<C>(p.upstream, unit.sample);
    if (factor == C(1)) continue;
    const C* x = load_unit(p.layout, p.gradient, unit, buffer);
#pragma GCC ivdep
    for (int64_t j = 0; j < unit.count; ++j) buffer[j] = factor * x[j];
    store_unit(p.layout, p.gradient, unit, buffer);
  }
  finish_streams();
}

}  // namespace

void pseudo_huber(const PseudoHuber& p, int64_t begin, int64_t end) {
  (p.float64 ? sums<double, false> : sums<float, false>)(p, begin, end);
}

void pseudo_huber_gradient(const PseudoHuber& p, int64_t begin, int64_t end) {
  (p.float64 ? gradients<double> : gradients<float>)(p, begin, end);
}

void pseudo_huber_with_gradient(const PseudoHuber& p, int64_t begin, int64_t end) {
  (p.float64 ? sums<double, true> : sums<float, true>)(p, begin, end);
}

void scale_gradient(const KeptGradient& p, int64_t begin, int64_t end) {
  (p.gradient.dtype == DType::float64 ? scale<double> : scale<float>)(p, begin, end);
}

BICM_NAMESPACE_END
