// The numbers of torch's CPU generator, several words of its state at a time.
#include "../core/generator.h"

#include "../core/mersenne.h"
#include "kernels.h"
#include "lanes.h"

BICM_NAMESPACE_BEGIN

// torch draws with vectors on x86-64 alone; elsewhere its numbers are those of the C library's functions.
#if defined(BICM_ISA_AVX512) || defined(BICM_ISA_AVX2)

namespace {

constexpr int kBlock = 16;  // torch takes eight radii, then eight angles
constexpr int kPart = 2 * kLanes;
constexpr int kParts = kLanes / 4;  // independent vectors, as many as fit in registers
constexpr int kGroup = kParts * kPart;

static_assert(kMersenneWords % kLanes == 0 && kMersenneSpare >= kLanes && kChunk % kGroup == 0, "whole vectors");

template <class Vector, class T>
BICM_HD Vector load_words(const T* from) {
  Vector x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

// The next 624 words. The first ones are repeated after the last, where later ones read them.
inline void renew(Mersenne& state) {
  constexpr int behind = kMersenneWords - kMersenneFar;
  uint32_t* const x = state.words;
  for (int i = 0; i < kMersenneWords; i += kLanes) {
    const uint32_t* const far = i < behind ? x + i + kMersenneFar : x + i - behind;
    const Words made = mersenne_twist(load_words<Words>(x + i), load_words<Words>(x + i + 1), load_words<Words>(far));
    __builtin_memcpy(x + i, &made, sizeof(made));
    if (i < kMersenneSpare) __builtin_memcpy(x + kMersenneWords + i, &made, sizeof(made));
  }
  state.next = 0;
}

// `count` uniform numbers; writes up to a vector more.
inline void fill_uniform(Mersenne& state, float* out, int64_t count) {
  while (count > 0) {
    if (state.next == kMersenneWords) renew(state);
    const int64_t left = kMersenneWords - state.next;
    const int run = static_cast<int>(left < count ? left : count);
    for (int i = 0; i < run; i += kLanes) {
      const Floats u = generator_uniform<Floats>(mersenne_temper(load_words<Words>(state.words + state.next + i)));
      __builtin_memcpy(out + i, &u, sizeof(u));
    }
    state.next += run;
    out += run;
    count -= run;
  }
}

// From two blocks to their radii and angles, and back. Narrower vectors hold one or the other already.
#if defined(BICM_ISA_AVX512)
BICM_HD void swap_halves(Floats& a, Floats& b) {
  const __m512 low = _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44);
  b = (Floats)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xEE);
  a = (Floats)low;
}
#else
BICM_HD void swap_halves(Floats&, Floats&) {}
#endif

inline void normals_of(const float* u, float* out) {
  Group<Floats, kParts> first, second, cosine, sine;
  for (int i = 0; i < kParts; ++i) {
    first.part[i] = load_words<Floats>(u + i * kPart);
    second.part[i] = load_words<Floats>(u + i * kPart + kLanes);
    swap_halves(first.part[i], second.part[i]);
  }
  generator_normal(first, second, cosine, sine);
  for (int i = 0; i < kParts; ++i) {
    swap_halves(cosine.part[i], sine.part[i]);
    __builtin_memcpy(out + i * kPart, &cosine.part[i], sizeof(Floats));
    __builtin_memcpy(out + i * kPart + kLanes, &sine.part[i], sizeof(Floats));
  }
}

}  // namespace

bool generator_normals(Mersenne& state, float* out, int64_t count) {
  alignas(64) float u[kChunk + kLanes] = {};
  alignas(64) float last[kGroup];
  for (int64_t done = 0; done < count; done += kChunk) {
    const int64_t chunk = count - done < kChunk ? count - done : kChunk;
    fill_uniform(state, u, chunk);
    const int64_t blocks = chunk / kBlock * kBlock;
    int64_t i = 0;
    for (; i + kGroup <= blocks; i += kGroup) normals_of(u + i, out + done + i);
    if (i == blocks) continue;
    normals_of(u + i, last);
    __builtin_memcpy(out + done + i, last, static_cast<size_t>(blocks - i) * sizeof(float));
  }
  if (count % kBlock == 0) return true;
  // The rest of a block is the end of a block that is drawn again.
  fill_uniform(state, u, kBlock);
  normals_of(u, last);
  __builtin_memcpy(out + count - kBlock, last, kBlock * sizeof(float));
  return true;
}

#else

bool generator_normals(Mersenne&, float*, int64_t) { return false; }

#endif

BICM_NAMESPACE_END
