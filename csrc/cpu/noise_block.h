// Keyed noise into a buffer, as many quads at a time as the instruction set has lanes.
#pragma once

#include "../core/noise.h"
#include "adjacent_quads.h"

BICM_NAMESPACE_BEGIN

constexpr int kNoiseBlock = 4 * kLanes;  // numbers written at a time

#if defined(BICM_VECTOR)

BICM_HD Floats interleave_low(Floats a, Floats b) {
#if defined(BICM_ISA_AVX512)
  return (Floats)_mm512_unpacklo_ps((__m512)a, (__m512)b);
#elif defined(BICM_ISA_AVX2)
  return (Floats)_mm256_unpacklo_ps((__m256)a, (__m256)b);
#else
  return (Floats)vzip1q_f32((float32x4_t)a, (float32x4_t)b);
#endif
}
BICM_HD Floats interleave_high(Floats a, Floats b) {
#if defined(BICM_ISA_AVX512)
  return (Floats)_mm512_unpackhi_ps((__m512)a, (__m512)b);
#elif defined(BICM_ISA_AVX2)
  return (Floats)_mm256_unpackhi_ps((__m256)a, (__m256)b);
#else
  return (Floats)vzip2q_f32((float32x4_t)a, (float32x4_t)b);
#endif
}
BICM_HD Floats pairs_low(Floats a, Floats b) {
#if defined(BICM_ISA_AVX512)
  return (Floats)_mm512_unpacklo_pd((__m512d)a, (__m512d)b);
#elif defined(BICM_ISA_AVX2)
  return (Floats)_mm256_unpacklo_pd((__m256d)a, (__m256d)b);
#else
  return (Floats)vzip1q_f64((float64x2_t)a, (float64x2_t)b);
#endif
}
BICM_HD Floats pairs_high(Floats a, Floats b) {
#if defined(BICM_ISA_AVX512)
  return (Floats)_mm512_unpackhi_pd((__m512d)a, (__m512d)b);
#elif defined(BICM_ISA_AVX2)
  return (Floats)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
#else
  return (Floats)vzip2q_f64((float64x2_t)a, (float64x2_t)b);
#endif
}

// Lane 4j + p of a vector works on quad (kLanes / 4) p + j of the block. With that order, transposing 4 x 4 inside
// each 128-bit part, without crossing parts, leaves every quad's numbers adjacent and in place.

#if !defined(BICM_ISA_AVX512)

// As many of philox's words as have the counters of a vector's lanes: word w those of lanes kWords i + w.
constexpr int kWords = kLanes / kCounters;

// The first of them and the last, which may be the same, as a vector.
BICM_HD Words join(PhiloxWord first, PhiloxWord last) {
#if defined(BICM_ISA_AVX2)
  return (Words)_mm256_blend_epi32((__m256i)first, _mm256_slli_epi64((__m256i)last, 32), 0xAA);
#else
  (void)last;
  return first;
#endif
}

BICM_HD PhiloxWord quads(uint32_t first, int word) {
  constexpr int parts = kLanes / 4;
  PhiloxWord offset;
  for (int i = 0; i < kCounters; ++i) {
    const int lane = kWords * i + word;
    offset[i] = static_cast<uint32_t>(parts * (lane % 4) + lane / 4);
  }
  return offset + first;
}

struct AdjacentQuads {
  SampleKey key;
  uint32_t quad_high;

  BICM_HD AdjacentQuads(const SampleKey& k, int64_t quad)
      : key(k), quad_high(static_cast<uint32_t>(static_cast<uint64_t>(quad) >> 32)) {}

  // The bits of adjacent blocks.
  template <int Blocks>
  BICM_HD void write_bits(uint32_t quad, float* out) const {
    using Word = Group<PhiloxWord, kWords * Blocks>;
    const PhiloxWord zero = {};
    Quad<Word> counter;
    for (int i = 0; i < kWords * Blocks; ++i) {
      counter.lane[0].part[i] = quads(quad + static_cast<uint32_t>(i / kWords * kLanes), i % kWords);
      counter.lane[1].part[i] = zero + quad_high;
      counter.lane[2].part[i] = zero + key.sample;
      counter.lane[3].part[i] = zero + key.step;
    }
    const Quad<Word> r = philox(counter, key.key);
    for (int block = 0; block < Blocks; ++block) {
      for (int lane = 0; lane < 4; ++lane) {
        const int first = kWords * block, last = first + kWords - 1;
        const Words bits = join(r.lane[lane].part[first], r.lane[lane].part[last]);
        __builtin_memcpy(out + block * kNoiseBlock + lane * kLanes, &bits, sizeof(bits));
      }
    }
  }
};

#endif

template <Distribution D, int Blocks>
BICM_HD void bits_to_numbers(float* out) {
  Quad<Group<Words, Blocks>> bits;
  for (int block = 0; block < Blocks; ++block) {
    for (int lane = 0; lane < 4; ++lane) {
      __builtin_memcpy(&bits.lane[lane].part[block], out + block * kNoiseBlock + lane * kLanes, sizeof(Words));
    }
  }
  Group<Floats, Blocks> n[4];
  numbers_from_bits<D>(bits, n);
  for (int block = 0; block < Blocks; ++block) {
    const Floats low01 = interleave_low(n[0].part[block], n[1].part[block]);
    const Floats high01 = interleave_high(n[0].part[block], n[1].part[block]);
    const Floats low23 = interleave_low(n[2].part[block], n[3].part[block]);
    const Floats high23 = interleave_high(n[2].part[block], n[3].part[block]);
    const Floats rows[4] = {pairs_low(low01, low23), pairs_high(low01, low23), pairs_low(high01, high23),
                            pairs_high(high01, high23)};
    __builtin_memcpy(out + block * kNoiseBlock, rows, sizeof(rows));
  }
}

// Numbers `begin` to `begin + count` of a sample; begin is a multiple of a block, and the buffer has room for whole
// blocks. Two blocks at a time, and the numbers one iteration behind the bits: the processor computes both in parallel;
// a loop over a single block would be bound by latency.
template <Distribution D>
BICM_HD void fill_noise(const SampleKey& k, int64_t begin, int64_t count, float* out) {
  constexpr int kPair = 2 * kNoiseBlock;
  const AdjacentQuads adjacent(k, begin / 4);
  const uint32_t quad = static_cast<uint32_t>(begin / 4);
  const int64_t paired = (count + kNoiseBlock - 1) / kPair * kPair;
  if (paired > 0) {
    adjacent.write_bits<2>(quad, out);
    for (int64_t i = kPair; i < paired; i += kPair) {
      adjacent.write_bits<2>(quad + static_cast<uint32_t>(i / 4), out + i);
      bits_to_numbers<D, 2>(out + i - kPair);
    }
    bits_to_numbers<D, 2>(out + paired - kPair);
  }
  if (paired < count) {
    adjacent.write_bits<1>(quad + static_cast<uint32_t>(paired / 4), out + paired);
    bits_to_numbers<D, 1>(out + paired);
  }
}

#else

template <Distribution D>
BICM_HD void fill_noise(const SampleKey& k, int64_t begin, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kNoiseBlock) numbers_from_bits<D>(random_quad(k, (begin + i) / 4), out + i);
}

#endif

BICM_NAMESPACE_END
