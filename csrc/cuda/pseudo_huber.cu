// Pseudo-Huber losses. Forward: a sample is divided into chunks, which depend only on its size; a block sums a chunk,
// and the block that finishes last adds the chunks of every sample, and the samples, in order. Backward: elementwise,
// from the inputs read again and the sums of the forward pass; or with the value, by pseudo_huber_resident.h where a
// sample fits on chip.
#include "../core/pseudo_huber.h"

#include "kernels.h"
#include "pseudo_huber_resident.h"
#include "pseudo_huber_weighed.h"
#include "strided.h"

namespace bicm {
namespace cuda {
namespace {

template <class Memory, bool Denoises>
BICM_DEVICE double chunk_sum(const PseudoHuber& p, int64_t sample, int64_t first, int64_t last, bool aligned) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  const Preconditioning<C> weights = denoising_weights<C>(p, sample);
  const bool elementwise = p.distance == Distance::elementwise;
  const LossRows<Memory> rows = loss_rows<Memory, Denoises>(p, sample, false);
  const int64_t whole = G > 1 && aligned ? last - (last - first) % G : first;
  return chunk_total<C>(p, sample, [&](C c, C scale) {
    if (elementwise && scale != C(1)) {
      return sum_anywhere<Memory, Denoises>(p, weights, sample, first, last, aligned, c, scale);
    }
    Sum<C> sum = {};
    int64_t begin = first + threadIdx.x * G;
    const auto add_group = [&](const typename Memory::Place& place, int64_t count) {
      C r[G];
      residual_of<Memory, Denoises>(p, weights, load_inputs<Memory, Denoises>(p.layout, rows, place), r);
      // Chosen once per group.
      const C terms =
          elementwise ? sum_of_terms<G>(r, count, true, c, scale) : sum_of_terms<G>(r, count, false, c, scale);
      sum = add(sum, {terms, C(0)});
    };
    for (; begin < whole; begin += blockDim.x * G) add_group(Memory::in_row(p.layout, sample, begin, true), G);
    BICM_LOOP
    for (; begin < last; begin += blockDim.x * G) {
      add_group(Memory::in_row(p.layout, sample, begin, false), last - begin);
    }
    return sum;
  });
}

template <class Memory, bool Denoises>
__global__ void __launch_bounds__(kThreads, 3)
    pseudo_huber_kernel(const __grid_constant__ PseudoHuber p, const __grid_constant__ Results to, bool aligned) {
  const int64_t items = p.layout.batch * to.chunks;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t sample = item / to.chunks, first = item % to.chunks * kSumChunk, left = p.layout.elements - first;
    const int64_t last = first + (left < kSumChunk ? left : kSumChunk);
    const double sum = chunk_sum<Memory, Denoises>(p, sample, first, last, aligned);
    if (threadIdx.x == 0) finish_chunk<typename Memory::Compute>(p, to, sample, item, sum);
  }
  if (to.finished != nullptr && finishes_last(to.finished)) finish_batch<typename Memory::Compute>(p, to);
}

template <class Memory, bool Denoises>
cudaError_t run_sums(const PseudoHuber& p, const Results& to, bool aligned, cudaStream_t stream) {
  return run_chunks<Memory>(pseudo_huber_kernel<Memory, Denoises>, p, to, aligned, stream);
}

// Minimum blocks per multiprocessor: as many as leave each thread enough registers.
template <class Memory, bool Denoises>
constexpr int kGradientBlocks = Denoises && (Memory::kGroup > 4 || sizeof(typename Memory::Compute) == 8) ? 2 : 3;

// A group's inputs are loaded while the sample's factor, or the group before, is computed.
template <class Memory, bool Denoises>
__global__ void __launch_bounds__(kThreads, kGradientBlocks<Memory, Denoises>)
    gradient_kernel(const __grid_constant__ PseudoHuber p, bool aligned) {
  using C = typename Memory::Compute;
  using Part = typename Memory::template Part<1>;
  constexpr int G = Memory::kGroup;
  const Layout& layout = p.layout;
  for (int64_t sample = blockIdx.y; sample < layout.batch; sample += gridDim.y) {
    const LossRows<Memory> rows = loss_rows<Memory, Denoises>(p, sample, true);
    const int64_t done = G > 1 && aligned ? layout.elements - layout.elements % G : 0;
    const int64_t first = first_group() * G, stride = group_stride() * G;
    const auto load = [&](int64_t begin) {
      return load_inputs<Memory, Denoises>(layout, rows, Memory::in_row(layout, sample, begin, true));
    };
    Inputs<Memory> next = {};
    if (first < done) next = load(first);
    const Factors<C> f = factors_of<C>(p, sample, threadIdx.x == 0 ? number_at<double>(p.sums, sample) : 0.0);
    if (f.anywhere) {
      store_gradients_anywhere<Memory, Denoises>(p, f, sample, first, layout.elements, stride, aligned);
      continue;
    }
    for (int64_t begin = first; begin < done; begin += stride) {
      C r[G];
      residual_of<Memory, Denoises>(p, f.weights, next, r);
      if (begin + stride < done) next = load(begin + stride);
      store_gradients<Memory, Denoises>(p, f, rows.gradient, Memory::in_row(layout, sample, begin, true), r);
    }
    BICM_LOOP
    for (int64_t begin = done + first_group(); begin < layout.elements; begin += group_stride()) {
      const typename Memory::Place place = Part::in_row(layout, sample, begin, false);
      C r[1];
      residual_of<Part, Denoises>(p, f.weights, load_inputs<Part, Denoises>(layout, rows, place), r);
      store_gradients<Part, Denoises>(p, f, rows.gradient, place, r);
    }
  }
}

template <class Memory, bool Denoises>
cudaError_t run_gradient(const PseudoHuber& p, const Results&, bool aligned, cudaStream_t stream) {
  return run_elements<Memory>(gradient_kernel<Memory, Denoises>, p, aligned, stream);
}

// Determines the traversal of memory, and with it the order of a sum.
struct Access {
  bool dense, uniform, aligned;
};

Access access_of(const PseudoHuber& p, bool with_gradients) {
  Access access = {true, true, true};
  const auto see = [&](const Operand& x) {
    access.dense = access.dense && x.dense;
    access.uniform = access.uniform && x.dtype == p.prediction.dtype;
    access.aligned = access.aligned && access_aligned(p.layout, x);
  };
  const Operand* const inputs[] = {&p.prediction, &p.target, &p.x};
  for (int k = 0; k < (p.denoises ? 3 : 2); ++k) {
    see(*inputs[k]);
    if (with_gradients && p.wanted[k]) see(p.gradient[k]);
  }
  if (p.weighs) see(p.element_weight);
  return access;
}

struct Sums {
  template <class Memory, bool Denoises>
  static constexpr auto kernel = run_sums<Memory, Denoises>;
};
struct Gradients {
  template <class Memory, bool Denoises>
  static constexpr auto kernel = run_gradient<Memory, Denoises>;
};
struct WeighedSums {
  template <class Memory, bool Denoises>
  static constexpr auto kernel = run_weighed_sums<Memory, Denoises>;
};
struct WeighedGradients {
  template <class Memory, bool Denoises>
  static constexpr auto kernel = run_weighed_gradient<Memory, Denoises>;
};
struct Resident {
  template <class Memory, bool Denoises>
  static constexpr auto kernel = run_resident<Memory, Denoises>;
};

template <class Pass, class Memory>
cudaError_t run(const PseudoHuber& p, const Results& to, bool aligned, cudaStream_t stream) {
  return (p.denoises ? Pass::template kernel<Memory, true> : Pass::template kernel<Memory, false>)(p, to, aligned,
                                                                                                   stream);
}

template <class Pass>
cudaError_t run_strided(const PseudoHuber& p, const Results& to, cudaStream_t stream) {
  return (p.float64 ? run<Pass, Strided<double>> : run<Pass, Strided<float>>)(with_reciprocals(p), to, false, stream);
}

template <class Pass>
cudaError_t run_pass(const PseudoHuber& p, const Results& to, const Access& access, cudaStream_t stream) {
  if (!access.dense || (p.float64 && !access.uniform)) {
    return run_strided<Pass>(p, to, stream);
  }
  if (!access.uniform) return run<Pass, Mixed>(p, to, access.aligned, stream);
  switch (p.prediction.dtype) {
    case DType::float16: return run<Pass, Packed<Half>>(p, to, access.aligned, stream);
    case DType::bfloat16: return run<Pass, Packed<BFloat16>>(p, to, access.aligned, stream);
    case DType::float32: return run<Pass, Packed<float>>(p, to, access.aligned, stream);
    default: return run<Pass, Packed<double>>(p, to, access.aligned, stream);
  }
}

// Weights of elements: fewer kernels, which check for halves at run time.
template <class Pass>
cudaError_t run_weighed(const PseudoHuber& p, const Results& to, const Access& access, cudaStream_t stream) {
  if (p.float64 || !access.dense || p.element_weight.dtype == DType::float64) return run_strided<Pass>(p, to, stream);
  const bool floats = access.uniform && p.prediction.dtype == DType::float32;
  return (floats ? run<Pass, Packed<float>> : run<Pass, Mixed>)(p, to, access.aligned, stream);
}

// Whether a block or a cluster can hold a sample's residuals, traversing memory in the order of the plain sums.
cudaError_t fits_on_chip(const PseudoHuber& p, const Access& inputs, const Access& all, bool& fits) {
  const bool wide = p.prediction.dtype == DType::float32 || p.prediction.dtype == DType::float64;
  const bool packed = !p.weighs && all.dense && (all.uniform ? wide : !p.float64);
  const unsigned blocks = blocks_of_sample(p);
  bool exact = true;
  for (int k = 0; k < kLossInputs; ++k) {
    exact = exact && (!p.wanted[k] || p.gradient[k].dtype == (p.float64 ? DType::float64 : DType::float32));
  }
  fits = packed && exact && all.uniform == inputs.uniform && blocks > 0 && p.layout.batch > 0 && p.layout.elements > 0;
  return fits && blocks > 1 ? has_clusters(fits) : cudaSuccess;
}

cudaError_t run_resident(const PseudoHuber& p, const Results& to, const Access& access, cudaStream_t stream) {
  if (!access.uniform) return run<Resident, Mixed>(p, to, access.aligned, stream);
  return (p.float64 ? run<Resident, Packed<double>> : run<Resident, Packed<float>>)(p, to, access.aligned, stream);
}

// Whether samples are finished where they are summed, so that no block waits for another.
bool finished_alone(const PseudoHuber& p) { return p.reduction == Reduction::none && chunks_of(p.layout) == 1; }

cudaError_t prepare(const PseudoHuber& p, void* loss, double* scratch, cudaStream_t stream, Results& to) {
  unsigned* const own = reinterpret_cast<unsigned*>(scratch);
  to = {loss, p.sums, finished_alone(p) ? nullptr : own, chunks_of(p.layout)};
  if (to.chunks > 1) to.chunk_sums = scratch + 1;
  const bool counts = to.finished != nullptr && p.layout.batch * to.chunks > 1;
  return counts ? prepare_counter(own, stream, to.finished) : cudaSuccess;
}

}  // namespace

int64_t pseudo_huber_scratch(const PseudoHuber& p) {
  const int64_t chunks = chunks_of(p.layout);
  return (chunks > 1 ? p.layout.batch * chunks : 0) + 1;
}

cudaError_t pseudo_huber(const PseudoHuber& p, void* loss, double* scratch, cudaStream_t stream) {
  if (p.layout.batch == 0 && p.reduction == Reduction::none) return cudaSuccess;
  Results to;
  const cudaError_t error = prepare(p, loss, scratch, stream, to);
  if (error != cudaSuccess) return error;
  return (p.weighs ? run_weighed<WeighedSums> : run_pass<Sums>)(p, to, access_of(p, false), stream);
}

cudaError_t pseudo_huber_gradient(const PseudoHuber& p, cudaStream_t stream) {
  if (p.layout.batch == 0 || p.layout.elements == 0) return cudaSuccess;
  return (p.weighs ? run_weighed<WeighedGradients> : run_pass<Gradients>)(p, {}, access_of(p, true), stream);
}

cudaError_t pseudo_huber_with_gradient(const PseudoHuber& p, void* loss, double* scratch, cudaStream_t stream) {
  const Access access = access_of(p, true);
  bool fits;
  cudaError_t error = fits_on_chip(p, access_of(p, false), access, fits);
  if (error != cudaSuccess) return error;
  if (!fits) {
    error = pseudo_huber(p, loss, scratch, stream);
    return error == cudaSuccess ? pseudo_huber_gradient(p, stream) : error;
  }
  Results to;
  error = prepare(p, loss, scratch, stream, to);
  return error == cudaSuccess ? run_resident(p, to, access, stream) : error;
}

cudaError_t scale_gradient(const KeptGradient& p, cudaStream_t stream) {
  if (p.layout.batch == 0 || p.layout.elements == 0) return cudaSuccess;
  const bool wide = p.gradient.dtype == DType::float64;
  if (!p.gradient.dense || size_in_bytes(p.gradient.dtype) < 4) {
    return (wide ? run_scale<Strided<double>> : run_scale<Strided<float>>)(with_reciprocals(p), stream);
  }
  return (wide ? run_scale<Packed<double>> : run_scale<Packed<float>>)(p, stream);
}

}  // namespace cuda
}  // namespace bicm
