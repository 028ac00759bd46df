// Sampler updates on one unit at a time: stage inputs where necessary, fold, round once, store.
#include "../core/multistep.h"

#include "affine.h"

BICM_NAMESPACE_BEGIN
namespace {

template <class C>
struct Buffers : Inputs<C> {
  alignas(64) C out[kChunk + kPad];
  alignas(64) C x0[kChunk + kPad];
  alignas(64) C next[kChunk + kPad];
  int64_t weighed = -1;  // the sample that these weights belong to: forming them costs as much as a hundred elements
  C weight[kMaxTerms];
};

// The results of a unit in buffers: the state, and its scaled copy for the next evaluation.
template <class C>
void store_results(const Multistep& m, const Unit& unit, C* out) {
  store_unit(m.layout, m.out, unit, out);
  if (!m.scales) return;
  const C scale = next_scale<C>(m, unit.sample);
  for (int64_t i = 0; i < unit.count; ++i) out[i] = scale * out[i];
  store_unit(m.layout, m.next, unit, out);
}

template <class C>
void affine_unit(const Multistep& m, const Unit& unit, Buffers<C>& buffers) {
  const C* x[kMaxTerms];
  const C noise_weight = draw(m, unit, buffers);
  load_inputs(m, unit, buffers, x);
  if (buffers.weighed != unit.sample) {
    form_weights(m, unit.sample, buffers.weight);
    buffers.weighed = unit.sample;
  }
  const C* weight = buffers.weight;
  const bool in_place = is_compute_type<C>(m.out) && !m.out.streams && !m.scales;
  C* out = in_place ? static_cast<C*>(m.out.data) + unit.sample * m.out.batch_stride + unit.begin : buffers.out;
  if (noise_weight != C(0)) {
    fold_terms<C, true>(m.terms, x, weight, buffers.noise, noise_weight, out, unit.count);
  } else {
    fold_terms<C, false>(m.terms, x, weight, nullptr, C(0), out, unit.count);
  }
  if (!in_place) store_results(m, unit, out);
}

// The inputs and outputs of a denoised step for one unit. Without clipping the bound is infinite.
template <class C>
struct Denoised {
  const C *x0_weight, *weight;  // one per term
  C weight_of_x0, bound, noise_weight, scale;
  const float* noise;
  C *x0, *out, *next;
};

// Exact aliasing of an output and an input is fine: each i is read, then written.
template <class C, int K, bool Draws, bool Scales>
void fold_denoised(const C* const* x, const Denoised<C>& denoised, int64_t count) {
  const Denoised<C> d = denoised;
  const Weights<C, K> x0_weight(d.x0_weight), weight(d.weight);
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    C x0 = x0_weight.of[0] * x[0][i];
    C y = weight.of[0] * x[0][i];
    for (int k = 1; k < K; ++k) {
      x0 = x0 + x0_weight.of[k] * x[k][i];
      y = y + weight.of[k] * x[k][i];
    }
    x0 = clip_to(x0, d.bound);
    y = y + d.weight_of_x0 * x0;
    if (Draws) y = y + d.noise_weight * static_cast<C>(d.noise[i]);
    d.x0[i] = x0;
    d.out[i] = y;
    if (Scales) d.next[i] = d.scale * y;
  }
}

template <class C, bool Draws, bool Scales>
void fold_denoised_terms(int terms, const C* const* x, const Denoised<C>& d, int64_t count) {
  switch (terms) {
    case 1: return fold_denoised<C, 1, Draws, Scales>(x, d, count);
    case 2: return fold_denoised<C, 2, Draws, Scales>(x, d, count);
    case 3: return fold_denoised<C, 3, Draws, Scales>(x, d, count);
    case 4: return fold_denoised<C, 4, Draws, Scales>(x, d, count);
    default: return fold_denoised<C, 5, Draws, Scales>(x, d, count);
  }
}

// Where a unit's results are formed: in place, or in a buffer from which they are stored.
template <class C>
C* place_of(const Operand& to, const Unit& unit, C* buffer) {
  const bool in_place = is_compute_type<C>(to) && !to.streams;
  return in_place ? static_cast<C*>(to.data) + unit.sample * to.batch_stride + unit.begin : buffer;
}

template <class C>
void denoised_unit(const Multistep& m, const Unit& unit, Buffers<C>& buffers) {
  const C* x[kMaxTerms];
  C x0_weight[kMaxTerms], weight[kMaxTerms];
  const C noise_weight = draw(m, unit, buffers);
  load_inputs(m, unit, buffers, x);
  for (int k = 0; k < m.terms; ++k) x0_weight[k] = load_number<C>(m.x0_coefficient[k], unit.sample);
  form_weights(m, unit.sample, weight);
  const C bound = m.clips ? load_number<C>(m.clip, unit.sample) : static_cast<C>(__builtin_inf());
  const C scale = m.scales ? next_scale<C>(m, unit.sample) : C(1);
  C* const x0 = place_of(m.x0, unit, buffers.x0);
  C* const out = place_of(m.out, unit, buffers.out);
  C* const next = m.scales ? place_of(m.next, unit, buffers.next) : buffers.next;
  const Denoised<C> d = {
      x0_weight, weight, load_number<C>(m.x0_weight, unit.sample), bound, noise_weight, scale, buffers.noise, x0,
      out,       next};
  const auto plain = m.scales ? fold_denoised_terms<C, false, true> : fold_denoised_terms<C, false, false>;
  const auto noisy = m.scales ? fold_denoised_terms<C, true, true> : fold_denoised_terms<C, true, false>;
  (noise_weight != C(0) ? noisy : plain)(m.terms, x, d, unit.count);
  if (x0 == buffers.x0) store_unit(m.layout, m.x0, unit, x0);
  if (out == buffers.out) store_unit(m.layout, m.out, unit, out);
  if (m.scales && next == buffers.next) store_unit(m.layout, m.next, unit, next);
}

#if defined(BICM_VECTOR)

// Folded in registers: dense operands of 32 and 16 bits, which would otherwise be written to and read from buffers in
// the first-level cache (twice the bytes of halves, guided outputs, streamed results).
enum class Registers { no, floats, any };

Registers in_registers(const Multistep& m) {
  bool runs = true, floats = true;
  const auto add = [&](const Operand& x) {
    runs = runs && is_run(x);
    floats = floats && x.dtype == DType::float32;
  };
  for (int k = 0; k < m.terms; ++k) add(m.input[k]);
  add(m.out);
  if (m.guided) add(m.conditional);
  if (m.denoises) add(m.x0);
  if (m.scales) add(m.next);
  if (!runs || (floats && !m.guided && !m.denoises)) return Registers::no;
  return floats ? Registers::floats : Registers::any;
}

// The same operations as in affine_unit and denoised_unit, for whole blocks. Returns how many elements it did.
template <int K, bool kFloats>
int64_t fold_terms_of_runs(const Multistep& m, const Unit& unit, Buffers<float>& buffers) {
  Run input[K], conditional = {};
  const Run out = target_of(m.out, unit, buffers.out);
  const Run x0 = m.denoises ? target_of(m.x0, unit, buffers.x0) : out;
  const Run next = m.scales ? target_of(m.next, unit, buffers.next) : out;
  for (int k = 0; k < K; ++k) input[k] = run_of(m.input[k], unit);
  if (m.guided) conditional = run_of(m.conditional, unit);
  const float guidance = m.guided ? load_number<float>(m.guidance_scale, unit.sample) : 0.0f;
  const float noise_weight = draw(m, unit, buffers);
  float weight[kMaxTerms], x0_weight[kMaxTerms] = {};
  form_weights(m, unit.sample, weight);
  for (int k = 0; m.denoises && k < K; ++k) x0_weight[k] = load_number<float>(m.x0_coefficient[k], unit.sample);
  const float weight_of_x0 = m.denoises ? load_number<float>(m.x0_weight, unit.sample) : 0.0f;
  const float bound = m.clips ? load_number<float>(m.clip, unit.sample) : __builtin_inff();
  const float scale = m.scales ? next_scale<float>(m, unit.sample) : 1.0f;

  int64_t i = 0;
  for (; i + kBlock <= unit.count; i += kBlock) {
    Block y = {}, clean = {};
    BICM_UNROLL(5)
    for (int k = 0; k < K; ++k) {
      Block x = load_block<kFloats>(input[k], i);
      if (m.guided && k == K - 1) x = guided_block<kFloats>(x, conditional, guidance, i);
      const Block last = y, last_clean = clean;
      y = each_part([&](int j) { return k ? last.part[j] + weight[k] * x.part[j] : weight[k] * x.part[j]; });
      if (!m.denoises) continue;
      clean = each_part(
          [&](int j) { return k ? last_clean.part[j] + x0_weight[k] * x.part[j] : x0_weight[k] * x.part[j]; });
    }
    if (m.denoises) {
      clean = each_part([&](int j) { return clip_to(clean.part[j], Floats{} + bound); });
      y = each_part([&](int j) { return y.part[j] + weight_of_x0 * clean.part[j]; });
    }
    if (noise_weight != 0.0f) {
      y = each_part(
          [&](int j) { return y.part[j] + noise_weight * load_vector<Floats>(buffers.noise + i + j * kLanes); });
    }
    if (m.denoises) store_block<kFloats>(clean, x0, i);
    store_block<kFloats>(y, out, i);
    if (!m.scales) continue;
    y = each_part([&](int j) { return scale * y.part[j]; });
    store_block<kFloats>(y, next, i);
  }
  finish_run(m.out, unit, out, i);
  if (m.denoises) finish_run(m.x0, unit, x0, i);
  if (m.scales) finish_run(m.next, unit, next, i);
  return i;
}

template <bool kFloats>
int64_t fold_runs(const Multistep& m, const Unit& unit, Buffers<float>& buffers) {
  switch (m.terms) {
    case 1: return fold_terms_of_runs<1, kFloats>(m, unit, buffers);
    case 2: return fold_terms_of_runs<2, kFloats>(m, unit, buffers);
    case 3: return fold_terms_of_runs<3, kFloats>(m, unit, buffers);
    case 4: return fold_terms_of_runs<4, kFloats>(m, unit, buffers);
    default: return fold_terms_of_runs<5, kFloats>(m, unit, buffers);
  }
}

// The number of elements of a unit that are processed without staging.
template <class C>
int64_t fold_in_registers(const Multistep& m, const Unit& unit, Buffers<C>& buffers, Registers registers) {
  if constexpr (Same<C, float>::value) {
    if (registers == Registers::floats) return fold_runs<true>(m, unit, buffers);
    if (registers == Registers::any) return fold_runs<false>(m, unit, buffers);
  }
  return 0;
}

#else

enum class Registers { no };

Registers in_registers(const Multistep&) { return Registers::no; }

template <class C>
int64_t fold_in_registers(const Multistep&, const Unit&, Buffers<C>&, Registers) {
  return 0;
}

#endif

// A staged tensor is read in a burst per unit, too short for the hardware prefetcher: prefetch the next one now.
template <class C>
void prefetch_staged(const Multistep& m, const Unit& next) {
  for (int k = 0; k < m.terms; ++k) {
    if (!is_compute_type<C>(m.input[k]) || m.denoises) prefetch_unit(m.input[k], next);
  }
  if (m.guided) prefetch_unit(m.conditional, next);
}

// A unit in parts: noise is faster in long runs, but staged tensors must fit in the first-level cache together.
template <class C>
void run(const Multistep& m, int64_t begin, int64_t end) {
  Buffers<C> buffers;
  bool staged = m.guided || m.denoises;
  for (int k = 0; k < m.terms; ++k) staged = staged || !is_compute_type<C>(m.input[k]);
  const int64_t width = m.draws || !staged ? kChunk : kChunk / 2;
  const Registers registers = in_registers(m);
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit = unit_at(m.layout, i);
    int64_t done = fold_in_registers(m, unit, buffers, registers);
    for (; done < unit.count; done += width) {
      const Unit part = part_of(m.layout, unit, done, width);
      const Unit next = part_of(m.layout, unit, done + width, width);
      if (next.count > 0) prefetch_staged<C>(m, next);
      m.denoises ? denoised_unit(m, part, buffers) : affine_unit(m, part, buffers);
    }
  }
  finish_streams();
}

}  // namespace

void multistep(const Multistep& m, int64_t begin, int64_t end) {
  m.float64 ? run<double>(m, begin, end) : run<float>(m, begin, end);
}

BICM_NAMESPACE_END
