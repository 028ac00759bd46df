// Launching on the CPU: units of a problem split over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../cpu/kernels.h"
#include "tensors.h"

namespace bicm {

// The kernels in use; throws where BICM_KERNELS_ISA names a set that this processor does not have.
const Kernels& active_kernels();

struct Cpu {
  // Elements per thread at which another thread pays off; below it, one thread is faster.
  static constexpr int64_t kGrain = 32768, kNoiseGrain = 8192;
  static constexpr bool kOnHost = true;

  template <class Problem, class Kernel>
  static void split(const Problem& problem, const Layout& layout, int64_t grain, Kernel kernel) {
    const int64_t per_unit = layout.elements < kChunk ? layout.elements : kChunk;
    const int64_t units = layout.batch * units_per_sample(layout);
    split_items(problem, units, grain / per_unit + 1, kernel);
  }

  template <class Problem, class Kernel>
  static void split_items(const Problem& problem, int64_t items, int64_t per_thread, Kernel kernel) {
    if (items <= per_thread) return kernel(problem, 0, items);
    torch::stable::parallel_for(0, items, per_thread, [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
  }

  static void run(const struct Multistep& problem);
  static void run(const struct Multistep& problem, const Tensor&) { run(problem); }
  static void run(const struct Noise& problem);
  static void run(const struct Noise& problem, const Tensor&) { run(problem); }
  static void run(const struct NoisyPair& problem);
  static void run(const struct NoisyPair& problem, const Tensor&) { run(problem); }
  static void sums(struct PseudoHuber& problem, void* loss, double* sums);
  static void sums(struct PseudoHuber& problem, const Tensor& loss, double* sums);
  static void sums(struct PseudoHuber& problem, const Tensor& loss, const Tensor& sums);
  static void gradients(const struct PseudoHuber& problem, const Tensor&);
  static void sums_and_gradients(struct PseudoHuber& problem, void* loss, double* sums);
  static void sums_and_gradients(struct PseudoHuber& problem, const Tensor& loss, double* sums);
  static void scale(const struct KeptGradient& problem, const Tensor&);
  static void run(const struct Gaussian& problem);
  static void run(const struct Gaussian& problem, const Tensor&) { run(problem); }
  static void gradients(const struct Gaussian& problem, const Tensor&);
  static void run(const struct Reversible& problem);
  static void run(const struct Reversible& problem, const Tensor&) { run(problem); }
  static void run(const struct FixedPointDecode& problem);
  static void run(const struct FixedPointDecode& problem, const Tensor&) { run(problem); }
  static void fold_in(const Integer& seed, const Integer& data, const Tensor& out);
};

}  // namespace bicm
