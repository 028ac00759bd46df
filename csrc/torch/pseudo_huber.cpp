#include "pseudo_huber.h"

#include "cpu.h"

namespace bicm {
namespace {

// The values times a power of two, added up.
template <class C>
double store_values(const PseudoHuber& p, const double* sums, double scale, C* loss) {
  double total = 0.0;
  for (int64_t sample = 0; sample < p.layout.batch; ++sample) {
    const double value = load_number<double>(p.weight, sample) * distance_of<C>(p, sample, sums[sample]);
    if (p.reduction == Reduction::none) loss[sample] = static_cast<C>(value);
    total = total + scale * value;
  }
  return total;
}

template <class C>
void finish(const PseudoHuber& p, const double* sums, C* loss) {
  double scale = 1.0, total = store_values(p, sums, scale, loss);
  if (p.reduction == Reduction::none) return;
  const bool mean = p.reduction == Reduction::mean;
  if (mean && overflows(total)) {
    scale = kForMeans;
    total = store_values(p, sums, scale, loss);
  }
  loss[0] = static_cast<C>((mean ? total / static_cast<double>(p.layout.batch) : total) / scale);
}

// The samples' sums, from those of their chunks; with one chunk they are the same.
template <class C>
void finish_sums(const PseudoHuber& p, const double* partial, double* results) {
  const int64_t chunks = sum_chunks(p.layout);
  for (int64_t sample = 0; chunks != 1 && sample < p.layout.batch; ++sample) {
    double total = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total = add_sums<C>(p, total, partial[sample * chunks + chunk]);
    results[sample] = total;
  }
}

void add_up(PseudoHuber& p, void* value, double* results, void (*kernel)(const PseudoHuber&, int64_t, int64_t)) {
  const int64_t chunks = sum_chunks(p.layout), batch = p.layout.batch;
  std::vector<double> partial(chunks > 1 ? static_cast<size_t>(batch * chunks) : 0);
  p.sums = chunks > 1 ? partial.data() : results;
  const int64_t items = batch * chunks;
  if (items > 0) {
    const int64_t per_item = p.layout.elements < kUnitsPerSum * kChunk ? p.layout.elements : kUnitsPerSum * kChunk;
    Cpu::split_items(p, items, Cpu::kGrain / per_item + 1, kernel);
  }
  (p.float64 ? finish_sums<double> : finish_sums<float>)(p, partial.data(), results);
  p.sums = results;
  p.float64 ? finish(p, results, static_cast<double*>(value)) : finish(p, results, static_cast<float*>(value));
}

}  // namespace

void Cpu::sums(PseudoHuber& p, void* loss, double* sums) { add_up(p, loss, sums, active_kernels().pseudo_huber); }

void Cpu::sums(PseudoHuber& p, const Tensor& loss, double* results) { sums(p, loss.data_ptr(), results); }

void Cpu::sums(PseudoHuber& p, const Tensor& loss, const Tensor& results) {
  sums(p, loss, static_cast<double*>(results.data_ptr()));
}

void Cpu::gradients(const PseudoHuber& p, const Tensor&) {
  split(p, p.layout, kGrain, active_kernels().pseudo_huber_gradient);
}

// A gradient that needs the sums of several chunks takes a second pass, in which all threads share a sample.
void Cpu::sums_and_gradients(PseudoHuber& p, void* loss, double* sums) {
  const Kernels& kernels = active_kernels();
  const bool at_once = gradient_follows_sum(p);
  add_up(p, loss, sums, at_once ? kernels.pseudo_huber_with_gradient : kernels.pseudo_huber);
  if (!at_once) gradients(p, Tensor());
}

void Cpu::sums_and_gradients(PseudoHuber& p, const Tensor& loss, double* sums) {
  sums_and_gradients(p, loss.data_ptr(), sums);
}

void Cpu::scale(const KeptGradient& p, const Tensor&) { split(p, p.layout, kGrain, active_kernels().scale_gradient); }

}  // namespace bicm

STABLE_TORCH_LIBRARY_IMPL(bicm_kernels, CPU, library) { bicm::register_pseudo_huber<bicm::Cpu>(library); }
