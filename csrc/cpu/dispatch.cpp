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

BICM_DECLARE_KERNELS(scalar)
#if defined(__x86_64__)
BICM_DECLARE_KERNELS(avx2)
BICM_DECLARE_KERNELS(avx512)
#endif

namespace bicm {
namespace {

#define BICM_ENTRY(Result, name, arguments) , name
#define BICM_TABLE_OF(isa)                             \
  [] {                                                 \
    using namespace isa;                               \
    return Kernels{#isa BICM_EACH_KERNEL(BICM_ENTRY)}; \
  }()

struct Candidate {
  Kernels kernels;
  bool (*supported)();
};

// Best first.
const Candidate candidates[] = {
#if defined(__x86_64__)
    {BICM_TABLE_OF(avx512),
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {BICM_TABLE_OF(avx2),
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma"); }},
#endif
    {BICM_TABLE_OF(scalar), [] { return true; }},
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
