#include "pseudo_huber.h"

#include "cpu.h"

namespace bicm {
namespace {

template <class C>
void finish(const PseudoHuber& p, const double* sums, C* loss) {
  double total = 0.0;
  for (int64_t sample = 0; sample < p.layout.batch; ++sample) {
    const double value = load_number<double>(p.weight, sample) * distance_of(p, sample, sums[sample]);
    if (p.reduction == Reduction::none) loss[sample] = static_cast<C>(value);
    total = total + value;
  }
  if (p.reduction == Reduction::mean) total = total / static_cast<double>(p.layout.batch);
  if (p.reduction != Reduction::none) loss[0] = static_cast<C>(total);
}

}  // namespace

// Samples of one chunk are summed where they are returned; of more, one number per chunk first.
void Cpu::sums(PseudoHuber& p, const Tensor& loss, const Tensor& sums) {
  const int64_t chunks = sum_chunks(p.layout), batch = p.layout.batch;
  double* const results = static_cast<double*>(sums.data_ptr());
  std::vector<double> partial(chunks > 1 ? static_cast<size_t>(batch * chunks) : 0);
  p.sums = chunks > 1 ? partial.data() : results;
  const int64_t items = batch * chunks;
  if (items > 0) {
    const int64_t per_item = p.layout.elements < kUnitsPerSum * kChunk ? p.layout.elements : kUnitsPerSum * kChunk;
    split_items(p, items, kGrain / per_item + 1, active_kernels().pseudo_huber);
  }
  for (int64_t sample = 0; chunks != 1 && sample < batch; ++sample) {
    double total = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total = total + partial[sample * chunks + chunk];
    results[sample] = total;
  }
  void* const value = loss.data_ptr();
  p.float64 ? finish(p, results, static_cast<double*>(value)) : finish(p, results, static_cast<float*>(value));
}

void Cpu::gradients(const PseudoHuber& p, const Tensor&) {
  split(p, p.layout, kGrain, active_kernels().pseudo_huber_gradient);
}

}  // namespace bicm

STABLE_TORCH_LIBRARY_IMPL(bicm_kernels, CPU, library) { bicm::register_pseudo_huber<bicm::Cpu>(library); }
