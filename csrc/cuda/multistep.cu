// Sampler updates: every thread reads its group of every input, folds, rounds once and stores.
#include "../core/multistep.h"

#include "kernels.h"
#include "multistep_step.h"
#include "strided.h"

namespace bicm {
namespace cuda {
namespace {

// Whether a number of a step lies in memory, and whether it differs between samples.
template <class Visit>
void for_numbers(const Multistep& m, Visit visit) {
  for (const Number& number : m.coefficient) visit(number);
  if (m.guided) visit(m.guidance_scale);
  if (m.draws) visit(m.noise_weight);
  if (m.denoises) {
    for (int k = 0; k < m.terms; ++k) visit(m.x0_coefficient[k]);
    visit(m.x0_weight);
    if (m.clips) visit(m.clip);
  }
  if (m.scales) visit(m.next_scale);
}

Formed formed_where(const Multistep& m) {
  Formed formed = Formed::on_host;
  for_numbers(m, [&](const Number& number) {
    if (number.data == nullptr) return;
    formed = number.stride != 0 ? Formed::each : formed == Formed::each ? Formed::each : Formed::once;
  });
  return formed;
}

template <class Memory, int Terms, int Parts>
cudaError_t run(const Multistep& m, bool aligned, cudaStream_t stream) {
  using C = typename Memory::Compute;
  const Formed formed = formed_where(m);
  Weights<C> weights = {};
  if (formed == Formed::on_host) weights = weights_of<C>(m, 0);
  Grid grid;
  const auto kernel = multistep_kernel<Memory, Terms, Parts>;
  const int groups_of_round = aligned ? kGroupsOfRound<Memory, Terms, Parts> : 1;
  const cudaError_t error = plan(m.layout, Memory::kGroup, kernel, grid, groups_of_round);
  return error != cudaSuccess ? error : launch(kernel, grid, stream, m, weights, formed, aligned);
}

template <class Memory>
cudaError_t run_any(const Multistep& m, bool aligned, cudaStream_t stream) {
  return (m.denoises ? run<Memory, 0, kAnything> : run<Memory, 0, kAnySum>)(m, aligned, stream);
}

int parts_of(const Multistep& m) {
  return (m.guided ? kGuides : 0) | (m.draws ? kDraws : 0) | (m.scales ? kScales : 0) | (m.denoises ? kDenoises : 0);
}

// The steps of samplers, in dense memory of one narrow type, have kernels of their own.
template <class Memory>
cudaError_t run_dense(const Multistep& m, bool aligned, cudaStream_t stream) {
  const int parts = parts_of(m);
  const bool draws = (parts & ~kScales) == kDraws, denoises = (parts & ~(kScales | kDraws)) == kDenoises;
  switch (m.terms) {
    case 1:
      if (parts == 0) return run<Memory, 1, 0>(m, aligned, stream);
      if (draws) return run<Memory, 1, kDraws | kScales>(m, aligned, stream);
      break;
    case 2:
      if (parts == 0) return run<Memory, 2, 0>(m, aligned, stream);
      if (parts == kGuides) return run<Memory, 2, kGuides>(m, aligned, stream);
      if (draws) return run<Memory, 2, kDraws | kScales>(m, aligned, stream);
      if (denoises) return run<Memory, 2, kDraws | kScales | kDenoises>(m, aligned, stream);
      break;
    case 3:
      if (parts == 0) return run<Memory, 3, 0>(m, aligned, stream);
      if (parts == kGuides) return run<Memory, 3, kGuides>(m, aligned, stream);
      if (denoises) return run<Memory, 3, kDraws | kScales | kDenoises>(m, aligned, stream);
      break;
    case 4:
      if (parts == 0) return run<Memory, 4, 0>(m, aligned, stream);
      break;
    default:
      if (parts == 0) return run<Memory, 5, 0>(m, aligned, stream);
  }
  return run_any<Memory>(m, aligned, stream);
}

// Of float64 registers hold the terms that there are and no others.
cudaError_t run_wide(const Multistep& m, bool aligned, cudaStream_t stream) {
  using Memory = Packed<double>;
  if (!m.denoises) return run<Memory, 0, kAnySum>(m, aligned, stream);
  switch (m.terms) {
    case 1: return run<Memory, 1, kAnything>(m, aligned, stream);
    case 2: return run<Memory, 2, kAnything>(m, aligned, stream);
    case 3: return run<Memory, 3, kAnything>(m, aligned, stream);
    case 4: return run<Memory, 4, kAnything>(m, aligned, stream);
    default: return run<Memory, 5, kAnything>(m, aligned, stream);
  }
}

// States of float32 beside predictions of a network in a half.
cudaError_t run_mixed(const Multistep& m, bool aligned, cudaStream_t stream) {
  const int terms = parts_of(m) == 0 ? m.terms : 0;
  return (terms == 2 ? run<Mixed, 2, 0> : terms == 3 ? run<Mixed, 3, 0> : run_any<Mixed>)(m, aligned, stream);
}

template <class Visit>
void for_operands(const Multistep& m, Visit visit) {
  for (int k = 0; k < m.terms; ++k) visit(m.input[k]);
  if (m.guided) visit(m.conditional);
  visit(m.out);
  if (m.denoises) visit(m.x0);
  if (m.scales) visit(m.next);
}

// Samples that lie one behind another and share all their numbers are one long row, whatever the length of each.
bool joins_rows(const Multistep& m) {
  bool joins = m.layout.batch > 1 && !m.draws && formed_where(m) != Formed::each;
  for_operands(m, [&](const Operand& x) { joins = joins && x.dense && x.batch_stride == m.layout.elements; });
  return joins;
}

Multistep with_joined_rows(const Multistep& m) {
  Multistep joined = m;
  joined.layout.elements *= joined.layout.batch;
  joined.layout.batch = 1;
  return joined;
}

}  // namespace

cudaError_t multistep(const Multistep& given, cudaStream_t stream) {
  if (given.layout.batch == 0 || given.layout.elements == 0) return cudaSuccess;
  const bool joins = joins_rows(given);
  const Multistep joined = joins ? with_joined_rows(given) : Multistep{};
  const Multistep& m = joins ? joined : given;
  bool dense = true, uniform = true, aligned = true, any_float64 = false;
  for_operands(m, [&](const Operand& x) {
    dense = dense && x.dense;
    uniform = uniform && x.dtype == m.out.dtype;
    aligned = aligned && access_aligned(m.layout, x);
    any_float64 = any_float64 || x.dtype == DType::float64;
  });
  const bool packed = dense && m.float64 == any_float64 && (uniform || !any_float64);
  if (!packed) {
    return (m.float64 ? run_any<Strided<double>> : run_any<Strided<float>>)(with_reciprocals(m), false, stream);
  }
  if (!uniform) return run_mixed(m, aligned, stream);
  switch (m.out.dtype) {
    case DType::float16: return run_dense<Packed<Half>>(m, aligned, stream);
    case DType::bfloat16: return run_dense<Packed<BFloat16>>(m, aligned, stream);
    case DType::float32: return run_dense<Packed<float>>(m, aligned, stream);
    default: return run_wide(m, aligned, stream);
  }
}

}  // namespace cuda
}  // namespace bicm
