// Exact reversible updates: every thread reads its group of every tensor, rounds the increment once, steps, stores.
#include "../core/multistep.h"

#include "affine.h"
#include "kernels.h"
#include "reversible_fixed_point.h"

namespace bicm {
namespace cuda {
namespace {

enum class Task { encode, step, scaled_step };

template <bool Inverse, Task T, int G>
BICM_DEVICE void step_all(const Exact& e, const int64_t* last, const int64_t* increment, int64_t* info, int64_t* out) {
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) {
    out[i] = T == Task::scaled_step && e.multiplies
                 ? scaled_step_by<Inverse>(last[i], increment[i], e.from, e.to, info[i])
                 : step_by<Inverse>(last[i], increment[i], e.largest);
  }
}

// All inputs are loaded before the first is used; with Terms = 0 the number of terms is a run-time value. Returns
// whether something is missing from the results.
template <class Memory, int Terms, Task T>
BICM_DEVICE bool step_group(const Reversible& p, const Exact& e, const typename Memory::Place& place) {
  constexpr int G = Memory::kGroup, kSlots = Terms == 0 ? kMaxTerms : Terms;
  constexpr bool kSteps = T != Task::encode, kScales = T == Task::scaled_step;
  using Raw = typename Memory::Raw;
  const int terms = Terms == 0 ? p.terms : Terms;

  Raw input[kSlots] = {}, conditional = {}, last_raw = {}, info_raw = {};
  BICM_UNROLL(8)
  for (int k = 0; k < kSlots; ++k) {
    if (k < terms) input[k] = Memory::load(p.layout, p.input[k], place);
  }
  if (p.guided) conditional = Memory::load(p.layout, p.conditional, place);
  if (kSteps) last_raw = Memory::load(p.layout, p.last, place);
  if (kScales) info_raw = Memory::load(p.layout, p.info, place);

  double y[G] = {};
  BICM_UNROLL(8)
  for (int k = 0; k < kSlots; ++k) {
    if (k >= terms) continue;
    double x[G];
    values_of<G>(p.input[k], input[k], e.unit, x);
    if (p.guided && k == terms - 1) {
      double partner[G];
      values_of<G>(p.conditional, conditional, e.unit, partner);
      BICM_UNROLL(8)
      for (int i = 0; i < G; ++i) x[i] = guide(x[i], partner[i], e.guidance_scale);
    }
    fold<G>(k == 0, e.weight[k], x, y);
  }

  int64_t increment[G], last[G] = {}, info[G] = {}, out[G];
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) increment[i] = encode(y[i] * e.per_unit);
  if (kScales) integers_of<G>(p.info, info_raw, info);
  if (kSteps) {
    integers_of<G>(p.last, last_raw, last);
    if (p.inverse) {
      step_all<true, T, G>(e, last, increment, info, out);
    } else {
      step_all<false, T, G>(e, last, increment, info, out);
    }
  } else {
    BICM_UNROLL(8)
    for (int i = 0; i < G; ++i) out[i] = within(increment[i], e.largest);
  }
  Memory::store(p.layout, p.out, place, out);
  if (kScales) Memory::store(p.layout, p.info_out, place, info);

  bool missing = false;
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) missing = missing || (out[i] == kMissing && Memory::exists(place, i));
  return missing;
}

// Any number of threads may mark the same sample concurrently, in any order: all write the same value, and
// only where no earlier step has left an entry. The result does not depend on their order.
BICM_DEVICE void note(const Reversible& p, int64_t sample) {
  int64_t* const entry = p.overflow + sample * p.overflow_stride;
  if (load_relaxed(entry) == 0) store_relaxed(entry, load_integer(p.mark, sample));
}

template <class Memory, int Terms, Task T>
__global__ void __launch_bounds__(kThreads, 2) reversible_kernel(const __grid_constant__ Reversible p, bool aligned) {
  constexpr int G = Memory::kGroup;
  for (int64_t sample = blockIdx.y; sample < p.layout.batch; sample += gridDim.y) {
    const Exact e = exact_of(p, sample);
    bool missing = false;
    for (int64_t begin = first_group() * G; begin < p.layout.elements; begin += group_stride() * G) {
      const bool found = step_group<Memory, Terms, T>(p, e, Memory::at(p.layout, sample, begin, aligned));
      missing = missing || found;
    }
    if (missing && p.overflow != nullptr) note(p, sample);
  }
}

template <class Memory>
__global__ void __launch_bounds__(kThreads)
    fixed_point_decode_kernel(const __grid_constant__ FixedPointDecode p, bool aligned) {
  constexpr int G = Memory::kGroup;
  const double unit = power_of_two(-p.fraction_bits);
  for (int64_t sample = blockIdx.y; sample < p.layout.batch; sample += gridDim.y) {
    for (int64_t begin = first_group() * G; begin < p.layout.elements; begin += group_stride() * G) {
      const typename Memory::Place place = Memory::at(p.layout, sample, begin, aligned);
      double values[G];
      values_of<G>(p.q, Memory::load(p.layout, p.q, place), unit, values);
      Memory::store(p.layout, p.out, place, values);
    }
  }
}

template <class Memory, class Problem>
cudaError_t run(void (*kernel)(const Problem, bool), const Problem& p, bool aligned, cudaStream_t stream) {
  Grid grid;
  const cudaError_t error = plan(p.layout, Memory::kGroup, kernel, grid);
  return error != cudaSuccess ? error : launch(kernel, grid, stream, p, aligned);
}

template <class Memory, int Terms>
cudaError_t run_step(const Reversible& p, bool aligned, cudaStream_t stream) {
  if (p.multiplies) return run<Memory>(reversible_kernel<Memory, Terms, Task::scaled_step>, p, aligned, stream);
  return run<Memory>(reversible_kernel<Memory, Terms, Task::step>, p, aligned, stream);
}

// Dense memory has a kernel for every number of terms, so that none reserves registers for absent terms.
cudaError_t run_dense(const Reversible& p, bool aligned, cudaStream_t stream) {
  switch (p.terms) {
    case 1: return run_step<DenseFixed, 1>(p, aligned, stream);
    case 2: return run_step<DenseFixed, 2>(p, aligned, stream);
    case 3: return run_step<DenseFixed, 3>(p, aligned, stream);
    case 4: return run_step<DenseFixed, 4>(p, aligned, stream);
    default: return run_step<DenseFixed, 5>(p, aligned, stream);
  }
}

template <class Visit>
void for_operands(const Reversible& p, Visit visit) {
  for (int k = 0; k < p.terms; ++k) visit(p.input[k]);
  if (p.guided) visit(p.conditional);
  if (p.steps) visit(p.last);
  visit(p.out);
  if (p.multiplies) {
    visit(p.info);
    visit(p.info_out);
  }
}

}  // namespace

cudaError_t reversible(const Reversible& p, cudaStream_t stream) {
  if (p.layout.batch == 0 || p.layout.elements == 0) return cudaSuccess;
  bool dense = true, aligned = true;
  for_operands(p, [&](const Operand& x) {
    dense = dense && x.dense;
    aligned = aligned && access_aligned(p.layout, x);
  });
  if (!p.steps) {
    return dense ? run<DenseFixed>(reversible_kernel<DenseFixed, 1, Task::encode>, p, aligned, stream)
                 : run<StridedFixed>(reversible_kernel<StridedFixed, 1, Task::encode>, with_reciprocals(p), false,
                                     stream);
  }
  return dense ? run_dense(p, aligned, stream) : run_step<StridedFixed, 0>(with_reciprocals(p), false, stream);
}

cudaError_t fixed_point_decode(const FixedPointDecode& p, cudaStream_t stream) {
  if (p.layout.batch == 0 || p.layout.elements == 0) return cudaSuccess;
  const bool aligned = access_aligned(p.layout, p.q) && access_aligned(p.layout, p.out);
  return p.q.dense && p.out.dense
             ? run<DenseFixed>(fixed_point_decode_kernel<DenseFixed>, p, aligned, stream)
             : run<StridedFixed>(fixed_point_decode_kernel<StridedFixed>, with_reciprocals(p), false, stream);
}

}  // namespace cuda
}  // namespace bicm
