// One table of kernels per instruction set, and the choice among them at run time.
#include <string.h>

#include "kernels.h"

#define BICM_DECLARE_KERNELS(isa)                                        \
  namespace bicm {                                                       \
  namespace isa {                                                        \
  void noise(const Noise&, int64_t, int64_t);                            \
  void noisy_pair(const NoisyPair&, int64_t, int64_t);                   \
  void multistep(const Multistep&, int64_t, int64_t);                    \
  void pseudo_huber(const PseudoHuber&, int64_t, int64_t);               \
  void pseudo_huber_gradient(const PseudoHuber&, int64_t, int64_t);      \
  void pseudo_huber_with_gradient(const PseudoHuber&, int64_t, int64_t); \
  void scale_gradient(const KeptGradient&, int64_t, int64_t);            \
  void reversible(const Reversible&, int64_t, int64_t);                  \
  void fixed_point_decode(const FixedPointDecode&, int64_t, int64_t);    \
  bool generator_normals(Mersenne&, float*, int64_t);                    \
  bool generator_skip(Mersenne&, int64_t);                               \
  void log_all(const float*, float*, int64_t);                           \
  void cos_sin_all(const float*, float*, float*, int64_t);               \
  void philox_all(int64_t, const uint32_t*, uint32_t*, int64_t);         \
  }                                                                      \
  }

#define BICM_KERNELS(isa)                 \
  {#isa,                                  \
   bicm::isa::noise,                      \
   bicm::isa::noisy_pair,                 \
   bicm::isa::multistep,                  \
   bicm::isa::pseudo_huber,               \
   bicm::isa::pseudo_huber_gradient,      \
   bicm::isa::pseudo_huber_with_gradient, \
   bicm::isa::scale_gradient,             \
   bicm::isa::reversible,                 \
   bicm::isa::fixed_point_decode,         \
   bicm::isa::generator_normals,          \
   bicm::isa::generator_skip,             \
   bicm::isa::log_all,                    \
   bicm::isa::cos_sin_all,                \
   bicm::isa::philox_all}

BICM_DECLARE_KERNELS(scalar)
#if defined(__x86_64__)
BICM_DECLARE_KERNELS(avx2)
BICM_DECLARE_KERNELS(avx512)
#endif

namespace bicm {
namespace {

struct Candidate {
  Kernels kernels;
  bool (*supported)();
};

// Best first.
const Candidate candidates[] = {
#if defined(__x86_64__)
    {BICM_KERNELS(avx512),
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {BICM_KERNELS(avx2),
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma"); }},
#endif
    {BICM_KERNELS(scalar), [] { return true; }},
};

}  // namespace

const Kernels* find_kernels(const char* name) {
  for (const Candidate& candidate : candidates) {
    const bool asked = name[0] == '\0' || strcmp(name, candidate.kernels.name) == 0;
    if (asked && candidate.supported()) return &candidate.kernels;
  }
  return nullptr;
}

}  // namespace bicm
