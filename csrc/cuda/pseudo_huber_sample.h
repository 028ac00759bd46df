// From a sample's sum to its distance, and to the loss of the batch, which the last block adds up.
#pragma once

#include "../core/pseudo_huber.h"

#include "counter.h"
#include "pseudo_huber_residual.h"

namespace bicm {
namespace cuda {

// The outputs: the loss in the compute type; the sums of chunks, which are the samples' sums where each has one
// chunk; and the number of blocks that have finished, or null where it is not needed.
struct Results {
  void* loss;
  double* chunk_sums;
  unsigned* finished;
  int64_t chunks;
};

BICM_DEVICE void store_loss(const PseudoHuber& p, const Results& to, int64_t i, double value) {
  if (p.float64) {
    store_at(static_cast<double*>(to.loss) + i, value);
  } else {
    store_at(static_cast<float*>(to.loss) + i, static_cast<float>(value));
  }
}

template <class C>
BICM_DEVICE double finish_sample(const PseudoHuber& p, const Results& to, int64_t sample, double sum) {
  store_at(p.sums + sample, sum);
  const double value = load_number<double>(p.weight, sample) * distance_of<C>(p, sample, sum);
  if (p.reduction == Reduction::none) store_loss(p, to, sample, value);
  return value;
}

template <class C>
BICM_DEVICE void finish_chunk(const PseudoHuber& p, const Results& to, int64_t sample, int64_t item, double sum) {
  if (to.finished == nullptr) {
    finish_sample<C>(p, to, sample, sum);
  } else {
    store_at(to.chunk_sums + item, sum);
  }
}

// Every sample's value from what is left of its chunks' sums; the values times a power of two, added up over the block.
template <class C>
BICM_DEVICE Sum<double> finish_samples(const PseudoHuber& p, const Results& to, const Folded& left, double scale) {
  Sum<double> total = {};
  BICM_LOOP
  for (int64_t first = threadIdx.x; first < p.layout.batch; first += kSerial * blockDim.x) {
    Sum<double> part = {};
    const int64_t end = first + kSerial * blockDim.x, last = end < p.layout.batch ? end : p.layout.batch;
    BICM_LOOP
    for (int64_t sample = first; sample < last; sample += blockDim.x) {
      double sum = 0.0;
      BICM_LOOP
      for (int64_t i = 0; i < left.count; ++i) {
        sum = add_sums<C>(p, sum, load_at(to.chunk_sums + sample * to.chunks + i * left.step));
      }
      part = add(part, {scale * finish_sample<C>(p, to, sample, sum), 0.0});
    }
    total = add(total, part);
  }
  return total;
}

template <class C>
BICM_DEVICE void finish_batch(const PseudoHuber& p, const Results& to) {
  const bool mean = p.reduction == Reduction::mean;
  const Folded left =
      fold_sums(to.chunk_sums, p.layout.batch, to.chunks, [&](double a, double b) { return add_sums<C>(p, a, b); });
  Sum<double> total = finish_samples<C>(p, to, left, 1.0);
  if (p.reduction == Reduction::none) return;
  double unit = 1.0;
  if constexpr (sizeof(C) == sizeof(double)) {
    if (mean && overflows(block_total(total))) {
      total = finish_samples<C>(p, to, left, kForMeans);
      unit = 1.0 / kForMeans;
    }
  }
  const double sum = value_of(block_sum(total));
  if (threadIdx.x == 0) store_loss(p, to, 0, (mean ? sum / static_cast<double>(p.layout.batch) : sum) * unit);
}

// Launches a kernel over a batch's chunks, or over its samples, whose chunks a cluster of so many blocks has.
template <class Memory>
cudaError_t run_chunks(void (*kernel)(const PseudoHuber, const Results, bool), const PseudoHuber& p, const Results& to,
                       bool aligned, cudaStream_t stream, unsigned cluster = 1) {
  Grid grid;
  const cudaError_t error =
      plan_blocks(cluster == 1 ? p.layout.batch * to.chunks : p.layout.batch, kernel, grid, cluster);
  if (error != cudaSuccess) return error;
  grid.threads = threads_of_chunk<Memory>(p.layout);
  grid.synchronises = true;
  return launch(kernel, grid, stream, p, to, aligned);
}

}  // namespace cuda
}  // namespace bicm
