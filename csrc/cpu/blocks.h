// Dense operands of any 16- or 32-bit floating type, a few vectors at a time, widened and rounded in registers. Staging
// (staging.h) serves every other tensor; for halves it writes and reads twice their bytes in the first-level cache.
#pragma once

#include "staging.h"

BICM_NAMESPACE_BEGIN

// What kernels in registers are compiled for: operands of one dtype, or of several; `none`: staging.
enum class Memory { none, floats, halves, bfloat16s, mixed };

// What serves all of the operands that were added.
class CommonMemory {
 public:
  void add(const Operand& x) {
#if defined(BICM_VECTOR)
    const bool serves = x.dense && x.dtype <= DType::float32;
    const Memory own = !serves                     ? Memory::none
                       : x.dtype == DType::float32 ? Memory::floats
                       : x.dtype == DType::float16 ? Memory::halves
                                                   : Memory::bfloat16s;
    const bool joins = memory_ != Memory::none && own != Memory::none;
    memory_ = first_ || own == memory_ ? own : joins ? Memory::mixed : Memory::none;
    first_ = false;
#else
    (void)x;
#endif
  }
  Memory memory() const { return memory_; }

 private:
  Memory memory_ = Memory::none;
  bool first_ = true;
};

inline Memory memory_for(const Operand& x) {
  CommonMemory common;
  common.add(x);
  return common.memory();
}

// As many elements of a sample as units before `end` have: whole samples need no units where nothing is buffered.
inline Unit run_at(const Layout& layout, int64_t unit, int64_t end) {
  Unit run = unit_at(layout, unit);
  const int64_t left = layout.elements - run.begin, most = (end - unit) * kChunk;
  run.count = left < most ? left : most;
  return run;
}
inline int64_t units_of(const Unit& run) { return (run.count + kChunk - 1) / kChunk; }

#if defined(BICM_VECTOR)

constexpr int kBlockVectors = 4;
constexpr int kBlock = kBlockVectors * kLanes;

struct Block {
  Floats part[kBlockVectors];
};

template <class Function>
BICM_HD Block each_part(Function function) {
  Block block;
  BICM_UNROLL(4)
  for (int i = 0; i < kBlockVectors; ++i) block.part[i] = function(i);
  return block;
}

// Adjacent elements of one type.
template <class T>
struct Dense {
  T* data;

  BICM_HD static Dense of(void* data, DType) { return {static_cast<T*>(data)}; }
  BICM_HD Dense with(void* other) const { return {static_cast<T*>(other)}; }
  BICM_HD auto* address(int64_t i) const { return data + i; }
  BICM_HD int64_t size() const { return sizeof(T); }

  BICM_HD float operator()(int64_t i) const { return widen(data[i]); }
  template <class Lanes>
  BICM_HD Floats lanes(int64_t i) const {
    return load_floats(data + i);
  }
  BICM_HD Block load(int64_t i) const {
    Block block;
    BICM_UNROLL(4)
    for (int j = 0; j < kBlockVectors; j += 2) {
      const Pair pair = load_pair(data + i + j * kLanes);
      block.part[j] = pair.first;
      block.part[j + 1] = pair.second;
    }
    return block;
  }
  // Returns what is in memory then.
  template <bool kStreams>
  BICM_HD Block store(const Block& x, int64_t i) const {
    Block rounded;
    BICM_UNROLL(4)
    for (int j = 0; j < kBlockVectors; j += 2) {
      const Pair pair = store_pair<kStreams>(x.part[j], x.part[j + 1], data + i + j * kLanes);
      rounded.part[j] = pair.first;
      rounded.part[j + 1] = pair.second;
    }
    return rounded;
  }
};

// The same of a type that is known at run time: for operands of different types.
struct Mixed {
  void* data;
  DType dtype;

  BICM_HD static Mixed of(void* data, DType dtype) { return {data, dtype}; }
  BICM_HD Mixed with(void* other) const { return {other, dtype}; }
  BICM_HD void* address(int64_t i) const { return static_cast<char*>(data) + i * size(); }
  BICM_HD int64_t size() const { return dtype == DType::float32 ? 4 : 2; }

  template <class Visit>
  BICM_HD auto visit(Visit visit) const {
    if (dtype == DType::float32) return visit(Dense<float>{static_cast<float*>(data)});
    if (dtype == DType::bfloat16) return visit(Dense<BFloat16>{static_cast<BFloat16*>(data)});
    return visit(Dense<Half>{static_cast<Half*>(data)});
  }
  BICM_HD float operator()(int64_t i) const {
    return visit([&](auto memory) { return memory(i); });
  }
  template <class Lanes>
  BICM_HD Floats lanes(int64_t i) const {
    return visit([&](auto memory) { return memory.template lanes<Lanes>(i); });
  }
  BICM_HD Block load(int64_t i) const {
    return visit([&](auto memory) { return memory.load(i); });
  }
  template <bool kStreams>
  BICM_HD Block store(const Block& x, int64_t i) const {
    return visit([&](auto memory) { return memory.template store<kStreams>(x, i); });
  }
};

// The place where a kernel's operands get types: calls visit with memory of the type that serves all of them.
template <class Visit>
BICM_HD void with_memory(Memory memory, Visit visit) {
  switch (memory) {
    case Memory::floats: return visit(Dense<float>{});
    case Memory::halves: return visit(Dense<Half>{});
    case Memory::bfloat16s: return visit(Dense<BFloat16>{});
    default: return visit(Mixed{});
  }
}

template <class M>
BICM_HD M memory_of(const Operand& x, const Unit& unit) {
  const int64_t place = unit.sample * x.batch_stride + unit.begin;
  return M::of(static_cast<char*>(x.data) + place * size_in_memory(x.dtype), x.dtype);
}

// An output. Non-temporal stores write whole cache lines: only where they are aligned to lines.
template <class M>
struct Target {
  M memory;
  bool streams;

  BICM_HD Block store(const Block& x, int64_t i) const {
#if defined(BICM_STREAMS)
    return streams ? memory.template store<true>(x, i) : memory.template store<false>(x, i);
#else
    return memory.template store<false>(x, i);
#endif
  }
};

template <class M>
BICM_HD Target<M> target_of(const Operand& x, const Unit& unit) {
  const M memory = memory_of<M>(x, unit);
  return {memory, x.streams && reinterpret_cast<uintptr_t>(memory.address(0)) % 64 == 0};
}

// With the same kind of memory as another operand.
template <class M>
BICM_HD Target<M> target_of(const M&, const Operand& x, const Unit& unit) {
  return target_of<M>(x, unit);
}

// The last elements of an operand, fewer than a block, in a block of their own.
struct Rest {
  alignas(64) unsigned char bytes[kBlock * sizeof(float)] = {};

  template <class M>
  M read(const M& from, int64_t i, int64_t count) {
    __builtin_memcpy(bytes, from.address(i), static_cast<size_t>(count * from.size()));
    return from.with(bytes);
  }
  template <class M>
  Target<M> room(const Target<M>& to) {
    return {to.memory.with(bytes), false};
  }
  template <class M>
  void write(const Target<M>& to, int64_t i, int64_t count) const {
    __builtin_memcpy(to.memory.address(i), bytes, static_cast<size_t>(count * to.memory.size()));
  }
};

// factor times adjacent elements; they may be the target itself.
template <class From, class To>
void scale_elements(float factor, const From& from, const Target<To>& to, int64_t count) {
  const auto scaled = [&](const Block& x) { return each_part([&](int j) { return factor * x.part[j]; }); };
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) to.store(scaled(from.load(i)), i);
  if (i == count) return;
  Rest read, written;
  written.room(to).store(scaled(read.read(from, i, count - i).load(0)), 0);
  written.write(to, i, count - i);
}

#endif

// factor times the unit's numbers: rounded in registers if the tensor is dense, otherwise in place or through a buffer.
template <class C>
void store_scaled(const Layout& layout, const Operand& to, const Unit& unit, C factor, const C* from, C* buffer) {
#if defined(BICM_VECTOR)
  if constexpr (Same<C, float>::value) {
    if (const Memory memory = memory_for(to); memory != Memory::none) {
      return with_memory(memory, [&](auto kind) {
        scale_elements(factor, Dense<const float>{from}, target_of<decltype(kind)>(to, unit), unit.count);
      });
    }
  }
#endif
  const bool in_place = is_compute_type<C>(to) && !to.streams;
  C* out = in_place ? static_cast<C*>(to.data) + unit.sample * to.batch_stride + unit.begin : buffer;
#pragma GCC ivdep
  for (int64_t i = 0; i < unit.count; ++i) out[i] = factor * from[i];
  if (!in_place) store_unit(layout, to, unit, out);
}

BICM_NAMESPACE_END
