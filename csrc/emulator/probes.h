// The components of the noise, for tests, once per instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../cpu/kernels.h"

// A probe returns its results through its arguments.
#define BICM_EACH_PROBE(PROBE)                                                    \
  PROBE(log_all, (const float* u, float* out, int64_t count))                     \
  PROBE(cos_sin_all, (const float* u, float* cosine, float* sine, int64_t count)) \
  /* Four words per counter. */                                                   \
  PROBE(philox_all, (int64_t seed, const uint32_t* counters, uint32_t* words, int64_t count))

#define BICM_DECLARE(name, arguments) void name arguments;
#define BICM_DECLARE_PROBES(isa) \
  namespace bicm {               \
  namespace isa {                \
  BICM_EACH_PROBE(BICM_DECLARE)  \
  }                              \
  }
BICM_EACH_ISA(BICM_DECLARE_PROBES)
#undef BICM_DECLARE

namespace bicm {

struct Probes {
#define BICM_FIELD(name, arguments) void(*name) arguments;
  BICM_EACH_PROBE(BICM_FIELD)
#undef BICM_FIELD
};

#define BICM_ENTRY(name, arguments) set::name,
#define BICM_PROBES_OF(isa)               \
  if (strcmp(name, #isa) == 0) {          \
    namespace set = isa;                  \
    return {BICM_EACH_PROBE(BICM_ENTRY)}; \
  }
// Those of the instruction set with this name.
inline Probes probes_of(const char* name) {
  BICM_EACH_ISA(BICM_PROBES_OF)
  return {};
}
#undef BICM_PROBES_OF
#undef BICM_ENTRY

}  // namespace bicm
