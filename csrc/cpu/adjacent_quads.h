// Philox of adjacent quads of one sample in AVX-512 registers.
//
// Only the first word of a counter differs between them: half of the first two rounds is one number for all, the first
// round's products follow from one another by additions, and the last round works on whole vectors of 32-bit words.
#pragma once

#include "../core/keys.h"
#include "lanes.h"

#if defined(BICM_ISA_AVX512)

BICM_NAMESPACE_BEGIN

// Lane 4j + p of a vector works on quad (kLanes / 4) p + j of its block, see noise_block.h.
struct QuadProducts {
  uint64_t of[2][kLanes / 2];  // the first round's, in even lanes and in odd lanes
};
constexpr QuadProducts quad_products() {
  QuadProducts products = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    products.of[lane % 2][lane / 2] = static_cast<uint64_t>(kLanes / 4 * (lane % 4) + lane / 4) * kFirstMultiplier;
  }
  return products;
}
alignas(64) constexpr QuadProducts kQuadProducts = quad_products();

BICM_HD Words low_words(WideWords even, WideWords odd) {
  return (Words)_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, _MM_PERM_CCAA);
}
BICM_HD Words high_words(WideWords even, WideWords odd) {
  return (Words)_mm512_mask_shuffle_epi32((__m512i)odd, 0x5555, (__m512i)even, _MM_PERM_DDBB);
}
BICM_HD Words xor_three(Words a, Words b, uint32_t key) {
  return (Words)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, _mm512_set1_epi32(static_cast<int>(key)), 0x96);
}

struct AdjacentQuads {
  Key key;
  uint64_t first, second[2], third;  // what the first three rounds combine with words that differ

  // The quads of one call have their high word in common.
  BICM_HD AdjacentQuads(const SampleKey& k, int64_t quad) : key(k.key) {
    const uint32_t quad_high = static_cast<uint32_t>(static_cast<uint64_t>(quad) >> 32);
    uint32_t high, low, next_high, next_low;
    WordOps<uint32_t>::multiply_wide(k.sample, kSecondMultiplier, high, low);
    WordOps<uint32_t>::multiply_wide(high ^ quad_high ^ key.low, kFirstMultiplier, next_high, next_low);
    first = key.high ^ k.step;
    second[0] = key.of_round(1).low ^ low;
    second[1] = key.of_round(1).high ^ next_high;
    third = key.of_round(2).high ^ next_low;
  }

  // Of blocks of kLanes quads, side by side in their places.
  template <int Blocks>
  BICM_HD void write_bits(uint32_t quad, float* out) const {
    using Word = Group<WideWords, 2 * Blocks>;
    using Ops = WordOps<Word>;
    Word x0, x1, x2, x3, high0, high1, low0, low1;
    for (int i = 0; i < 2 * Blocks; ++i) {
      __builtin_memcpy(&x3.part[i], kQuadProducts.of[i % 2], sizeof(WideWords));
      x3.part[i] = x3.part[i] + static_cast<uint64_t>(quad + static_cast<uint32_t>(i / 2 * kLanes)) * kFirstMultiplier;
    }
    x2 = (x3 >> 32) ^ first;
    Ops::multiply_wide(x2, kSecondMultiplier, high1, x1);
    x0 = high1 ^ second[0];
    x2 = x3 ^ second[1];
    Ops::multiply_wide(x0, kFirstMultiplier, high0, low0);
    Ops::multiply_wide(x2, kSecondMultiplier, high1, low1);
    x0 = Ops::xor_three(high1, x1, key.of_round(2).low);
    x1 = low1;
    x2 = high0 ^ third;
    x3 = low0;
    BICM_UNROLL(10)
    for (int round = 3; round < kRounds - 1; ++round) {
      Ops::multiply_wide(x0, kFirstMultiplier, high0, low0);
      Ops::multiply_wide(x2, kSecondMultiplier, high1, low1);
      x0 = Ops::xor_three(high1, x1, key.of_round(round).low);
      x1 = low1;
      x2 = Ops::xor_three(high0, x3, key.of_round(round).high);
      x3 = low0;
    }
    Ops::multiply_wide(x0, kFirstMultiplier, high0, low0);
    Ops::multiply_wide(x2, kSecondMultiplier, high1, low1);
    const Key last = key.of_round(kRounds - 1);
    const auto low = [](const Word& x, int i) { return low_words(x.part[2 * i], x.part[2 * i + 1]); };
    const auto high = [](const Word& x, int i) { return high_words(x.part[2 * i], x.part[2 * i + 1]); };
    for (int i = 0; i < Blocks; ++i) {
      const Words bits[4] = {bicm::BICM_ISA::xor_three(high(low1, i), low(x1, i), last.low), low(low1, i),
                             bicm::BICM_ISA::xor_three(high(low0, i), low(x3, i), last.high), low(low0, i)};
      __builtin_memcpy(out + i * 4 * kLanes, bits, sizeof(bits));
    }
  }
};

BICM_NAMESPACE_END

#endif
