// Which groups of a row a thread moves: several in a round where there are more than threads, then one by one.
#pragma once

#include "memory.h"

namespace bicm {
namespace cuda {

// Groups between those that a thread moves in one round: a warp's lanes have adjacent ones. The distance is a constant,
// so that it is part of an access, and one address serves all of them.
constexpr int kApart = 32;

// In bytes, where all tensors have the same; otherwise 0.
template <class Memory>
constexpr int64_t kElementSize = 0;
template <class T>
constexpr int64_t kElementSize<Packed<T>> = sizeof(T);

// Whether a group is one access of every tensor, so that a thread may move several in a round.
template <class Memory>
constexpr bool kOneAccess = kElementSize<Memory> * Memory::kGroup == kAccess;

// The place of a round's group, from that of its first.
BICM_DEVICE RoundPlace in_round(const RoundPlace& place, int i) { return {place.offset + i * kApart * kAccess}; }
template <class Place>
BICM_DEVICE Place in_round(const Place& place, int) {
  return place;
}

// The calling thread's share of every row: rounds of several groups, from byte to byte, then whole, aligned groups one
// by one, from element to element. There are rounds where `in_rounds` asks for them and a row has more than half of one
// for every thread; what makes no whole round of a warp is one group each of some threads.
template <class Memory, int Groups = 1>
struct Share {
  int64_t first, stride, whole;
  int64_t offset, step, end;

  BICM_DEVICE Share(const Layout& layout, bool aligned, bool in_rounds = true)
      : first(first_group() * Memory::kGroup),
        stride(group_stride() * Memory::kGroup),
        whole(Memory::kGroup > 1 && aligned ? layout.elements - layout.elements % Memory::kGroup : 0),
        offset(0),
        step(0),
        end(0) {
    static_assert(Groups == 1 || kOneAccess<Memory>, "the groups of a round have different distances");
    if constexpr (Groups > 1) {
      constexpr int64_t kSize = kElementSize<Memory>, kDistance = kApart * Memory::kGroup;
      if (in_rounds && Groups * stride < 2 * whole && blockDim.x % kApart == 0) {
        const int64_t rounds = whole - whole % (Groups * kDistance);
        offset = (first + (first - first % kDistance) * (Groups - 1)) * kSize;
        step = Groups * stride * kSize;
        end = rounds * kSize;
      }
    }
  }

  // The first element of the groups that are moved one by one. After rounds it is computed: they need the registers.
  BICM_DEVICE int64_t single() const {
    if constexpr (Groups > 1) return first_group() * Memory::kGroup + end / kElementSize<Memory>;
    return first;
  }

  // The empty statement keeps the compiler from computing it again for every row, or round.
  BICM_DEVICE Share kept() const {
    Share share = *this;
#if defined(__CUDA_ARCH__)
    if (Groups == 1) asm volatile("" : "+l"(share.first));
    asm volatile("" : "+l"(share.stride), "+l"(share.whole));
    if (Groups > 1) asm volatile("" : "+l"(share.step), "+l"(share.end));
#endif
    return share;
  }
};

template <int Groups>
using GroupsOfRound = std::integral_constant<int, Groups>;

// Calls `step(memory, place, groups)` with every group of a row that the calling thread has: whole, aligned ones, about
// which nothing is asked, in rounds and one by one, then groups of `Rest` elements where a row is not aligned, or does
// not end with a whole group.
template <class Memory, int Rest, int Groups, class Step>
BICM_DEVICE void for_groups(const Layout& layout, int64_t sample, const Share<Memory, Groups>& share, Step step) {
  if (Memory::kGroup > 1) {
    if constexpr (Groups > 1) {
      for (int64_t offset = share.offset; offset < share.end; offset += share.step) {
        step(Memory{}, RoundPlace{offset}, GroupsOfRound<Groups>{});
      }
    }
    for (int64_t begin = share.single(); begin < share.whole; begin += share.stride) {
      step(Memory{}, Memory::in_row(layout, sample, begin, true), GroupsOfRound<1>{});
    }
    if (share.whole == layout.elements) return;
  }
  using Part = typename Memory::template Part<Rest>;
  BICM_LOOP
  for (int64_t begin = share.whole + first_group() * Rest; begin < layout.elements; begin += group_stride() * Rest) {
    step(Part{}, Part::in_row(layout, sample, begin, false), GroupsOfRound<1>{});
  }
}

}  // namespace cuda
}  // namespace bicm
