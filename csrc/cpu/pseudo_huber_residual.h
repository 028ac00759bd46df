// The residual of a loss, from inputs in memory of any kind.
#pragma once

#include "../core/pseudo_huber.h"
#include "blocks.h"
#include "sums.h"

BICM_NAMESPACE_BEGIN

// Those of core/ for vectors.
#if defined(BICM_VECTOR)
BICM_HD Floats root(Floats x) { return LaneOps<Floats>::square_root(x); }
BICM_HD Floats nonzero(Floats x) { return x == 0.0f ? Floats{} + 3.0f : x; }
#endif

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
#if defined(BICM_VECTOR)
  BICM_HD Block load(int64_t i) const {
    const Block y = prediction.load(i), minus = target.load(i);
    if (!Denoises) return each_part([&](int j) { return y.part[j] - minus.part[j]; });
    const Block from = x.load(i);
    return each_part([&](int j) { return (c_skip * from.part[j] + c_out * y.part[j]) - minus.part[j]; });
  }
#endif
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

// The usual case of training, only F's gradient, by the plain formulas: from memory to memory. Returns how many elements
// it did.
int64_t scale_slopes(const PseudoHuber& p, const Unit& unit, const Preconditioning<float>& weights, float c,
                     float factor, Memory memory) {
  const bool alone = p.wanted[0] && !p.wanted[1] && !p.wanted[2];
  if (memory == Memory::none || !alone || p.weighs) return 0;
  int64_t i = 0;
  residual_in_registers(p, unit, weights, memory, [&](const auto& residual) {
    const auto to = target_of(residual.prediction, p.gradient[0], unit);
    const auto scale = [&](auto slope) {
      for (; i + kBlock <= unit.count; i += kBlock) {
        const Block r = residual.load(i);
        to.store(each_part([&](int j) { return factor * slope(r.part[j]); }), i);
      }
    };
    if (sums_squares(p)) {
      scale([](Floats r) { return r; });
    } else {
      scale([&](Floats r) { return r / nonzero(root(r * r + c * c)); });
    }
  });
  return i;
}

// A residual whose multiples, the gradient of its square, are written beside.
template <class R, bool kStreams>
struct WithMultiples {
  R residual;
  float factor;
  float* multiples;

  BICM_HD float operator()(int64_t i) const {
    const float r = residual(i);
    multiples[i] = factor * r;
    return r;
  }
  template <class Lanes>
  BICM_HD Lanes lanes(int64_t i) const {
    const Lanes r = residual.template lanes<Lanes>(i);
    store_vector<kStreams>((Bytes)(factor * r), multiples + i);
    return r;
  }
};

template <bool kStreams, class R>
BICM_HD double sum_with_multiples(const R& residual, float factor, float* multiples, int64_t count) {
  return sum_of<Square, float>(WithMultiples<R, kStreams>{residual, factor, multiples}, count);
}

// The same case of squares, whose slopes need no sum: both from the same registers. Returns whether it did it.
bool sum_and_scale_squares(const PseudoHuber& p, const Unit& unit, const Preconditioning<float>& weights, float factor,
                           Memory memory, double& total) {
  const bool alone = p.wanted[0] && !p.wanted[1] && !p.wanted[2];
  if (memory == Memory::none || !alone || p.gradient[0].dtype != DType::float32) return false;
  residual_in_registers(p, unit, weights, memory, [&](const auto& residual) {
    const auto to = target_of<Dense<float>>(p.gradient[0], unit);
#if defined(BICM_STREAMS)
    if (to.streams) {
      total = sum_with_multiples<true>(residual, factor, to.memory.data, unit.count);
      return;
    }
#endif
    total = sum_with_multiples<false>(residual, factor, to.memory.data, unit.count);
  });
  return true;
}

#endif

template <class C>
int64_t scale_slopes(const PseudoHuber&, const Unit&, const Preconditioning<C>&, C, C, Memory) {
  return 0;
}
template <class C>
bool sum_and_scale_squares(const PseudoHuber&, const Unit&, const Preconditioning<C>&, C, Memory, double&) {
  return false;
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

}  // namespace
BICM_NAMESPACE_END
