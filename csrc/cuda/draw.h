// Keyed noise for a thread's group of adjacent elements: whole quads, or one element's lane of its quad.
#pragma once

#include <type_traits>

#include "../core/noise.h"
#include "launch.h"

namespace bicm {
namespace cuda {

// The keys of all rounds. The empty statement keeps the compiler from adding them up again for every quad.
BICM_DEVICE RoundKeys round_keys(const Key& key) {
  RoundKeys result;
  BICM_UNROLL(10)
  for (int i = 0; i < kRounds; ++i) {
    result.round[i] = key.of_round(i);
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(result.round[i].low), "+r"(result.round[i].high));
#endif
  }
  return result;
}

BICM_DEVICE bool differs(const Integer& integer) { return integer.data != nullptr && integer.stride != 0; }

BICM_DEVICE void take_key(const SampleKey& from, SampleKey& key) { key = from; }
BICM_DEVICE void take_key(const SampleKey& from, KeyOfSample<RoundKeys>& key) {
  key = {round_keys(from.key), from.sample, from.step};
}

// The keys of the samples that a block draws for, one after another: what they share is read for the first alone, where
// there are registers to keep it.
template <class Keys>
struct BlockKeys {
  KeyOfSample<Keys> key;
  bool varies;

  BICM_DEVICE explicit BlockKeys(const NoiseKey& noise)
      : key(), varies(differs(noise.seed) || differs(noise.step) || differs(noise.sample)) {}

  BICM_DEVICE void move_to(const NoiseKey& noise, int64_t sample, bool first) {
    if (first || varies || std::is_same_v<Keys, Key>) {
      take_key(sample_key(noise, sample), key);
    } else if (noise.counts) {
      key.sample += gridDim.y;
    }
  }
};

// Elements of a group that is not whole, for `for_groups`: four numbers are drawn at a time.
template <class Memory>
constexpr int kRestOfDrawn = Memory::kGroup > 1 ? 4 : 1;

template <Distribution D, int Group, class Keys>
BICM_DEVICE void draw(const KeyOfSample<Keys>& key, int64_t begin, float* drawn) {
  static_assert(Group == 1 || Group % 4 == 0, "a group is one element or whole quads");
  if constexpr (Group == 1) {
    float quad[4];
    numbers_from_bits<D>(random_quad(key, begin / 4), quad);
    const int lane = static_cast<int>(begin % 4);
    drawn[0] = lane < 2 ? (lane == 0 ? quad[0] : quad[1]) : (lane == 2 ? quad[2] : quad[3]);
  } else {
    BICM_UNROLL(2)
    for (int i = 0; i < Group; i += 4) numbers_from_bits<D>(random_quad(key, (begin + i) / 4), drawn + i);
  }
}

}  // namespace cuda
}  // namespace bicm
