// A step of a group of elements, and the kernels: a kernel is made for the parts that a step may have, so that none
// reserves registers for the others.
#pragma once

#include "../core/multistep.h"

#include "affine.h"
#include "draw.h"
#include "rounds.h"

namespace bicm {
namespace cuda {

// Values shared by the elements of a sample.
template <class C>
struct Weights {
  C weight[kMaxTerms], x0_coefficient[kMaxTerms];
  C guidance_scale, noise_weight, x0_weight, clip, next_scale;
};

template <class C>
BICM_HD Weights<C> weights_of(const Multistep& m, int64_t sample) {
  Weights<C> w = {};
  form_weights(m, sample, w.weight);
  if (m.guided) w.guidance_scale = load_number<C>(m.guidance_scale, sample);
  if (m.draws) w.noise_weight = load_number<C>(m.noise_weight, sample);
  if (m.denoises) {
    BICM_UNROLL(8)
    for (int k = 0; k < kMaxTerms; ++k) {
      if (k < m.terms) w.x0_coefficient[k] = load_number<C>(m.x0_coefficient[k], sample);
    }
    w.x0_weight = load_number<C>(m.x0_weight, sample);
    if (m.clips) w.clip = load_number<C>(m.clip, sample);
  }
  if (m.scales) w.next_scale = next_scale<C>(m, sample);
  return w;
}

// When the weights are formed: on the host where all numbers are there, once by each block, or for every sample.
enum class Formed : int32_t { on_host, once, each };

// The parts of a step beside its sum. A kernel for all but x0, or for all, asks at run time which there are.
constexpr int kGuides = 1, kDraws = 2, kScales = 4, kDenoises = 8;
constexpr int kAnySum = kGuides | kDraws | kScales, kAnything = kAnySum | kDenoises;

template <int Parts, int Part>
BICM_DEVICE bool takes(bool asked) {
  constexpr bool any = Parts == kAnySum || Parts == kAnything || Part == kScales;
  return (Parts & Part) != 0 && (!any || asked);
}

// The sample's tensors.
template <class Row, int Slots>
struct Rows {
  Row input[Slots], conditional, out, x0, next;
};

template <int G, class C, class Keys>
BICM_DEVICE void add_noise(const KeyOfSample<Keys>& key, int64_t begin, C weight, C* y) {
  float drawn[G];
  draw<Distribution::normal, G>(key, begin, drawn);
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) y[i] = y[i] + weight * static_cast<C>(drawn[i]);
}

template <int G, class C>
BICM_DEVICE void add_denoised(bool clips, const Weights<C>& w, C* x0, C* y) {
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) {
    if (clips) x0[i] = clip_to(x0[i], w.clip);
    y[i] = y[i] + w.x0_weight * x0[i];
  }
}

// A group of every input, in flight until it is used.
template <class Memory, int Slots>
struct Loaded {
  typename Memory::Raw input[Slots], conditional;
};

// With Terms = 0 the number of terms is a run-time value; loops over terms have a constant end all the same, so that no
// register is indexed.
template <class Memory, int Terms, int Parts, class Rows, class Place>
BICM_DEVICE auto load_group(const Multistep& m, const Rows& rows, const Place& place) {
  constexpr int kSlots = Terms == 0 ? kMaxTerms : Terms;
  Loaded<Memory, kSlots> in = {};
  BICM_UNROLL(8)
  for (int k = 0; k < kSlots; ++k) {
    if (Terms != 0 || k < m.terms) in.input[k] = Memory::load(m.layout, rows.input[k], place);
  }
  if (takes<Parts, kGuides>(m.guided)) in.conditional = Memory::load(m.layout, rows.conditional, place);
  return in;
}

template <class Memory, int Terms, int Parts, int Slots, class Rows, class Keys, class Place>
BICM_DEVICE void step_group(const Multistep& m, const Rows& rows, const Weights<typename Memory::Compute>& w,
                            const KeyOfSample<Keys>& key, const Place& place, const Loaded<Memory, Slots>& in) {
  using C = typename Memory::Compute;
  constexpr int G = Memory::kGroup;
  const int terms = Terms == 0 ? m.terms : Terms;
  const bool guided = takes<Parts, kGuides>(m.guided);

  C x0[G] = {}, y[G] = {};
  BICM_UNROLL(8)
  for (int k = 0; k < Slots; ++k) {
    if (k >= terms) continue;
    C x[G];
    Memory::widen(rows.input[k], in.input[k], x);
    if (guided && k == terms - 1) {
      C partner[G];
      Memory::widen(rows.conditional, in.conditional, partner);
      BICM_UNROLL(8)
      for (int i = 0; i < G; ++i) x[i] = guide(x[i], partner[i], w.guidance_scale);
    }
    if (Parts & kDenoises) fold<G>(k == 0, w.x0_coefficient[k], x, x0);
    fold<G>(k == 0, w.weight[k], x, y);
  }
  if (Parts & kDenoises) {
    add_denoised<G>(m.clips, w, x0, y);
    Memory::store(m.layout, rows.x0, place, x0);  // here, so that the noise has its registers
  }
  if constexpr ((Parts & kDraws) != 0) {
    if (w.noise_weight != C(0)) add_noise<G>(key, place.begin, w.noise_weight, y);
  }

  Memory::store(m.layout, rows.out, place, y);
  if (takes<Parts, kScales>(m.scales)) {
    BICM_UNROLL(8)
    for (int i = 0; i < G; ++i) y[i] = w.next_scale * y[i];
    Memory::store(m.layout, rows.next, place, y);
  }
}

// Groups of a round whose inputs are loaded before the first is used.
constexpr int kAtOnce = 4;

template <class Memory, int Terms, int Parts, int Groups, class Rows, class Keys, class Place>
BICM_DEVICE void step_round(const Multistep& m, const Rows& rows, const Weights<typename Memory::Compute>& w,
                            const KeyOfSample<Keys>& key, const Place& place) {
  constexpr int kLoaded = Groups < kAtOnce ? Groups : kAtOnce;
  static_assert(Groups % kLoaded == 0, "the last groups of a round would be left out");
  BICM_UNROLL(8)
  for (int first = 0; first < Groups; first += kLoaded) {
    Loaded<Memory, Terms == 0 ? kMaxTerms : Terms> in[kLoaded];
    BICM_UNROLL(8)
    for (int i = 0; i < kLoaded; ++i) {
      in[i] = load_group<Memory, Terms, Parts>(m, rows, in_round(place, first + i));
    }
    BICM_UNROLL(8)
    for (int i = 0; i < kLoaded; ++i) {
      step_group<Memory, Terms, Parts>(m, rows, w, key, in_round(place, first + i), in[i]);
    }
  }
}

template <class Memory, int Terms, int Parts>
BICM_DEVICE auto rows_of(const Multistep& m, int64_t sample) {
  constexpr int kSlots = Terms == 0 ? kMaxTerms : Terms;
  Rows<typename Memory::Row, kSlots> rows = {};
  BICM_UNROLL(8)
  for (int k = 0; k < kSlots; ++k) rows.input[k] = Memory::row(m.input[k], sample);
  if (Parts & kGuides) rows.conditional = Memory::row(m.conditional, sample);
  if (Parts & kDenoises) rows.x0 = Memory::row(m.x0, sample);
  if (Parts & kScales) rows.next = Memory::row(m.next, sample);
  rows.out = Memory::row(m.out, sample);
  return rows;
}

// Minimum blocks per multiprocessor: as many as leave each thread enough registers.
template <class Memory, int Terms, int Parts>
constexpr int resident_blocks() {
  if (Terms == 0 || sizeof(typename Memory::Compute) == 8) return 2;
  if (Parts == 0) return Terms < 4 ? 5 : 4;
  return (Parts & kDenoises) == 0 || Memory::kGroup < 8 ? 4 : 4 - kFewerBlocks;
}

// Groups that a thread moves in one round; the fewer terms, the less arithmetic is beside its addresses.
template <class Memory, int Terms, int Parts>
constexpr int kGroupsOfRound = Terms == 0 || (Parts & ~kGuides) != 0 || !kOneAccess<Memory> ? 1
                               : Terms == 1 && Memory::kGroup == 4                          ? 24
                               : Terms == 1 || (Terms == 2 && Memory::kGroup == 4)          ? 4
                                                                                            : 2;

template <class Memory, int Terms, int Parts>
__global__ void __launch_bounds__(kThreads, resident_blocks<Memory, Terms, Parts>())
    multistep_kernel(const __grid_constant__ Multistep m,
                     const __grid_constant__ Weights<typename Memory::Compute> given, Formed formed, bool aligned) {
  using C = typename Memory::Compute;
  constexpr int kRest = (Parts & kDraws) != 0 ? kRestOfDrawn<Memory> : 1;
  Weights<C> w = given;
  // The keys of all rounds need registers that kernels of many tensors do not have.
  BlockKeys<std::conditional_t<(Parts & (kGuides | kDenoises)) != 0, Key, RoundKeys>> keys(m.key);
  constexpr bool kKeeps = (Parts & kDraws) != 0 && Terms == 1;  // there are registers enough
  using Share = Share<Memory, kGroupsOfRound<Memory, Terms, Parts>>;
  Share share(m.layout, aligned);
  if (kKeeps) share = share.kept();
  bool first = true;
  for (int64_t sample = blockIdx.y; sample < m.layout.batch; sample += gridDim.y) {
    if (formed == Formed::each || (formed == Formed::once && first)) w = weights_of<C>(m, sample);
    if ((Parts & kDraws) && m.draws) keys.move_to(m.key, sample, first);
    if (!kKeeps) share = Share(m.layout, aligned);
    const auto rows = rows_of<Memory, Terms, Parts>(m, sample);
    for_groups<Memory, kRest>(m.layout, sample, share, [&](auto memory, const auto& place, auto groups) {
      step_round<decltype(memory), Terms, Parts, decltype(groups)::value>(m, rows, w, keys.key, place);
    });
    first = false;
  }
}

}  // namespace cuda
}  // namespace bicm
