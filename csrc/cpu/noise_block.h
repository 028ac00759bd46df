// Keyed noise into a buffer, as many quads at a time as the instruction set has lanes.
#pragma once

#include "../core/noise.h"
#include "lanes.h"

BICM_NAMESPACE_BEGIN

constexpr int kNoiseBlock = 4 * kLanes;  // numbers written at a time

#if defined(BICM_VECTOR)

BICM_HD Floats interleave_low(Floats a, Floats b) {
#if defined(BICM_ISA_AVX512)
  return (Floats)_mm512_unpacklo_ps((__m512)a, (__m512)b);
#else
  return (Floats)_mm256_unpacklo_ps((__m256)a, (__m256)b);
#endif
}
BICM_HD Floats interleave_high(Floats a, Floats b) {
#if defined(BICM_ISA_AVX512)
  return (Floats)_mm512_unpackhi_ps((__m512)a, (__m512)b);
#else
  return (Floats)_mm256_unpackhi_ps((__m256)a, (__m256)b);
#endif
}
BICM_HD Floats pairs_low(Floats a, Floats b) {
#if defined(BICM_ISA_AVX512)
  return (Floats)_mm512_unpacklo_pd((__m512d)a, (__m512d)b);
#else
  return (Floats)_mm256_unpacklo_pd((__m256d)a, (__m256d)b);
#endif
}
BICM_HD Floats pairs_high(Floats a, Floats b) {
#if defined(BICM_ISA_AVX512)
  return (Floats)_mm512_unpackhi_pd((__m512d)a, (__m512d)b);
#else
  return (Floats)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
#endif
}

// Lane 4j + p of a vector works on quad (kLanes / 4) p + j of the block. With that order, transposing 4 x 4 inside
// each 128-bit part, which needs no crossing of parts, leaves every quad's numbers adjacent and in place.
BICM_HD WideWords quads(int64_t first, int odd) {
  constexpr int parts = kLanes / 4;
  WideWords offset;
  for (int i = 0; i < kLanes / 2; ++i) {
    const int lane = 2 * i + odd;
    offset[i] = static_cast<uint64_t>(parts * (lane % 4) + lane / 4);
  }
  return offset + static_cast<uint64_t>(first);
}

BICM_HD Quad<WideWords> random_quads(const SampleKey& k, WideWords quad) {
  const WideWords zero = {};
  return philox(Quad<WideWords>{{quad, quad >> 32, zero + k.sample, zero + k.step}}, k.key);
}

template <Distribution D>
BICM_HD void noise_block(const SampleKey& k, int64_t quad, float* out) {
  const Quad<WideWords> even = random_quads(k, quads(quad, 0));
  const Quad<WideWords> odd = random_quads(k, quads(quad, 1));
  Quad<Words> bits;
  for (int lane = 0; lane < 4; ++lane) {
    bits.lane[lane] = (Words)((even.lane[lane] & 0xFFFFFFFFull) | (odd.lane[lane] << 32));
  }
  Floats n[4];
  numbers_from_bits<D>(bits, n);
  const Floats low01 = interleave_low(n[0], n[1]), high01 = interleave_high(n[0], n[1]);
  const Floats low23 = interleave_low(n[2], n[3]), high23 = interleave_high(n[2], n[3]);
  const Floats rows[4] = {pairs_low(low01, low23), pairs_high(low01, low23), pairs_low(high01, high23),
                          pairs_high(high01, high23)};
  __builtin_memcpy(out, rows, sizeof(rows));
}

#else

template <Distribution D>
BICM_HD void noise_block(const SampleKey& k, int64_t quad, float* out) {
  numbers_from_bits<D>(random_quad(k, quad), out);
}

#endif

// Numbers `begin` to `begin + count` of a sample; begin is a multiple of 4, and the buffer has room for whole blocks.
template <Distribution D>
BICM_HD void fill_noise(const SampleKey& k, int64_t begin, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kNoiseBlock) noise_block<D>(k, (begin + i) / 4, out + i);
}

BICM_NAMESPACE_END
