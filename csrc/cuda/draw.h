// Keyed noise for a thread's group of adjacent elements: whole quads, or one element's lane of its quad.
#pragma once

#include "../core/noise.h"
#include "launch.h"

namespace bicm {
namespace cuda {

// The keys of all rounds. The empty statement keeps the compiler from adding them up again for every quad.
BICM_DEVICE KeyOfSample<RoundKeys> with_round_keys(const SampleKey& key) {
  KeyOfSample<RoundKeys> result = {{}, key.sample, key.step};
  BICM_UNROLL(10)
  for (int i = 0; i < kRounds; ++i) {
    result.key.round[i] = key.key.of_round(i);
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(result.key.round[i].low), "+r"(result.key.round[i].high));
#endif
  }
  return result;
}

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
