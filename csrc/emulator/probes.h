// The components of the noise, for tests, once per instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

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
BICM_DECLARE_PROBES(scalar)
#if defined(__x86_64__)
BICM_DECLARE_PROBES(avx2)
BICM_DECLARE_PROBES(avx512)
#endif
#undef BICM_DECLARE

namespace bicm {

struct Probes {
#define BICM_FIELD(name, arguments) void(*name) arguments;
  BICM_EACH_PROBE(BICM_FIELD)
#undef BICM_FIELD
};

#define BICM_ENTRY(name, arguments) isa::name,
// Those of the instruction set with this name.
inline Probes probes_of(const char* name) {
#if defined(__x86_64__)
  if (strcmp(name, "avx512") == 0) {
    namespace isa = avx512;
    return {BICM_EACH_PROBE(BICM_ENTRY)};
  }
  if (strcmp(name, "avx2") == 0) {
    namespace isa = avx2;
    return {BICM_EACH_PROBE(BICM_ENTRY)};
  }
#endif
  namespace isa = scalar;
  return {BICM_EACH_PROBE(BICM_ENTRY)};
}
#undef BICM_ENTRY

}  // namespace bicm
