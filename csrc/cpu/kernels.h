// The CPU kernels of one instruction set. A kernel works on units [begin, end) of its problem; units are independent,
// so any split over threads gives the same bits.
#pragma once

#include "../core/gaussian.h"
#include "../core/mersenne.h"
#include "../core/multistep.h"
#include "../core/noise.h"
#include "../core/pseudo_huber.h"
#include "../core/reversible.h"

namespace bicm {

constexpr int64_t kChunk = 1024;  // elements of a unit: its buffers stay in the first-level cache

// Units of a partial sum. A sample's sum is a sum of these in order, which depends on its size alone.
constexpr int64_t kUnitsPerSum = 64;

// Every kernel: what it returns, its name and its arguments.
#define BICM_EACH_KERNEL(KERNEL)                                                                           \
  KERNEL(void, noise, (const Noise&, int64_t begin, int64_t end))                                          \
  KERNEL(void, noisy_pair, (const NoisyPair&, int64_t begin, int64_t end))                                 \
  KERNEL(void, multistep, (const Multistep&, int64_t begin, int64_t end))                                  \
  /* Of partial sums, these two and the first two of gaussian; the others: of units. */                    \
  KERNEL(void, pseudo_huber, (const PseudoHuber&, int64_t begin, int64_t end))                             \
  KERNEL(void, pseudo_huber_with_gradient, (const PseudoHuber&, int64_t begin, int64_t end))               \
  KERNEL(void, pseudo_huber_gradient, (const PseudoHuber&, int64_t begin, int64_t end))                    \
  KERNEL(void, scale_gradient, (const KeptGradient&, int64_t begin, int64_t end))                          \
  KERNEL(void, gaussian, (const Gaussian&, int64_t begin, int64_t end))                                    \
  KERNEL(void, gaussian_with_gradient, (const Gaussian&, int64_t begin, int64_t end))                      \
  KERNEL(void, gaussian_gradient, (const Gaussian&, int64_t begin, int64_t end))                           \
  KERNEL(void, reversible, (const Reversible&, int64_t begin, int64_t end))                                \
  KERNEL(void, fixed_point_decode, (const FixedPointDecode&, int64_t begin, int64_t end))                  \
  /* As torch.randn draws them, 16 numbers or more; false where the instruction set has nothing for it. */ \
  KERNEL(bool, generator_normals, (Mersenne & state, float* out, int64_t count))

// The instruction sets of this architecture, from the least to the best. CMakeLists.txt lists them too.
#if defined(__x86_64__)
#define BICM_EACH_ISA(ISA) ISA(scalar) ISA(avx2) ISA(avx512) ISA(avx512bf16)
#elif defined(__aarch64__)
#define BICM_EACH_ISA(ISA) ISA(scalar) ISA(neon)
#else
#define BICM_EACH_ISA(ISA) ISA(scalar)
#endif

struct Kernels {
  const char* name;
#define BICM_FIELD(Result, name, arguments) Result(*name) arguments;
  BICM_EACH_KERNEL(BICM_FIELD)
#undef BICM_FIELD
};

// The kernels of the instruction set with this name, or null where this build or this processor has none; an empty name
// selects the best.
const Kernels* find_kernels(const char* name);

inline int64_t units_per_sample(const Layout& layout) { return (layout.elements + kChunk - 1) / kChunk; }

inline int64_t sum_chunks(const Layout& layout) { return (units_per_sample(layout) + kUnitsPerSum - 1) / kUnitsPerSum; }

// Whether a gradient needs only one partial sum, so that both are formed while the inputs are in the cache.
inline bool gradient_follows_sum(const PseudoHuber& p) {
  return p.distance != Distance::vector || sum_chunks(p.layout) <= 1;
}

}  // namespace bicm
