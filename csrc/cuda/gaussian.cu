// Gaussian policies. A sample is divided into chunks, and a chunk into cells of eight elements, which depend on its
// size only: for any memory layout, a thread sums the same cells in the same order, so that a step and the density of
// its result agree to the bit. The block that finishes last adds the chunks of every sample, in order.
#include "../core/gaussian.h"

#include "affine.h"
#include "draw.h"
#include "kernels.h"
#include "pseudo_huber_sample.h"
#include "strided.h"

namespace bicm {
namespace cuda {
namespace {

constexpr int kCell = 8;
constexpr int64_t kGaussianChunk = 8192;  // elements that one block sums

struct Totals {
  double* chunk_sums;
  unsigned* finished;  // null where every sample is one chunk, which its block finishes
  int64_t chunks;
};

// Values shared by the elements of a sample.
template <class C>
struct Shared {
  C weight[kMaxTerms];
  C guidance_scale, noise_weight;
};

template <class C>
BICM_DEVICE Shared<C> shared_of(const Gaussian& g, int64_t sample) {
  Shared<C> s = {};
  form_weights(g, sample, s.weight);
  if (g.guided) s.guidance_scale = load_number<C>(g.guidance_scale, sample);
  if (g.draws) s.noise_weight = load_number<C>(g.noise_weight, sample);
  return s;
}

// Rounded to a tensor's dtype.
BICM_DEVICE float round_as(DType dtype, float x) {
  switch (dtype) {
    case DType::float16: return value_of(round_to<Half>(x));
    case DType::bfloat16: return value_of(round_to<BFloat16>(x));
    default: return x;
  }
}
BICM_DEVICE double round_as(DType dtype, double x) {
  switch (dtype) {
    case DType::float64: return x;
    case DType::float32: return static_cast<double>(static_cast<float>(x));
    default: return static_cast<double>(round_as(dtype, static_cast<float>(x)));
  }
}

template <class Memory, class C>
BICM_DEVICE void load_group(const Gaussian& g, const Operand& x, const typename Memory::Place& place, C* values) {
  Memory::widen(x, Memory::load(g.layout, x, place), values);
}

// The residuals of a group; a step stores its next state.
template <class Memory>
BICM_DEVICE void residual(const Gaussian& g, const Shared<typename Memory::Compute>& s, const SampleKey& key,
                          const typename Memory::Place& place, typename Memory::Compute* r) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  C mean[G] = {}, x[G], other[G] = {};
  BICM_UNROLL(5)
  for (int k = 0; k < kMaxTerms; ++k) {
    if (k >= g.terms) continue;
    load_group<Memory>(g, g.input[k], place, x);
    if (g.guided && k == g.terms - 1) {
      C partner[G];
      load_group<Memory>(g, g.conditional, place, partner);
      BICM_UNROLL(8)
      for (int i = 0; i < G; ++i) x[i] = guide(x[i], partner[i], s.guidance_scale);
    }
    fold<G>(k == 0, s.weight[k], x, mean);
    if (g.diverges) {
      load_group<Memory>(g, g.reference[k], place, x);
      fold<G>(k == 0, s.weight[k], x, other);
    }
  }
  if (g.steps) {
    float drawn[G] = {};
    if (s.noise_weight != C(0)) draw<Distribution::normal, G>(key, place.begin, drawn);
    BICM_UNROLL(8)
    for (int i = 0; i < G; ++i) {
      const C noisy = s.noise_weight != C(0) ? mean[i] + s.noise_weight * static_cast<C>(drawn[i]) : mean[i];
      other[i] = round_as(g.out.dtype, noisy);
    }
    Memory::store(g.layout, g.out, place, other);
  } else if (!g.diverges) {
    load_group<Memory>(g, g.next, place, other);
  }
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) r[i] = other[i] - mean[i];
}

template <class Memory>
BICM_DEVICE void store_gradients(const Gaussian& g, const Pull<typename Memory::Compute>& pull,
                                 const typename Memory::Place& place, const typename Memory::Compute* r) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  BICM_UNROLL(10)
  for (int k = 0; k < kGaussianInputs; ++k) {
    if (!g.wanted[k]) continue;
    C gradient[G];
    BICM_UNROLL(8)
    for (int i = 0; i < G; ++i) gradient[i] = pull.factor[k] * (r[i] * pull.power);
    Memory::store(g.layout, g.gradient[k], place, gradient);
  }
}

// Values shared by a sample's gradients; one thread computes them in double precision, the others use them in C.
template <class C>
BICM_DEVICE Pull<C> shared_pull(const Gaussian& g, int64_t sample, const C* weight) {
  BICM_SHARED(C, shared, kGaussianInputs + 1);
  if (threadIdx.x == 0) {
    // The index is a run-time value, which registers do not support.
    for (int k = 0; k < kGaussianInputs; ++k) shared[k] = C(0);
    shared[kGaussianInputs] = form_pull(g, sample, weight, shared);
  }
  __syncthreads();
  Pull<C> pull;
  pull.power = shared[kGaussianInputs];
  BICM_UNROLL(10)
  for (int k = 0; k < kGaussianInputs; ++k) pull.factor[k] = shared[k];
  __syncthreads();  // the next sample's is written there
  return pull;
}

// The squares of a cell, added up in pairs; its gradients on the way.
template <class Memory>
BICM_DEVICE typename Memory::Compute sum_cell(const Gaussian& g, const Shared<typename Memory::Compute>& s,
                                              const Pull<typename Memory::Compute>& pull, const SampleKey& key,
                                              int64_t sample, int64_t begin, bool aligned) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  C squares[kCell] = {};
  BICM_UNROLL(8)
  for (int at = 0; at < kCell; at += G) {
    if (begin + at >= g.layout.elements) continue;
    const typename Memory::Place place = Memory::at(g.layout, sample, begin + at, aligned);
    C r[G];
    residual<Memory>(g, s, key, place, r);
    if (g.differentiates) store_gradients<Memory>(g, pull, place, r);
    BICM_UNROLL(8)
    for (int i = 0; i < G; ++i) squares[at + i] = begin + at + i < g.layout.elements ? r[i] * r[i] : C(0);
  }
  BICM_UNROLL(3)
  for (int half = kCell / 2; half > 0; half /= 2) {
    BICM_UNROLL(4)
    for (int i = 0; i < kCell / 2; ++i) {
      if (i < half) squares[i] = squares[i] + squares[i + half];
    }
  }
  return squares[0];
}

template <class C>
BICM_DEVICE void finish_sample(const Gaussian& g, int64_t sample, double sum) {
  store_at(static_cast<C*>(g.results) + sample, static_cast<C>(density_of<C>(g, sample, sum)));
}

// Minimum blocks per multiprocessor: as many as leave each thread enough registers.
template <class Memory>
constexpr int kResident = Memory::kGroup == 1 || sizeof(typename Memory::Compute) == 8 ? 1 : 2;

template <class Memory>
__global__ void __launch_bounds__(kThreads, kResident<Memory>)
    gaussian_kernel(const __grid_constant__ Gaussian g, const __grid_constant__ Totals to, bool aligned) {
  using C = typename Memory::Compute;
  const int64_t items = g.layout.batch * to.chunks;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t sample = item / to.chunks, first = item % to.chunks * kGaussianChunk;
    const int64_t left = g.layout.elements - first, last = first + (left < kGaussianChunk ? left : kGaussianChunk);
    const Shared<C> s = shared_of<C>(g, sample);
    SampleKey key = {};
    if (s.noise_weight != C(0)) key = sample_key(g.key, sample);
    Pull<C> pull = {};
    if (g.differentiates) pull = shared_pull(g, sample, s.weight);
    Sum<C> sum = {};
    for (int64_t begin = first + threadIdx.x * kCell; begin < last; begin += blockDim.x * kCell) {
      sum = add(sum, {sum_cell<Memory>(g, s, pull, key, sample, begin, aligned), C(0)});
    }
    const double total = value_of(block_sum(sum));
    if (threadIdx.x != 0) continue;
    if (to.finished == nullptr) {
      finish_sample<C>(g, sample, total);
    } else {
      store_at(to.chunk_sums + item, total);
    }
  }
  if (to.finished == nullptr || !finishes_last(to.finished)) return;
  const Folded left = fold_sums(to.chunk_sums, g.layout.batch, to.chunks, [](double a, double b) { return a + b; });
  BICM_LOOP
  for (int64_t sample = threadIdx.x; sample < g.layout.batch; sample += blockDim.x) {
    double sum = 0.0;
    BICM_LOOP
    for (int64_t i = 0; i < left.count; ++i) {
      sum = sum + load_at(to.chunk_sums + sample * to.chunks + i * left.step);
    }
    finish_sample<C>(g, sample, sum);
  }
}

template <class Memory>
__global__ void __launch_bounds__(kThreads, kResident<Memory>)
    gaussian_gradient_kernel(const __grid_constant__ Gaussian g, bool aligned) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  for (int64_t sample = blockIdx.y; sample < g.layout.batch; sample += gridDim.y) {
    const Shared<C> s = shared_of<C>(g, sample);
    const Pull<C> pull = shared_pull(g, sample, s.weight);
    for (int64_t begin = first_group() * G; begin < g.layout.elements; begin += group_stride() * G) {
      const typename Memory::Place place = Memory::at(g.layout, sample, begin, aligned);
      C r[G];
      residual<Memory>(g, s, SampleKey{}, place, r);
      store_gradients<Memory>(g, pull, place, r);
    }
  }
}

template <class Memory>
cudaError_t run_sums(const Gaussian& g, const Totals& to, bool aligned, cudaStream_t stream) {
  Grid grid;
  const cudaError_t error = plan_blocks(g.layout.batch * to.chunks, gaussian_kernel<Memory>, grid);
  if (error != cudaSuccess) return error;
  const int64_t longest = g.layout.elements < kGaussianChunk ? g.layout.elements : kGaussianChunk;
  const int64_t warps = divide_up(divide_up(longest, kCell), kLanesOfWarp), most = kThreads / kLanesOfWarp;
  grid.threads = static_cast<unsigned>((warps < 1 ? 1 : warps < most ? warps : most) * kLanesOfWarp);
  grid.synchronises = true;
  return launch(gaussian_kernel<Memory>, grid, stream, g, to, aligned);
}

template <class Memory>
cudaError_t run_gradient(const Gaussian& g, const Totals&, bool aligned, cudaStream_t stream) {
  Grid grid;
  const cudaError_t error = plan(g.layout, Memory::kGroup, gaussian_gradient_kernel<Memory>, grid);
  if (error != cudaSuccess) return error;
  grid.synchronises = true;
  return launch(gaussian_gradient_kernel<Memory>, grid, stream, g, aligned);
}

struct Sums {
  template <class Memory>
  static constexpr auto kernel = run_sums<Memory>;
};
struct Gradients {
  template <class Memory>
  static constexpr auto kernel = run_gradient<Memory>;
};

template <class Visit>
void for_operands(const Gaussian& g, Visit visit) {
  for (int k = 0; k < g.terms; ++k) visit(g.input[k]);
  for (int k = 0; g.diverges && k < g.terms; ++k) visit(g.reference[k]);
  if (g.guided) visit(g.conditional);
  if (!g.diverges) visit(g.steps ? g.out : g.next);
  for (int k = 0; k < kGaussianInputs; ++k) {
    if (g.wanted[k]) visit(g.gradient[k]);
  }
}

// Kernels for dense memory of up to 32 bits, of float64 alone, and for any other.
template <class Pass>
cudaError_t run(const Gaussian& g, const Totals& to, cudaStream_t stream) {
  bool dense = true, aligned = true, wide = true, narrow = true;
  for_operands(g, [&](const Operand& x) {
    dense = dense && x.dense;
    aligned = aligned && access_aligned(g.layout, x);
    wide = wide && x.dtype == DType::float64;
    narrow = narrow && x.dtype != DType::float64;
  });
  if (dense && narrow) return Pass::template kernel<Mixed>(g, to, aligned, stream);
  if (dense && wide) return Pass::template kernel<Packed<double>>(g, to, aligned, stream);
  const auto strided = g.float64 ? Pass::template kernel<Strided<double>> : Pass::template kernel<Strided<float>>;
  return strided(with_reciprocals(g), to, false, stream);
}

int64_t gaussian_chunks(const Layout& layout) {
  const int64_t chunks = divide_up(layout.elements, kGaussianChunk);
  return chunks < 1 ? 1 : chunks;
}

}  // namespace

int64_t gaussian_scratch(const Gaussian& g) {
  const int64_t chunks = gaussian_chunks(g.layout);
  return (chunks > 1 ? g.layout.batch * chunks : 0) + 1;
}

cudaError_t gaussian(const Gaussian& g, double* scratch, cudaStream_t stream) {
  if (g.layout.batch == 0) return cudaSuccess;
  Totals to = {scratch + 1, nullptr, gaussian_chunks(g.layout)};
  if (to.chunks > 1) {
    const cudaError_t error = prepare_counter(reinterpret_cast<unsigned*>(scratch), stream, to.finished);
    if (error != cudaSuccess) return error;
  }
  return run<Sums>(g, to, stream);
}

cudaError_t gaussian_gradient(const Gaussian& g, cudaStream_t stream) {
  if (g.layout.batch == 0 || g.layout.elements == 0) return cudaSuccess;
  return run<Gradients>(g, {}, stream);
}

}  // namespace cuda
}  // namespace bicm
