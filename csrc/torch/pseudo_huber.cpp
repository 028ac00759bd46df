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

// Samples of one chunk are summed where they are returned; of more, one number per chunk first.
void add_up(PseudoHuber& p, const Tensor& loss, double* results, void (*kernel)(const PseudoHuber&, int64_t, int64_t)) {
  const int64_t chunks = sum_chunks(p.layout), batch = p.layout.batch;
  std::vector<double> partial(chunks > 1 ? static_cast<size_t>(batch * chunks) : 0);
  p.sums = chunks > 1 ? partial.data() : results;
  const int64_t items = batch * chunks;
  if (items > 0) {
    const int64_t per_item = p.layout.elements < kUnitsPerSum * kChunk ? p.layout.elements : kUnitsPerSum * kChunk;
    Cpu::split_items(p, items, Cpu::kGrain / per_item + 1, kernel);
  }
  for (int64_t sample = 0; chunks != 1 && sample < batch; ++sample) {
    double total = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total = total + partial[sample * chunks + chunk];
    results[sample] = total;
  }
  p.sums = results;
  void* const value = loss.data_ptr();
  p.float64 ? finish(p, results, static_cast<double*>(value)) : finish(p, results, static_cast<float*>(value));
}

}  // namespace

void Cpu::sums(PseudoHuber& p, const Tensor& loss, const Tensor& sums) {
  add_up(p, loss, static_cast<double*>(sums.data_ptr()), active_kernels().pseudo_huber);
}

void Cpu::gradients(const PseudoHuber& p, const Tensor&) {
  split(p, p.layout, kGrain, active_kernels().pseudo_huber_gradient);
}

// A gradient that waits for the sums of several chunks takes a second sweep, in which all threads share a sample.
void Cpu::sums_and_gradients(PseudoHuber& p, const Tensor& loss, const Tensor& sums) {
  const Kernels& kernels = active_kernels();
  const bool at_once = gradient_follows_sum(p);
  add_up(p, loss, static_cast<double*>(sums.data_ptr()),
         at_once ? kernels.pseudo_huber_with_gradient : kernels.pseudo_huber);
  if (!at_once) gradients(p, sums);
}

void Cpu::scale(const KeptGradient& p, const Tensor&) { split(p, p.layout, kGrain, active_kernels().scale_gradient); }

}  // namespace bicm

STABLE_TORCH_LIBRARY_IMPL(bicm_kernels, CPU, library) { bicm::register_pseudo_huber<bicm::Cpu>(library); }
