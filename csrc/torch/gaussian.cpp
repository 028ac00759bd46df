#include "gaussian.h"

#include "cpu.h"

namespace bicm {
namespace {

// A sample's sum is that of its chunks, in order.
template <class C>
void finish(const Gaussian& g, C* results) {
  const int64_t chunks = sum_chunks(g.layout);
  for (int64_t sample = 0; sample < g.layout.batch; ++sample) {
    double total = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total = total + g.totals[sample * chunks + chunk];
    results[sample] = static_cast<C>(density_of<C>(g, sample, total));
  }
}

}  // namespace

void Cpu::run(const Gaussian& problem) {
  const Kernels& kernels = active_kernels();
  Gaussian g = problem;
  const int64_t items = g.layout.batch * sum_chunks(g.layout);
  std::vector<double> totals(static_cast<size_t>(items));
  g.totals = totals.data();
  if (items > 0) {
    const int64_t per_item = g.layout.elements < kUnitsPerSum * kChunk ? g.layout.elements : kUnitsPerSum * kChunk;
    const int64_t grain = g.draws ? kNoiseGrain : kGrain;
    split_items(g, items, grain / per_item + 1, g.differentiates ? kernels.gaussian_with_gradient : kernels.gaussian);
  }
  g.float64 ? finish(g, static_cast<double*>(g.results)) : finish(g, static_cast<float*>(g.results));
}

void Cpu::gradients(const Gaussian& problem, const Tensor&) {
  split(problem, problem.layout, kGrain, active_kernels().gaussian_gradient);
}

}  // namespace bicm

STABLE_TORCH_LIBRARY_IMPL(bicm_kernels, CPU, library) { bicm::register_gaussian<bicm::Cpu>(library); }
