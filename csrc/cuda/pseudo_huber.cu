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

// Adds a thread's squares as far as they make whole rounds, of groups that are loaded before the first is added; where
// the next group begins. A group is as far from the next as in the loop over single ones, which keeps their order.
template <class Memory, bool Denoises, class C>
BICM_DEVICE int64_t add_rounds(const PseudoHuber& p, const Preconditioning<C>& weights, const LossRows<Memory>& rows,
                               int64_t begin, int64_t whole, Sum<C>& sum) {
  constexpr int G = Memory::kGroup, kGroups = 2;
  constexpr int64_t kDistance = kThreads * kAccess;
  const int64_t end = whole * kElementSize<Memory> - (kGroups - 1) * kDistance;
  int64_t offset = begin * kElementSize<Memory>;
  BICM_LOOP
  for (; offset < end; offset += kGroups * kDistance) {
    Inputs<Memory> in[kGroups];
    BICM_UNROLL(8)
    for (int i = 0; i < kGroups; ++i) {
      in[i] = load_inputs<Memory, Denoises>(p.layout, rows, RoundPlace{offset + i * kDistance});
    }
    BICM_UNROLL(8)
    for (int i = 0; i < kGroups; ++i) {
      C r[G];
      residual_of<Memory, Denoises>(p, weights, in[i], r);
      sum = add(sum, {sum_of_terms<G>(r, G, false, C(0), C(1)), C(0)});
    }
  }
  return offset / kElementSize<Memory>;
}

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
    // The squares of the first try: `scale` is 1.
    if constexpr (kOneAccess<Memory>) {
      if (!elementwise && scale == C(1) && blockDim.x == kThreads) {
        begin = add_rounds<Memory, Denoises>(p, weights, rows, begin, whole, sum);
      }
    }
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
constexpr int kGradientBlocks = Denoises && Memory::kGroup > 4                      ? 2
                                : Denoises && sizeof(typename Memory::Compute) == 8 ? 3 - kFewerBlocks
                                : Denoises || !kOneAccess<Memory>                   ? 3
                                                                                    : 4 - kFewerBlocks;

// Groups that a thread moves in one round: 16 elements.
template <class Memory>
constexpr int kGroupsOfGradient = kOneAccess<Memory> ? 16 / Memory::kGroup : 1;

// A thread's first inputs are loaded while the sample's factor is computed. Of elementwise distances, whose code is
// long, a round has one group, and the next one's inputs are loaded while it is computed.
template <class Memory, bool Denoises>
__global__ void __launch_bounds__(kThreads, kGradientBlocks<Memory, Denoises>)
    gradient_kernel(const __grid_constant__ PseudoHuber p, bool aligned) {
  using C = typename Memory::Compute;
  using Part = typename Memory::template Part<1>;
  constexpr int G = Memory::kGroup, kGroups = kGroupsOfGradient<Memory>;
  const Layout& layout = p.layout;
  const bool elementwise = p.distance == Distance::elementwise;
  for (int64_t sample = blockIdx.y; sample < layout.batch; sample += gridDim.y) {
    const LossRows<Memory> rows = loss_rows<Memory, Denoises>(p, sample, true);
    Share<Memory, kGroups> share(layout, aligned, !elementwise);
    if (kGroups > 1) share = share.kept();
    const auto place = [&](int64_t begin) { return Memory::in_row(layout, sample, begin, true); };
    Inputs<Memory> in[kGroups] = {};
    const auto load = [&](const auto& place, auto groups) {
      BICM_UNROLL(8)
      for (int i = 0; i < decltype(groups)::value; ++i) {
        in[i] = load_inputs<Memory, Denoises>(layout, rows, in_round(place, i));
      }
    };
    const bool in_rounds = share.offset < share.end;
    const auto load_single = [&] {
      const int64_t begin = share.single();
      if (begin < share.whole) load(place(begin), GroupsOfRound<1>{});
    };
    if constexpr (kGroups > 1) {
      if (in_rounds) load(RoundPlace{share.offset}, GroupsOfRound<kGroups>{});
    }
    if (!in_rounds) load_single();
    const Factors<C> f = factors_of<C>(p, sample, threadIdx.x == 0 ? number_at<double>(p.sums, sample) : 0.0);
    if (f.anywhere) {
      store_gradients_anywhere<Memory, Denoises>(p, f, sample, first_group() * G, layout.elements, group_stride() * G,
                                                 aligned);
      continue;
    }
    if constexpr (kGroups > 1) {
      if (in_rounds) {
        int64_t offset = share.offset;
        for (;;) {
          C r[kGroups][G];
          BICM_UNROLL(8)
          for (int i = 0; i < kGroups; ++i) residual_of<Memory, Denoises>(p, f.weights, in[i], r[i]);
          store_gradients<Memory, Denoises, kGroups>(p, f, rows.gradient, RoundPlace{offset}, r);
          offset += share.step;
          if (offset >= share.end) break;
          load(RoundPlace{offset}, GroupsOfRound<kGroups>{});
        }
        load_single();
      }
    }
    for (int64_t begin = share.single(); begin < share.whole; begin += share.stride) {
      C r[1][G];
      residual_of<Memory, Denoises>(p, f.weights, in[0], r[0]);
      if (begin + share.stride < share.whole) load(place(begin + share.stride), GroupsOfRound<1>{});
      store_gradients<Memory, Denoises, 1>(p, f, rows.gradient, place(begin), r);
    }
    BICM_LOOP
    for (int64_t begin = share.whole + first_group(); begin < layout.elements; begin += group_stride()) {
      const typename Memory::Place at = Part::in_row(layout, sample, begin, false);
      C r[1][1];
      residual_of<Part, Denoises>(p, f.weights, load_inputs<Part, Denoises>(layout, rows, at), r[0]);
      store_gradients<Part, Denoises, 1>(p, f, rows.gradient, at, r);
    }
  }
}

template <class Memory, bool Denoises>
cudaError_t run_gradient(const PseudoHuber& p, const Results&, bool aligned, cudaStream_t stream) {
  const int groups = aligned && p.distance != Distance::elementwise ? kGroupsOfGradient<Memory> : 1;
  return run_elements<Memory>(gradient_kernel<Memory, Denoises>, p, aligned, stream, groups);
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
