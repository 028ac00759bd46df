// One table of kernels per instruction set, and the choice between them at run time.
#include <string.h>

#include "kernels.h"

#define BICM_DECLARE(Result, name, arguments) Result name arguments;
#define BICM_DECLARE_KERNELS(isa) \
  namespace bicm {                \
  namespace isa {                 \
  BICM_EACH_KERNEL(BICM_DECLARE)  \
  }                               \
  }
BICM_EACH_ISA(BICM_DECLARE_KERNELS)

namespace bicm {
namespace {

// Whether this processor has it.
bool has_scalar() { return true; }
#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#elif defined(__aarch64__)
bool has_neon() { return true; }  // every 64-bit Arm processor has
#endif

struct Candidate {
  Kernels kernels;
  bool (*supported)();
};

#define BICM_ENTRY(Result, name, arguments) , name
#define BICM_CANDIDATE(isa)                             \
  {[] {                                                 \
     using namespace isa;                               \
     return Kernels{#isa BICM_EACH_KERNEL(BICM_ENTRY)}; \
   }(),                                                 \
   has_##isa},
const Candidate candidates[] = {BICM_EACH_ISA(BICM_CANDIDATE)};

}  // namespace

const Kernels* find_kernels(const char* name) {
  const Kernels* best = nullptr;
  for (const Candidate& candidate : candidates) {
    const bool asked = name[0] == '\0' || strcmp(name, candidate.kernels.name) == 0;
    if (asked && candidate.supported()) best = &candidate.kernels;
  }
  return best;
}

}  // namespace bicm
