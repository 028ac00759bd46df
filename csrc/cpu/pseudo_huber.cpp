// Pseudo-Huber losses on one unit at a time: the residual into a buffer, then its sum or its gradients.
#include "pseudo_huber_residual.h"

BICM_NAMESPACE_BEGIN
namespace {

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

// --- elementwise, by the plain formulas ---

enum class Wanted { distance, slope, both };

// Distances of a residual, or slopes; where both are wanted they share the root, and slopes are written beside.
template <Wanted wanted, class C, class R>
struct Elementwise {
  R residual;
  C c;
  C* slopes;

  template <class Lanes>
  BICM_HD Lanes of(Lanes r, int64_t i) const {
    const Lanes square = r * r, length = root(square + c * c);
    if constexpr (wanted != Wanted::distance) {
      const Lanes slope = r / nonzero(length);
      if constexpr (wanted == Wanted::slope) return slope;
      if constexpr (Same<Lanes, C>::value) {
        slopes[i] = slope;
      } else {
        __builtin_memcpy(slopes + i, &slope, sizeof(slope));
      }
    }
    return square / nonzero(length + c);
  }
  BICM_HD C operator()(int64_t i) const { return of(residual(i), i); }
  template <class Lanes>
  BICM_HD Lanes lanes(int64_t i) const {
    return of(residual.template lanes<Lanes>(i), i);
  }
};

template <Wanted wanted, class C, class R>
BICM_HD Elementwise<wanted, C, R> elementwise(const R& residual, C c, C* slopes) {
  return {residual, c, slopes};
}

// The unit's sum of distances, and its slopes in the residual's buffer, as wanted. In registers, because divisions take
// longer than all the rest: nothing may wait for them.
template <Wanted wanted, class C>
double elementwise_unit(const PseudoHuber& p, const Unit& unit, const Factors<C>& f, Buffers<C>& buffers) {
  C *const r = buffers.residual, *const distance = buffers.out;
  double total = 0.0;
  if constexpr (kLanes > 1 && Same<C, float>::value) {
    with_residual(p, unit, f.weights, buffers, [&](const auto& residual) {
      const auto values = elementwise<wanted>(residual, f.c, r);
      if constexpr (wanted == Wanted::slope) {
        evaluate(values, unit.count, r);
      } else {
        total = sum_of<Identity, C>(values, unit.count);
      }
    });
    return total;
  }
  form_residual(p, unit, f.weights, buffers);
  const auto values = elementwise<wanted>(Stored<C>{r}, f.c, r);
  C* const out = wanted == Wanted::slope ? r : distance;
#pragma GCC ivdep
  for (int64_t i = 0; i < unit.count; ++i) out[i] = values(i);
  return wanted == Wanted::slope ? 0.0 : sum_of<Identity, C>(Stored<C>{distance}, unit.count);
}

// --- of any size ---

// Elementwise distances times a power of two, in place.
template <class C>
void form_distances(C c, C scale, int64_t count, C* r) {
  for (int64_t i = 0; i < count; ++i) r[i] = distance_anywhere(r[i], c, scale);
}

// r / sqrt(r^2 + c^2), in place.
template <class C>
void form_slopes(C c, int64_t count, C* r) {
  if (c == C(0)) {
    for (int64_t i = 0; i < count; ++i) r[i] = slope_without_c(r[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) r[i] = slope_anywhere(r[i], c);
  }
}

// --- a unit ---

template <class C>
double sum_weighed_unit(const PseudoHuber& p, const Unit& unit, const Factors<C>& f, Buffers<C>& buffers) {
  form_residual(p, unit, f.weights, buffers);
  const C *r = buffers.residual, *weight = load_unit(p.layout, p.element_weight, unit, buffers.prediction);
  for (int64_t i = 0; i < unit.count; ++i) buffers.terms[i] = weighed_term(p, r[i], f.c, weight[i]);
  return sum_of<Identity, double>(Stored<double>{buffers.terms}, unit.count);
}

// Of residuals, or elementwise distances, times a power of two, which is 1 where the plain formula suffices.
template <class C>
double sum_unit(const PseudoHuber& p, const Unit& unit, const Factors<C>& f, C scale, Buffers<C>& buffers) {
  if (p.weighs) return sum_weighed_unit(p, unit, f, buffers);
  if (scale == C(1) && !sums_squares(p)) return elementwise_unit<Wanted::distance>(p, unit, f, buffers);
  double total = 0.0;
  if (scale == C(1)) {
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
  form_distances(f.c, scale, unit.count, r);
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
void form_derivative(const PseudoHuber& p, const Unit& unit, const Factors<C>& f, Buffers<C>& buffers) {
  if (p.distance == Distance::elementwise && f.plain && !p.weighs) {
    elementwise_unit<Wanted::slope>(p, unit, f, buffers);
    return;
  }
  form_residual(p, unit, f.weights, buffers);
  C* r = buffers.residual;
  if (p.weighs) {
    const C* weight = load_unit(p.layout, p.element_weight, unit, buffers.prediction);
    for (int64_t i = 0; i < unit.count; ++i) r[i] = weighed_slope(p, r[i], f.c, f.power, weight[i]);
  } else if (p.distance == Distance::elementwise) {
    form_slopes(f.c, unit.count, r);
  } else if (f.power != C(1)) {
    for (int64_t i = 0; i < unit.count; ++i) r[i] = r[i] * f.power;
  }
}

template <class C>
void differentiate_unit(const PseudoHuber& p, const Unit& unit, const Factors<C>& f, Buffers<C>& buffers) {
  const bool plain = sums_squares(p) ? f.power == C(1) : f.plain;
  const int64_t done = plain ? scale_slopes(p, unit, f.weights, f.c, f.factor[0], buffers.memory) : 0;
  if (done == unit.count) return;
  const Unit rest = {unit.sample, unit.begin + done, unit.count - done};
  form_derivative(p, rest, f, buffers);
  store_gradients(p, rest, f, buffers);
}

// A sum and gradients that do not depend on it.
template <class C>
double sum_and_differentiate_unit(const PseudoHuber& p, const Unit& unit, const Factors<C>& f, C scale,
                                  Buffers<C>& buffers) {
  double total;
  if (sums_squares(p)) {
    const bool done = f.power == C(1) && sum_and_scale_squares(p, unit, f.weights, f.factor[0], buffers.memory, total);
    if (done) return total;
    total = sum_unit(p, unit, f, scale, buffers);
    differentiate_unit(p, unit, f, buffers);
    return total;
  }
  if (f.plain) {
    total = elementwise_unit<Wanted::both>(p, unit, f, buffers);
  } else {
    total = sum_unit(p, unit, f, scale, buffers);
    form_derivative(p, unit, f, buffers);
  }
  store_gradients(p, unit, f, buffers);
  return total;
}

// Units [first, last) of a sample, with their gradients if at_once.
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
  Buffers<C> buffers(memory_for(p));
  const int64_t chunks = sum_chunks(p.layout), units = units_per_sample(p.layout);
  const bool at_once = Differentiates && !gradient_needs_sum(p) && !p.weighs;
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
  Buffers<C> buffers(memory_for(p));
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
    store_scaled(p.layout, p.gradient, unit, factor, load_unit(p.layout, p.gradient, unit, buffer), buffer);
  }
  finish_streams();
}

#if defined(BICM_VECTOR)
void scale_in_registers(const KeptGradient& p, int64_t begin, int64_t end, Memory memory) {
  with_memory(memory, [&](auto kind) {
    for (int64_t i = begin; i < end;) {
      const Unit run = run_at(p.layout, i, end);
      const float factor = load_number<float>(p.upstream, run.sample);
      const auto to = target_of<decltype(kind)>(p.gradient, run);
      if (factor != 1.0f) scale_elements(factor, to.memory, to, run.count);
      i += units_of(run);
    }
  });
}
#else
void scale_in_registers(const KeptGradient&, int64_t, int64_t, Memory) {}
#endif

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
  const Memory memory = memory_for(p.gradient);
  if (memory != Memory::none) return scale_in_registers(p, begin, end, memory);
  (p.gradient.dtype == DType::float64 ? scale<double> : scale<float>)(p, begin, end);
}

BICM_NAMESPACE_END
