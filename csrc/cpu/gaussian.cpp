// Gaussian policies on one unit at a time: the residual into a buffer, then its square's sum, its gradients, or both.
#include "../core/gaussian.h"

#include "affine.h"
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
  const C noise_weight = draw(g, unit, buffers);
  load_inputs(g, unit, buffers, x);
  fold_terms<C, false>(g.terms, x, buffers.weight, nullptr, C(0), buffers.mean, unit.count);
  subtract(minuend(g, unit, noise_weight, buffers), buffers.mean, residual, unit.count);
}

#if defined(BICM_VECTOR)

bool all_runs(const Gaussian& g) {
  bool runs = !g.float64;
  for (int k = 0; k < g.terms; ++k) runs = runs && is_run(g.input[k]) && (!g.diverges || is_run(g.reference[k]));
  if (g.guided) runs = runs && is_run(g.conditional);
  return runs && (g.diverges || is_run(g.steps ? g.out : g.next));
}

BICM_HD Block rounded(const Block& x, DType dtype) {
  if (dtype == DType::bfloat16) return each_part([&](int j) { return bit_cast<Floats>(to_bfloat16(x.part[j]) << 16); });
  if (dtype == DType::float32) return x;
  Half halves[kLanes];
  return each_part([&](int j) {
    floats_to_halves(x.part[j], halves);
    return halves_to_floats(halves);
  });
}

// The mean of contiguous runs; the last operand may have a partner.
struct Mean {
  Run input[kMaxTerms], conditional;
  bool guided;
  float weight[kMaxTerms], guidance;
};

template <int K>
BICM_HD Block fold_block(const Mean& m, int64_t i) {
  Block y = {};
  BICM_UNROLL(5)
  for (int k = 0; k < K; ++k) {
    Block x = load_block<false>(m.input[k], i);
    if (m.guided && k == K - 1) x = guided_block<false>(x, m.conditional, m.guidance, i);
    const Block last = y;
    y = each_part([&](int j) { return k ? last.part[j] + m.weight[k] * x.part[j] : m.weight[k] * x.part[j]; });
  }
  return y;
}

// The same operations for whole blocks of dense operands, in registers. Returns how many elements it did.
template <int K>
int64_t residual_of_runs(const Gaussian& g, const Unit& unit, Buffers<float>& buffers) {
  Mean ours = {}, theirs = {};
  for (int k = 0; k < K; ++k) {
    ours.input[k] = run_of(g.input[k], unit);
    ours.weight[k] = theirs.weight[k] = buffers.weight[k];
    if (g.diverges) theirs.input[k] = run_of(g.reference[k], unit);
  }
  ours.guided = g.guided;
  if (g.guided) {
    ours.conditional = run_of(g.conditional, unit);
    ours.guidance = load_number<float>(g.guidance_scale, unit.sample);
  }
  const Run next = g.steps ? target_of(g.out, unit, buffers.other) : g.diverges ? Run{} : run_of(g.next, unit);
  const float noise_weight = draw(g, unit, buffers);

  int64_t i = 0;
  for (; i + kBlock <= unit.count; i += kBlock) {
    const Block mean = fold_block<K>(ours, i);
    Block other = mean;
    if (g.steps) {
      if (noise_weight != 0.0f) {
        other = each_part(
            [&](int j) { return mean.part[j] + noise_weight * load_vector<Floats>(buffers.noise + i + j * kLanes); });
      }
      store_block<false>(other, next, i);
      other = rounded(other, g.out.dtype);
    } else if (g.diverges) {
      other = fold_block<K>(theirs, i);
    } else {
      other = load_block<false>(next, i);
    }
    store_block(each_part([&](int j) { return other.part[j] - mean.part[j]; }), buffers.residual, DType::float32, i);
  }
  if (g.steps) finish_run(g.out, unit, next, i);
  return i;
}

int64_t residual_in_registers(const Gaussian& g, const Unit& unit, Buffers<float>& buffers) {
  switch (g.terms) {
    case 1: return residual_of_runs<1>(g, unit, buffers);
    case 2: return residual_of_runs<2>(g, unit, buffers);
    case 3: return residual_of_runs<3>(g, unit, buffers);
    case 4: return residual_of_runs<4>(g, unit, buffers);
    default: return residual_of_runs<5>(g, unit, buffers);
  }
}
int64_t residual_in_registers(const Gaussian&, const Unit&, Buffers<double>&) { return 0; }

// Gradients of halves, rounded in registers. Returns how many elements it did.
int64_t scale_in_registers(const Operand& to, const Unit& unit, float factor, Buffers<float>& buffers) {
  if (!is_run(to) || to.dtype == DType::float32) return 0;
  const Run run = target_of(to, unit, buffers.other);
  int64_t i = 0;
  for (; i + kBlock <= unit.count; i += kBlock) {
    store_block<false>(
        each_part([&](int j) { return factor * load_vector<Floats>(buffers.residual + i + j * kLanes); }), run, i);
  }
  finish_run(to, unit, run, i);
  return i;
}
int64_t scale_in_registers(const Operand&, const Unit&, double, Buffers<double>&) { return 0; }

#else

bool all_runs(const Gaussian&) { return false; }
template <class C>
int64_t residual_in_registers(const Gaussian&, const Unit&, Buffers<C>&) {
  return 0;
}
template <class C>
int64_t scale_in_registers(const Operand&, const Unit&, C, Buffers<C>&) {
  return 0;
}

#endif

// The unit's residual, in its buffer.
template <class C>
void residual_unit(const Gaussian& g, const Unit& unit, bool runs, Buffers<C>& buffers) {
  know_sample(g, unit.sample, buffers);
  const int64_t done = runs ? residual_in_registers(g, unit, buffers) : 0;
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
    const int64_t done = scale_in_registers(g.gradient[k], unit, pull.factor[k], buffers);
    if (done == unit.count) continue;
    const Unit rest = part_of(g.layout, unit, done, unit.count - done);
    store_scaled(g.layout, g.gradient[k], rest, pull.factor[k], r + done, buffers.other);
  }
}

template <class C, bool Differentiates>
void sums(const Gaussian& g, int64_t begin, int64_t end) {
  Buffers<C> buffers;
  const bool runs = all_runs(g);
  const int64_t chunks = sum_chunks(g.layout), units = units_per_sample(g.layout);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t place = item % chunks * kUnitsPerSum, first = item / chunks * units + place;
    const int64_t last = first + (units - place < kUnitsPerSum ? units - place : kUnitsPerSum);
    double total = 0.0;
    for (int64_t i = first; i < last; ++i) {
      const Unit unit = unit_at(g.layout, i);
      residual_unit(g, unit, runs, buffers);
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
  const bool runs = all_runs(g);
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit = unit_at(g.layout, i);
    residual_unit(g, unit, runs, buffers);
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
