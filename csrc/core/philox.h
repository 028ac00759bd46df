// Philox4x32-10 (Salmon, Moraes, Dror & Shaw, SC 2011), generic over the word that holds a lane.
//
// A word is uint32_t (one counter at a time), a vector of them, or a vector whose lanes hold a 32-bit word in the low half
// of 64 bits and arbitrary bits in the high half; WordOps of that type implements the multiplication.
#pragma once

#include "platform.h"

BICM_NAMESPACE_BEGIN

template <class Word>
struct Quad {
  Word lane[4];
};

constexpr int kRounds = 10;
constexpr uint32_t kFirstMultiplier = 0xD2511F53u, kSecondMultiplier = 0xCD9E8D57u;

struct Key {
  uint32_t low, high;
  BICM_HD Key of_round(int round) const { return {low + round * 0x9E3779B9u, high + round * 0xBB67AE85u}; }
};

// The keys of all rounds: in registers, they save a loop over counters two additions per round.
struct RoundKeys {
  Key round[kRounds];
  BICM_HD Key of_round(int i) const { return round[i]; }
};

BICM_HD Key make_key(int64_t seed) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

template <class Word>
struct WordOps;
template <>
struct WordOps<uint32_t> {
  BICM_HD static void multiply_wide(uint32_t a, uint32_t multiplier, uint32_t& high, uint32_t& low) {
#if defined(__CUDA_ARCH__)
    // nvcc would multiply 64-bit operands, and add the product of the upper half, which is 0.
    uint64_t product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(multiplier));
#else
    const uint64_t product = static_cast<uint64_t>(a) * multiplier;
#endif
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
  BICM_HD static uint32_t xor_three(uint32_t a, uint32_t b, uint32_t key) { return a ^ b ^ key; }
};

// `Keys` is Key or RoundKeys.
template <class Word, class Keys>
BICM_HD Quad<Word> philox(Quad<Word> counter, const Keys& keys) {
  using Ops = WordOps<Word>;
  Word x0 = counter.lane[0], x1 = counter.lane[1], x2 = counter.lane[2], x3 = counter.lane[3];
  BICM_UNROLL(10)
  for (int round = 0; round < kRounds; ++round) {
    const Key key = keys.of_round(round);
    Word high0, low0, high1, low1;
    Ops::multiply_wide(x0, kFirstMultiplier, high0, low0);
    Ops::multiply_wide(x2, kSecondMultiplier, high1, low1);
    x0 = Ops::xor_three(high1, x1, key.low);
    x1 = low1;
    x2 = Ops::xor_three(high0, x3, key.high);
    x3 = low0;
  }
  return {{x0, x1, x2, x3}};
}

// The seed for another purpose: the counter's last two words are all ones, which no draw of noise uses for both
// sample and step. The sign bit is cleared so that every library accepts the result as a seed.
BICM_HD int64_t fold_in(int64_t seed, int64_t data) {
  const Key d = make_key(data);
  const Quad<uint32_t> r = philox(Quad<uint32_t>{{d.low, d.high, 0xFFFFFFFFu, 0xFFFFFFFFu}}, make_key(seed));
  const uint64_t bits = (static_cast<uint64_t>(r.lane[1]) << 32) | r.lane[0];
  return static_cast<int64_t>(bits & 0x7FFFFFFFFFFFFFFFull);
}

BICM_NAMESPACE_END
