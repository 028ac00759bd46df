// Gaussian policies on one unit at a time: the residual into a buffer, then its square's sum, its gradients, or both.
#include "../core/gaussian.h"

#include "affine.h"
#include "blocks.h"
#include "sums.h"

BICM_NAMESPACE_BEGIN
namespace {

template <class C>
struct Buffers : Inputs<C> {
  alignas(64) C mean[kChunk + kPad];
  alignas(64) C other[kChunk + kPad];
  alignas(64) C residual[kChunk + kPad];
  int64_t weighed = -1;  // the sample that these numbers belong to
  C weight[kMaxTerms];
  Pull<C> pull;
};

template <class C>
void know_sample(const Gaussian& g, int64_t sample, Buffers<C>& buffers) {
  if (buffers.weighed == sample) return;
  buffers.weighed = sample;
  form_weights(g, sample, buffers.weight);
  if (g.differentiates) buffers.pull = pull_of(g, sample, buffers.weight);
}

// Rounded to a tensor's dtype.
template <class T, class C>
void round_as(C* x, int64_t count) {
  if constexpr (!Same<T, C>::value) {
    for (int64_t i = 0; i < count; ++i) x[i] = static_cast<C>(widen(Narrow<T>::from(x[i])));
  }
}
template <class C>
void round_to_dtype(DType dtype, C* x, int64_t count) {
  switch (dtype) {
    case DType::float16: return round_as<Half>(x, count);
    case DType::bfloat16: return round_as<BFloat16>(x, count);
    case DType::float32: return round_as<float>(x, count);
    default: return;
  }
}

template <class C>
void subtract(const C* a, const C* b, C* out, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = a[i] - b[i];
}

// The minuend of the residual, in the compute type: the next state, formed here or given, or the reference's mean.
template <class C>
const C* minuend(const Gaussian& g, const Unit& unit, C noise_weight, Buffers<C>& buffers) {
  if (g.diverges) {
    const C* x[kMaxTerms];
    for (int k = 0; k < g.terms; ++k) x[k] = load_unit(g.layout, g.reference[k], unit, buffers.input[k]);
    fold_terms<C, false>(g.terms, x, buffers.weight, nullptr, C(0), buffers.other, unit.count);
    return buffers.other;
  }
  if (!g.steps) return load_unit(g.layout, g.next, unit, buffers.other);
  const C* mean = buffers.mean;
  for (int64_t i = 0; i < unit.count; ++i) {
    buffers.other[i] = noise_weight == C(0) ? mean[i] : mean[i] + noise_weight * static_cast<C>(buffers.noise[i]);
  }
  round_to_dtype(g.out.dtype, buffers.other, unit.count);
  store_unit(g.layout, g.out, unit, buffers.other);
  return buffers.other;
}

template <class C>
void form_residual(const Gaussian& g, const Unit& unit, Buffers<C>& buffers, C* residual) {
  const C* x[kMaxTerms];
  const C noise_weight = draw<C>(g, unit, buffers.noise);
  load_inputs(g, unit, buffers, x);
  fold_terms<C, false>(g.terms, x, buffers.weight, nullptr, C(0), buffers.mean, unit.count);
  subtract(minuend(g, unit, noise_weight, buffers), buffers.mean, residual, unit.count);
}

Memory memory_for(const Gaussian& g) {
  CommonMemory common;
  for (int k = 0; k < g.terms; ++k) {
    common.add(g.input[k]);
    if (g.diverges) common.add(g.reference[k]);
  }
  if (g.guided) common.add(g.conditional);
  if (!g.diverges) common.add(g.steps ? g.out : g.next);
  return g.float64 ? Memory::none : common.memory();
}

#if defined(BICM_VECTOR)

// The mean of dense operands; the last may have a partner.
template <class M, int K>
struct Mean {
  M input[K], conditional;
  bool guided;
  float weight[K], guidance;

  BICM_HD Block block(int64_t i) const {
    Block y = {};
    BICM_UNROLL(5)
    for (int k = 0; k < K; ++k) {
      Block x = input[k].load(i);
      if (guided && k == K - 1) {
        const Block other = conditional.load(i);
        x = each_part([&](int j) { return guide(x.part[j], other.part[j], Floats{} + guidance); });
      }
      const Block last = y;
      y = each_part([&](int j) { return k ? last.part[j] + weight[k] * x.part[j] : weight[k] * x.part[j]; });
    }
    return y;
  }
};

// Where the minuend of the residual comes from.
enum class Minuend { drawn, given, reference };

// The same operations for whole blocks, in registers. Returns how many elements it did.
template <class M, int K, Minuend minuend>
int64_t residual_of_blocks(const Gaussian& g, const Unit& unit, Buffers<float>& buffers) {
  Mean<M, K> ours = {}, theirs = {};
  for (int k = 0; k < K; ++k) {
    ours.input[k] = memory_of<M>(g.input[k], unit);
    ours.weight[k] = theirs.weight[k] = buffers.weight[k];
    if (minuend == Minuend::reference) theirs.input[k] = memory_of<M>(g.reference[k], unit);
  }
  ours.guided = g.guided;
  if (g.guided) {
    ours.conditional = memory_of<M>(g.conditional, unit);
    ours.guidance = load_number<float>(g.guidance_scale, unit.sample);
  }
  Target<M> next = {};
  if (minuend == Minuend::drawn) next = target_of<M>(g.out, unit);
  if (minuend == Minuend::given) next.memory = memory_of<M>(g.next, unit);
  const float noise_weight = draw<float>(g, unit, buffers.noise);
  const Dense<float> noise{buffers.noise}, residual{buffers.residual};

  int64_t i = 0;
  for (; i + kBlock <= unit.count; i += kBlock) {
    const Block mean = ours.block(i);
    Block other = mean;
    if constexpr (minuend == Minuend::drawn) {
      if (noise_weight != 0.0f) {
        const Block n = noise.load(i);
        other = each_part([&](int j) { return mean.part[j] + noise_weight * n.part[j]; });
      }
      other = next.store(other, i);
    } else {
      other = minuend == Minuend::given ? next.memory.load(i) : theirs.block(i);
    }
    residual.store<false>(each_part([&](int j) { return other.part[j] - mean.part[j]; }), i);
  }
  return i;
}

template <class M, Minuend minuend>
int64_t residual_of_terms(const Gaussian& g, const Unit& unit, Buffers<float>& buffers) {
  switch (g.terms) {
    case 1: return residual_of_blocks<M, 1, minuend>(g, unit, buffers);
    case 2: return residual_of_blocks<M, 2, minuend>(g, unit, buffers);
    case 3: return residual_of_blocks<M, 3, minuend>(g, unit, buffers);
    case 4: return residual_of_blocks<M, 4, minuend>(g, unit, buffers);
    default: return residual_of_blocks<M, 5, minuend>(g, unit, buffers);
  }
}

int64_t residual_in_registers(const Gaussian& g, const Unit& unit, Memory memory, Buffers<float>& buffers) {
  int64_t done = 0;
  with_memory(memory, [&](auto kind) {
    using M = decltype(kind);
    const auto residual = g.steps      ? residual_of_terms<M, Minuend::drawn>
                          : g.diverges ? residual_of_terms<M, Minuend::reference>
                                       : residual_of_terms<M, Minuend::given>;
    done = residual(g, unit, buffers);
  });
  return done;
}

#endif

template <class C>
int64_t residual_in_registers(const Gaussian&, const Unit&, Memory, Buffers<C>&) {
  return 0;
}

// The unit's residual, in its buffer.
template <class C>
void residual_unit(const Gaussian& g, const Unit& unit, Memory memory, Buffers<C>& buffers) {
  know_sample(g, unit.sample, buffers);
  const int64_t done = memory == Memory::none ? 0 : residual_in_registers(g, unit, memory, buffers);
  if (done < unit.count) {
    form_residual(g, part_of(g.layout, unit, done, unit.count - done), buffers, buffers.residual + done);
  }
}

// From the unit's residual.
template <class C>
void store_gradients(const Gaussian& g, const Unit& unit, Buffers<C>& buffers) {
  const Pull<C>& pull = buffers.pull;
  C* r = buffers.residual;
  if (pull.power != C(1)) {
    for (int64_t i = 0; i < unit.count; ++i) r[i] = r[i] * pull.power;
  }
  for (int k = 0; k < kGaussianInputs; ++k) {
    if (!g.wanted[k]) continue;
    store_scaled(g.layout, g.gradient[k], unit, pull.factor[k], r, buffers.other);
  }
}

template <class C, bool Differentiates>
void sums(const Gaussian& g, int64_t begin, int64_t end) {
  Buffers<C> buffers;
  const Memory memory = memory_for(g);
  const int64_t chunks = sum_chunks(g.layout), units = units_per_sample(g.layout);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t place = item % chunks * kUnitsPerSum, first = item / chunks * units + place;
    const int64_t last = first + (units - place < kUnitsPerSum ? units - place : kUnitsPerSum);
    double total = 0.0;
    for (int64_t i = first; i < last; ++i) {
      const Unit unit = unit_at(g.layout, i);
      residual_unit(g, unit, memory, buffers);
      total = total + sum_of<Square, C>(Stored<C>{buffers.residual}, unit.count);
      if (Differentiates) store_gradients(g, unit, buffers);
    }
    g.totals[item] = total;
  }
  if (Differentiates || g.steps) finish_streams();
}

template <class C>
void gradients(const Gaussian& g, int64_t begin, int64_t end) {
  Buffers<C> buffers;
  const Memory memory = memory_for(g);
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit = unit_at(g.layout, i);
    residual_unit(g, unit, memory, buffers);
    store_gradients(g, unit, buffers);
  }
  finish_streams();
}

}  // namespace

void gaussian(const Gaussian& g, int64_t begin, int64_t end) {
  (g.float64 ? sums<double, false> : sums<float, false>)(g, begin, end);
}

void gaussian_with_gradient(const Gaussian& g, int64_t begin, int64_t end) {
  (g.float64 ? sums<double, true> : sums<float, true>)(g, begin, end);
}

void gaussian_gradient(const Gaussian& g, int64_t begin, int64_t end) {
  (g.float64 ? gradients<double> : gradients<float>)(g, begin, end);
}

BICM_NAMESPACE_END
