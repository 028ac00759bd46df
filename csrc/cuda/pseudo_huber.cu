// Pseudo-Huber losses. Forward: a sample is cut into chunks, which depend on its size alone; a block sums a chunk, and
// the block that finishes last adds the chunks of every sample, and the samples, in order. Backward: elementwise, from
// the inputs read again and the sums of the forward pass.
#include "../core/pseudo_huber.h"

#include "block.h"
#include "kernels.h"
#include "strided.h"

namespace bicm {
namespace cuda {
namespace {

// Elements that one block sums: a sample of so many or fewer is one block's.
constexpr int64_t kSumChunk = 8192;

int64_t chunks_of(const Layout& layout) { return divide_up(layout.elements, kSumChunk); }

template <int G, class C>
BICM_DEVICE void subtract(const C* y, C* x) {
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) x[i] = x[i] - y[i];
}

// The residual of a group. All inputs are requested before the first is used.
template <class Memory, bool Denoises>
BICM_DEVICE void residual(const PseudoHuber& p, const Preconditioning<typename Memory::Compute>& weights,
                          const typename Memory::Place& place, typename Memory::Compute* r) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  const typename Memory::Raw prediction = Memory::load(p.layout, p.prediction, place);
  const typename Memory::Raw target = Memory::load(p.layout, p.target, place);
  typename Memory::Raw x = {};
  if (Denoises) x = Memory::load(p.layout, p.x, place);
  Memory::widen(p.prediction, prediction, r);
  C other[G];
  if (Denoises) {
    Memory::widen(p.x, x, other);
    BICM_UNROLL(8)
    for (int i = 0; i < G; ++i) r[i] = weights.c_skip * other[i] + weights.c_out * r[i];
  }
  Memory::widen(p.target, target, other);
  subtract<G>(other, r);
}

// The terms of a group's elements that exist, added up in pairs.
template <int G, class C>
BICM_DEVICE C sum_of_group(C* terms, int64_t count) {
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) terms[i] = i < count ? terms[i] : C(0);
  BICM_UNROLL(3)
  for (int half = G / 2; half > 0; half /= 2) {
    BICM_UNROLL(4)
    for (int i = 0; i < G / 2; ++i) {
      if (i < half) terms[i] = terms[i] + terms[i + half];
    }
  }
  return terms[0];
}

// Squares of float32 overflow above 1.8e19 and lose digits below 1e-19. Where a chunk's sum shows that they may have,
// they are taken again of residuals times a power of two: exact, and in float32 like everything that elements need.
constexpr double kLeastTrusted = 0x1p-100;
constexpr float kLarger = 0x1p96f, kSmaller = 0x1p-96f;

BICM_DEVICE bool trusted(double sum) { return sum >= kLeastTrusted && sum <= 0x1p128; }

template <class Memory, bool Denoises>
BICM_DEVICE double chunk_sum(const PseudoHuber& p, int64_t sample, int64_t first, int64_t last, bool aligned) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  const Preconditioning<C> weights = denoising_weights<C>(p, sample);
  const bool elementwise = p.distance == Distance::elementwise;
  const C c = elementwise ? load_number<C>(p.c, sample) : C(0);
  C scale = C(1);
  for (;;) {
    Sum<C> sum = {};
    for (int64_t begin = first + threadIdx.x * G; begin < last; begin += blockDim.x * G) {
      C r[G];
      residual<Memory, Denoises>(p, weights, Memory::at(p.layout, sample, begin, aligned), r);
      BICM_UNROLL(8)
      for (int i = 0; i < G; ++i) {
        const C scaled = r[i] * scale, square = scaled * scaled;
        r[i] = elementwise ? pseudo_huber_distance(square, c) : square;
      }
      sum = add(sum, {sum_of_group<G>(r, last - begin), C(0)});
    }
    const double total = block_total(sum);
    if (sizeof(C) == 8 || elementwise || (scale == C(1) && trusted(total))) return total;
    if (scale != C(1)) return total * (scale == kLarger ? 0x1p-192 : 0x1p192);
    scale = total < kLeastTrusted ? kLarger : kSmaller;
  }
}

// Where results go: the loss in the compute type; the sums of chunks, which are the samples' own where each has one
// chunk; and the number of blocks that have finished, or null where no block needs to know.
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

BICM_DEVICE double finish_sample(const PseudoHuber& p, const Results& to, int64_t sample, double sum) {
  store_at(p.sums + sample, sum);
  const double value = load_number<double>(p.weight, sample) * distance_of(p, sample, sum);
  if (p.reduction == Reduction::none) store_loss(p, to, sample, value);
  return value;
}

// Whether this block is the last to finish; then the others' sums can be read.
BICM_DEVICE bool finishes_last(unsigned* finished) {
  BICM_SHARED(bool, last, 1);
  if (threadIdx.x == 0) {
    __threadfence();
    last[0] = gridDim.x == 1 || add_to(finished, 1u) + 1 == gridDim.x;
    __threadfence();
  }
  __syncthreads();
  return last[0];
}

BICM_DEVICE void finish_batch(const PseudoHuber& p, const Results& to) {
  Sum<double> total = {};
  for (int64_t sample = threadIdx.x; sample < p.layout.batch; sample += blockDim.x) {
    double sum = 0.0;
    for (int64_t i = 0; i < to.chunks; ++i) sum = sum + load_at(to.chunk_sums + sample * to.chunks + i);
    total = add(total, {finish_sample(p, to, sample, sum), 0.0});
  }
  if (p.reduction == Reduction::none) return;
  const double sum = value_of(block_sum(total));
  const bool mean = p.reduction == Reduction::mean;
  if (threadIdx.x == 0) store_loss(p, to, 0, mean ? sum / static_cast<double>(p.layout.batch) : sum);
}

template <class Memory, bool Denoises>
__global__ void __launch_bounds__(kThreads, 3)
    pseudo_huber_kernel(const __grid_constant__ PseudoHuber p, const __grid_constant__ Results to, bool aligned) {
  const int64_t items = p.layout.batch * to.chunks;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t sample = item / to.chunks, first = item % to.chunks * kSumChunk, left = p.layout.elements - first;
    const int64_t last = first + (left < kSumChunk ? left : kSumChunk);
    const double sum = chunk_sum<Memory, Denoises>(p, sample, first, last, aligned);
    if (threadIdx.x != 0) continue;
    if (to.finished == nullptr) {
      finish_sample(p, to, sample, sum);
    } else {
      store_at(to.chunk_sums + item, sum);
    }
  }
  if (to.finished != nullptr && finishes_last(to.finished)) finish_batch(p, to);
}

// The chunks and the threads of a block, and so the order of a sum, come from the sample's size alone.
template <class Memory, bool Denoises>
cudaError_t run_sums(const PseudoHuber& p, const Results& to, bool aligned, cudaStream_t stream) {
  const int64_t longest = p.layout.elements < kSumChunk ? p.layout.elements : kSumChunk;
  const int64_t warps = divide_up(divide_up(longest, Memory::kGroup), kLanesOfWarp);
  const int64_t threads = warps < 1 ? kLanesOfWarp : warps * kLanesOfWarp < kThreads ? warps * kLanesOfWarp : kThreads;
  Grid grid;
  const cudaError_t error = plan_blocks(p.layout.batch * to.chunks, grid);
  if (error != cudaSuccess) return error;
  grid.threads = static_cast<unsigned>(threads);
  grid.synchronises = true;
  return launch(pseudo_huber_kernel<Memory, Denoises>, grid, stream, p, to, aligned);
}

// What the elements of a sample share in the backward pass.
template <class C>
struct Factors {
  Preconditioning<C> weights;
  C c, factor[kLossInputs];
};

// One thread computes in double precision what the others need in C.
template <class C>
BICM_DEVICE Factors<C> factors_of(const PseudoHuber& p, int64_t sample) {
  BICM_SHARED(double, shared, 2);
  if (threadIdx.x == 0) {
    shared[0] = factor_of(p, sample, number_at<double>(p.sums, sample));
    shared[1] = transition_of(p, sample);
  }
  __syncthreads();
  const double factor = shared[0];
  Factors<C> f;
  f.weights = denoising_weights<C>(p, sample);
  f.c = static_cast<C>(shared[1]);
  f.factor[0] = static_cast<C>(factor * static_cast<double>(f.weights.c_out));
  f.factor[1] = static_cast<C>(-factor);
  f.factor[2] = static_cast<C>(factor * static_cast<double>(f.weights.c_skip));
  __syncthreads();  // the next sample's factor goes there
  return f;
}

template <class Memory, bool Denoises>
__global__ void __launch_bounds__(kThreads, 3) gradient_kernel(const __grid_constant__ PseudoHuber p, bool aligned) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  for (int64_t sample = blockIdx.y; sample < p.layout.batch; sample += gridDim.y) {
    const Factors<C> f = factors_of<C>(p, sample);
    for (int64_t begin = first_group() * G; begin < p.layout.elements; begin += group_stride() * G) {
      const typename Memory::Place place = Memory::at(p.layout, sample, begin, aligned);
      C r[G];
      residual<Memory, Denoises>(p, f.weights, place, r);
      if (p.distance == Distance::elementwise) {
        BICM_UNROLL(8)
        for (int i = 0; i < G; ++i) r[i] = r[i] / nonzero(root(r[i] * r[i] + f.c * f.c));
      }
      BICM_UNROLL(3)
      for (int k = 0; k < (Denoises ? 3 : 2); ++k) {
        if (!p.wanted[k]) continue;
        C gradient[G];
        BICM_UNROLL(8)
        for (int i = 0; i < G; ++i) gradient[i] = f.factor[k] * r[i];
        Memory::store(p.layout, p.gradient[k], place, gradient);
      }
    }
  }
}

template <class Memory, bool Denoises>
cudaError_t run_gradient(const PseudoHuber& p, const Results&, bool aligned, cudaStream_t stream) {
  Grid grid;
  const cudaError_t error = plan(p.layout, Memory::kGroup, grid);
  if (error != cudaSuccess) return error;
  grid.synchronises = true;
  return launch(gradient_kernel<Memory, Denoises>, grid, stream, p, aligned);
}

template <class Visit>
void for_operands(const PseudoHuber& p, Visit visit) {
  const Operand* const inputs[] = {&p.prediction, &p.target, &p.x};
  for (int k = 0; k < (p.denoises ? 3 : 2); ++k) {
    visit(*inputs[k]);
    if (p.wanted[k]) visit(p.gradient[k]);
  }
}

struct Sums {
  template <class Memory, bool Denoises>
  static constexpr auto kernel = run_sums<Memory, Denoises>;
};
struct Gradients {
  template <class Memory, bool Denoises>
  static constexpr auto kernel = run_gradient<Memory, Denoises>;
};

template <class Pass, class Memory>
cudaError_t run(const PseudoHuber& p, const Results& to, bool aligned, cudaStream_t stream) {
  return (p.denoises ? Pass::template kernel<Memory, true> : Pass::template kernel<Memory, false>)(p, to, aligned,
                                                                                                   stream);
}

template <class Pass>
cudaError_t run_pass(const PseudoHuber& p, const Results& to, cudaStream_t stream) {
  bool dense = true, uniform = true, aligned = true;
  for_operands(p, [&](const Operand& x) {
    dense = dense && x.dense;
    uniform = uniform && x.dtype == p.prediction.dtype;
    aligned = aligned && access_aligned(p.layout, x);
  });
  if (!dense || (p.float64 && !uniform)) {
    return (p.float64 ? run<Pass, Strided<double>> : run<Pass, Strided<float>>)(p, to, false, stream);
  }
  if (!uniform) return run<Pass, Mixed>(p, to, aligned, stream);
  switch (p.prediction.dtype) {
    case DType::float16: return run<Pass, Packed<Half>>(p, to, aligned, stream);
    case DType::bfloat16: return run<Pass, Packed<BFloat16>>(p, to, aligned, stream);
    case DType::float32: return run<Pass, Packed<float>>(p, to, aligned, stream);
    default: return run<Pass, Packed<double>>(p, to, aligned, stream);
  }
}

// Whether samples are finished where they are summed, so that no block waits for another.
bool finished_alone(const PseudoHuber& p) { return p.reduction == Reduction::none && chunks_of(p.layout) == 1; }

}  // namespace

int64_t pseudo_huber_scratch(const PseudoHuber& p) {
  const int64_t chunks = chunks_of(p.layout);
  return (chunks > 1 ? p.layout.batch * chunks : 0) + 1;
}

cudaError_t pseudo_huber(const PseudoHuber& p, void* loss, double* scratch, cudaStream_t stream) {
  if (p.layout.batch == 0 && p.reduction == Reduction::none) return cudaSuccess;
  Results to = {loss, p.sums, reinterpret_cast<unsigned*>(scratch), chunks_of(p.layout)};
  if (to.chunks > 1) to.chunk_sums = scratch + 1;
  if (finished_alone(p)) to.finished = nullptr;
  if (to.finished != nullptr && p.layout.batch * to.chunks > 1) {
    const cudaError_t error = cudaMemsetAsync(to.finished, 0, sizeof(*to.finished), stream);
    if (error != cudaSuccess) return error;
  }
  return run_pass<Sums>(p, to, stream);
}

cudaError_t pseudo_huber_gradient(const PseudoHuber& p, cudaStream_t stream) {
  if (p.layout.batch == 0 || p.layout.elements == 0) return cudaSuccess;
  return run_pass<Gradients>(p, {}, stream);
}

}  // namespace cuda
}  // namespace bicm
