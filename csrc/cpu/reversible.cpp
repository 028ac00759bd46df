// Exact reversible updates on a part of a unit at a time: values in float64, increments on the grid, the integer step.
#include "../core/reversible.h"

#include "reversible_integers.h"
#include "staging.h"

BICM_NAMESPACE_BEGIN
namespace {

// Elements per part: as many doubles and integers of every operand as fit in the first-level cache.
constexpr int64_t kPart = kChunk / 2;
// Keeps the buffers' addresses from differing by a multiple of a page, where they would compete for the same cache
// sets.
constexpr int64_t kPad = 48;

struct Buffers {
  alignas(64) double input[kMaxTerms][kPart + kPad];
  alignas(64) double conditional[kPart + kPad];
  alignas(64) int64_t last[kPart + kPad];
  alignas(64) int64_t info[kPart + kPad];
  alignas(64) int64_t increment[kPart + kPad];
  alignas(64) int64_t out[kPart + kPad];
  alignas(64) int64_t info_out[kPart + kPad];
  int64_t sample = -1;  // the sample that this arithmetic belongs to
  Exact exact;
};

bool lies_ready(const Operand& x) { return x.dense && x.dtype == DType::int64; }

int64_t* address(const Operand& x, const Unit& unit) {
  return static_cast<int64_t*>(x.data) + unit.sample * x.batch_stride + unit.begin;
}

// An operand's integers as they are stored.
const int64_t* load_integers(const Layout& layout, const Operand& x, const Unit& unit, int64_t* buffer) {
  if (lies_ready(x)) return address(x, unit);
  return x.dtype == DType::int32 ? load_as<int32_t>(layout, x, unit, buffer)
                                 : load_as<int64_t>(layout, x, unit, buffer);
}

// A state's integers as int64, with int64's value for missing elements.
const int64_t* load_state(const Layout& layout, const Operand& x, const Unit& unit, int64_t* buffer) {
  const int64_t* q = load_integers(layout, x, unit, buffer);
  if (x.dtype == DType::int64) return q;
  const int64_t largest = largest_of(x.dtype);
  for (int64_t i = 0; i < unit.count; ++i) buffer[i] = within(q[i], largest);
  return buffer;
}

void decode_all(const int64_t* q, int64_t largest, double unit, double* out, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = decode(q[i], largest, unit);
}

// An operand in float64: a fixed-point state is decoded through the integers' buffer.
const double* load_values(const Layout& layout, const Operand& x, const Unit& unit, double scale, int64_t* integers,
                          double* buffer) {
  if (x.dtype != DType::int64 && x.dtype != DType::int32) return load_unit(layout, x, unit, buffer);
  decode_all(load_integers(layout, x, unit, integers), largest_of(x.dtype), scale, buffer, unit.count);
  return buffer;
}

template <int K>
BICM_HD double sum_at(const double* const* x, const double* weight, int64_t i) {
  double y = weight[0] * x[0][i];
  for (int k = 1; k < K; ++k) y = y + weight[k] * x[k][i];
  return y;
}

// Assumes small increments, and repeats the part if one is not.
template <int K>
void fold(const double* const* x, const double* weight, double per_unit, int64_t* out, int64_t count) {
  int64_t large = 0;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const double y = sum_at<K>(x, weight, i) * per_unit;
    large |= mask_of(!(__builtin_fabs(y) < static_cast<double>(kSmall)));
    out[i] = small_to_integer(y);
  }
  if (large == 0) return;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = encode(sum_at<K>(x, weight, i) * per_unit);
}

void increments(const Reversible& p, const Unit& unit, Buffers& b) {
  const Exact& e = b.exact;
  const double* x[kMaxTerms];
  for (int k = 0; k < p.terms; ++k) x[k] = load_values(p.layout, p.input[k], unit, e.unit, b.increment, b.input[k]);
  if (p.guided) {
    const double* unconditional = x[p.terms - 1];
    const double* conditional = load_values(p.layout, p.conditional, unit, e.unit, b.increment, b.conditional);
    double* guided = b.input[p.terms - 1];
    const double scale = e.guidance_scale;
#pragma GCC ivdep
    for (int64_t i = 0; i < unit.count; ++i) {
      guided[i] = unconditional[i] + scale * (conditional[i] - unconditional[i]);
    }
    x[p.terms - 1] = guided;
  }
  switch (p.terms) {
    case 1: return fold<1>(x, e.weight, e.per_unit, b.increment, unit.count);
    case 2: return fold<2>(x, e.weight, e.per_unit, b.increment, unit.count);
    case 3: return fold<3>(x, e.weight, e.per_unit, b.increment, unit.count);
    case 4: return fold<4>(x, e.weight, e.per_unit, b.increment, unit.count);
    default: return fold<5>(x, e.weight, e.per_unit, b.increment, unit.count);
  }
}

// These return whether something is missing from the results.
template <bool Inverse>
bool step_all(const int64_t* last, const int64_t* increment, int64_t largest, int64_t* out, int64_t count) {
  if (small_step_all<Inverse>(last, increment, largest, out, count)) return false;
  int64_t missing = 0;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const int64_t result = step_by<Inverse>(last[i], increment[i], largest);
    out[i] = result;
    missing |= mask_of(result == kMissing);
  }
  return missing != 0;
}

template <bool Inverse>
bool scaled_step_all(const Exact& e, const int64_t* last, const int64_t* increment, const int64_t* info, int64_t* out,
                     int64_t* info_out, int64_t count) {
  if (small_scaled_step_all<Inverse>(e, last, increment, info, out, info_out, count)) return false;
  const Factor from = e.from, to = e.to;
  int64_t missing = 0;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    int64_t buffer = info[i];
    const int64_t result = scaled_step_by<Inverse>(last[i], increment[i], from, to, buffer);
    out[i] = result;
    info_out[i] = buffer;
    missing |= mask_of(result == kMissing);
  }
  return missing != 0;
}

// An encoding that a narrower dtype cannot hold is missing.
bool bound_all(const int64_t* increment, int64_t largest, int64_t* out, int64_t count) {
  int64_t missing = 0;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    out[i] = within(increment[i], largest);
    missing |= mask_of(out[i] == kMissing);
  }
  return missing != 0;
}

void store_integers(const Layout& layout, const Operand& x, const Unit& unit, int64_t* from) {
  if (x.dtype == DType::int64) return store_as<int64_t>(layout, x, unit, from);
  const int64_t missing = -largest_of(x.dtype) - 1;
  for (int64_t i = 0; i < unit.count; ++i) from[i] = from[i] == kMissing ? missing : from[i];
  store_as<int32_t>(layout, x, unit, from);
}

bool step_unit(const Reversible& p, const Unit& unit, Buffers& b, int64_t* out) {
  const Exact& e = b.exact;
  if (!p.steps) return bound_all(b.increment, e.largest, out, unit.count);
  const int64_t* last = load_state(p.layout, p.last, unit, b.last);
  const auto step = p.inverse ? step_all<true> : step_all<false>;
  if (!p.multiplies) return step(last, b.increment, e.largest, out, unit.count);
  const int64_t* info = load_integers(p.layout, p.info, unit, b.info);
  const bool in_place = lies_ready(p.info_out) && !p.info_out.streams;
  int64_t* info_out = in_place ? address(p.info_out, unit) : b.info_out;
  bool missing;
  if (e.multiplies) {
    const auto scaled_step = p.inverse ? scaled_step_all<true> : scaled_step_all<false>;
    missing = scaled_step(e, last, b.increment, info, out, info_out, unit.count);
  } else {
    // The buffer first: the state's result may overwrite it.
    if (info_out != info) __builtin_memmove(b.info_out, info, static_cast<size_t>(unit.count) * sizeof(int64_t));
    missing = step(last, b.increment, e.largest, out, unit.count);
    if (in_place && info_out != info) {
      __builtin_memcpy(info_out, b.info_out, static_cast<size_t>(unit.count) * sizeof(int64_t));
    }
  }
  if (!in_place) store_integers(p.layout, p.info_out, unit, b.info_out);
  return missing;
}

// Threads may mark the same sample concurrently, with the same value; a relaxed store makes this safe.
void note(const Reversible& p, int64_t sample) {
  int64_t* const entry = p.overflow + sample * p.overflow_stride;
  if (__atomic_load_n(entry, __ATOMIC_RELAXED) == 0) {
    __atomic_store_n(entry, load_integer(p.mark, sample), __ATOMIC_RELAXED);
  }
}

void part(const Reversible& p, const Unit& unit, Buffers& b) {
  if (b.sample != unit.sample) {
    b.exact = exact_of(p, unit.sample);
    b.sample = unit.sample;
  }
  increments(p, unit, b);
  const bool in_place = lies_ready(p.out) && !p.out.streams;
  int64_t* out = in_place ? address(p.out, unit) : b.out;
  const bool missing = step_unit(p, unit, b, out);
  if (!in_place) store_integers(p.layout, p.out, unit, out);
  if (missing && p.overflow != nullptr) note(p, unit.sample);
}

// Calls visit(part) for the parts of units [begin, end).
template <class Visit>
void for_parts(const Layout& layout, int64_t begin, int64_t end, Visit visit) {
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit = unit_at(layout, i);
    for (int64_t done = 0; done < unit.count; done += kPart) {
      const int64_t left = unit.count - done;
      visit(Unit{unit.sample, unit.begin + done, left < kPart ? left : kPart});
    }
  }
  finish_streams();
}

}  // namespace

void reversible(const Reversible& p, int64_t begin, int64_t end) {
  Buffers buffers;
  for_parts(p.layout, begin, end, [&](const Unit& unit) { part(p, unit, buffers); });
}

void fixed_point_decode(const FixedPointDecode& p, int64_t begin, int64_t end) {
  alignas(64) int64_t integers[kPart];
  alignas(64) double values[kPart];
  for_parts(p.layout, begin, end, [&](const Unit& unit) {
    load_values(p.layout, p.q, unit, power_of_two(-p.fraction_bits), integers, values);
    store_unit(p.layout, p.out, unit, values);
  });
}

BICM_NAMESPACE_END
