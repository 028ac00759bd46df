// Pseudo-Huber losses on one unit at a time: the residual into a buffer, then its sum or its gradients.
#include "../core/pseudo_huber.h"

#include "blocks.h"
#include "sums.h"

BICM_NAMESPACE_BEGIN
namespace {

// The residual, never stored, of inputs in memory of one kind.
template <class M, class C, bool Denoises>
struct Residual {
  M prediction, target, x;
  C c_skip, c_out;
  BICM_HD C operator()(int64_t i) const {
    return (Denoises ? c_skip * x(i) + c_out * prediction(i) : prediction(i)) - target(i);
  }
  template <class Lanes>
  BICM_HD Lanes lanes(int64_t i) const {
    const Lanes y = prediction.template lanes<Lanes>(i);
    return (Denoises ? c_skip * x.template lanes<Lanes>(i) + c_out * y : y) - target.template lanes<Lanes>(i);
  }
};

template <class C>
struct Buffers {
  explicit Buffers(Memory inputs) : memory(inputs) {}
  const Memory memory;  // of the inputs
  alignas(64) C prediction[kChunk];
  alignas(64) C target[kChunk];
  alignas(64) C x[kChunk];
  alignas(64) C residual[kChunk];
  alignas(64) C out[kChunk];
  alignas(64) double terms[kChunk];  // where elements have weights
};

Memory memory_for(const PseudoHuber& p) {
  CommonMemory common;
  common.add(p.prediction);
  common.add(p.target);
  if (p.denoises) common.add(p.x);
  for (int k = 0; k < kLossInputs; ++k) {
    if (p.wanted[k]) common.add(p.gradient[k]);
  }
  return p.float64 ? Memory::none : common.memory();
}

template <class M, class C, class Visit>
BICM_HD void visit_residual(M prediction, M target, M x, bool denoises, const Preconditioning<C>& w, Visit visit) {
  if (!denoises) return visit(Residual<M, C, false>{prediction, target, x, C(0), C(1)});
  visit(Residual<M, C, true>{prediction, target, x, w.c_skip, w.c_out});
}

#if defined(BICM_VECTOR)

template <class Visit>
BICM_HD void residual_in_registers(const PseudoHuber& p, const Unit& unit, const Preconditioning<float>& weights,
                                   Memory memory, Visit visit) {
  with_memory(memory, [&](auto kind) {
    using M = decltype(kind);
    const M prediction = memory_of<M>(p.prediction, unit), target = memory_of<M>(p.target, unit);
    const M x = p.denoises ? memory_of<M>(p.x, unit) : prediction;
    visit_residual(prediction, target, x, p.denoises, weights, visit);
  });
}

// The usual case of training, only F's gradient: from memory to memory. Returns how many elements it did.
int64_t scale_residual(const PseudoHuber& p, const Unit& unit, const Preconditioning<float>& weights, float factor,
                       Memory memory) {
  const bool alone = p.wanted[0] && !p.wanted[1] && !p.wanted[2];
  if (memory == Memory::none || !alone || p.weighs || !sums_squares(p)) return 0;
  int64_t i = 0;
  residual_in_registers(p, unit, weights, memory, [&](const auto& residual) {
    const auto to = target_of(residual.prediction, p.gradient[0], unit);
    for (; i + kBlock <= unit.count; i += kBlock) {
      to.store(each_part([&](int j) { return factor * residual.template lanes<Floats>(i + j * kLanes); }), i);
    }
  });
  return i;
}

#endif

template <class C>
int64_t scale_residual(const PseudoHuber&, const Unit&, const Preconditioning<C>&, C, Memory) {
  return 0;
}

// Calls visit with the unit's residual, after loading what is not read in registers.
template <class C, class Visit>
BICM_HD void with_residual(const PseudoHuber& p, const Unit& unit, const Preconditioning<C>& weights,
                           Buffers<C>& buffers, Visit visit) {
#if defined(BICM_VECTOR)
  if constexpr (Same<C, float>::value) {
    if (buffers.memory != Memory::none) return residual_in_registers(p, unit, weights, buffers.memory, visit);
  }
#endif
  const Stored<C> prediction{load_unit(p.layout, p.prediction, unit, buffers.prediction)};
  const Stored<C> target{load_unit(p.layout, p.target, unit, buffers.target)};
  const Stored<C> x = p.denoises ? Stored<C>{load_unit(p.layout, p.x, unit, buffers.x)} : prediction;
  visit_residual(prediction, target, x, p.denoises, weights, visit);
}

template <class C>
void form_residual(const PseudoHuber& p, const Unit& unit, const Preconditioning<C>& weights, Buffers<C>& buffers) {
  with_residual(p, unit, weights, buffers,
                [&](const auto& residual) { evaluate(residual, unit.count, buffers.residual); });
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
void differentiate_part(const PseudoHuber& p, const Unit& unit, const Factors<C>& f, Buffers<C>& buffers) {
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

template <class C>
void differentiate_unit(const PseudoHuber& p, const Unit& unit, const Factors<C>& f, Buffers<C>& buffers) {
  const int64_t done = f.power == C(1) ? scale_residual(p, unit, f.weights, f.factor[0], buffers.memory) : 0;
  if (done < unit.count) differentiate_part(p, {unit.sample, unit.begin + done, unit.count - done}, f, buffers);
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
  Buffers<C> buffers(memory_for(p));
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
