// MT19937 (Matsumoto & Nishimura 1998), generic over a word that holds one or several of its 32-bit words.
#pragma once

#include "platform.h"

namespace bicm {

constexpr int kMersenneWords = 624;
constexpr int kMersenneFar = 397;  // x[k + 624] = x[k + 397] ^ twist of x[k] and x[k + 1]
constexpr int kMersenneSpare = 16;

// The state and the index of its next word; after the words, room for a copy of the first ones.
struct Mersenne {
  uint32_t words[kMersenneWords + kMersenneSpare];
  int32_t next;
};

}  // namespace bicm

BICM_NAMESPACE_BEGIN

template <class Word>
BICM_HD Word mersenne_twist(Word here, Word next, Word far) {
  const Word joined = (here & 0x80000000u) | (next & 0x7FFFFFFFu);
  return far ^ (joined >> 1) ^ (-(next & 1u) & 0x9908B0DFu);
}

template <class Word>
BICM_HD Word mersenne_temper(Word x) {
  x = x ^ (x >> 11);
  x = x ^ ((x << 7) & 0x9D2C5680u);
  x = x ^ ((x << 15) & 0xEFC60000u);
  return x ^ (x >> 18);
}

BICM_NAMESPACE_END
