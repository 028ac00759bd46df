// Dense operands of any 16- or 32-bit floating type, a few vectors at a time, widened and rounded in registers. Staging
// (staging.h) serves every other tensor; for halves it writes and reads twice their bytes in the first-level cache.
#pragma once

#include "staging.h"

#if defined(BICM_VECTOR)

BICM_NAMESPACE_BEGIN

constexpr int kBlockVectors = 4;
constexpr int kBlock = kBlockVectors * kLanes;

typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));

struct Block {
  Floats part[kBlockVectors];
};

template <class Vector>
BICM_HD Vector load_vector(const void* from) {
  Vector x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

template <class Function>
BICM_HD Block each_part(Function function) {
  Block block;
  BICM_UNROLL(4)
  for (int i = 0; i < kBlockVectors; ++i) block.part[i] = function(i);
  return block;
}

// By instruction: the compiler's own conversions between words and halves take three times as many.
BICM_HD Floats widen_bfloat16(Shorts x) {
#if defined(BICM_ISA_AVX512)
  const Words words = (Words)_mm512_cvtepu16_epi32((__m256i)x);
#else
  const Words words = (Words)_mm256_cvtepu16_epi32((__m128i)x);
#endif
  return bit_cast<Floats>(words << 16);
}

// Rounded once, in the low half of every word.
BICM_HD Words to_bfloat16(Floats x) {
  const Words bits = bit_cast<Words>(x), high = bits >> 16;
  const Words rounded = (bits + 0x7FFFu + (high & 1u)) >> 16;
  const Words nan = (high & 0x8000u) | 0x7FC0u;
#if defined(BICM_ISA_AVX512)
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  return (Words)_mm512_mask_mov_epi32((__m512i)rounded, is_nan, (__m512i)nan);
#else
  const __m256 is_nan = _mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q);
  return (Words)_mm256_blendv_ps((__m256)rounded, (__m256)nan, is_nan);
#endif
}

BICM_HD void store_bfloat16(const Block& x, uint16_t* to) {
#if defined(BICM_ISA_AVX512)
  BICM_UNROLL(4)
  for (int i = 0; i < kBlockVectors; ++i) {
    _mm256_storeu_si256((__m256i*)(to + i * kLanes), _mm512_cvtepi32_epi16((__m512i)to_bfloat16(x.part[i])));
  }
#else
  BICM_UNROLL(4)
  for (int i = 0; i < kBlockVectors; i += 2) {
    // Quarters of the first vector and of the second take turns.
    const __m256i mixed = _mm256_packus_epi32((__m256i)to_bfloat16(x.part[i]), (__m256i)to_bfloat16(x.part[i + 1]));
    _mm256_storeu_si256((__m256i*)(to + i * kLanes), _mm256_permute4x64_epi64(mixed, 0xD8));
  }
#endif
}

// Elements `place` to `place + kBlock` after an address.
BICM_HD Block load_block(const void* data, DType dtype, int64_t place) {
  if (dtype == DType::float32) {
    const float* from = static_cast<const float*>(data) + place;
    return each_part([&](int i) { return load_vector<Floats>(from + i * kLanes); });
  }
  const uint16_t* from = static_cast<const uint16_t*>(data) + place;
  if (dtype == DType::bfloat16) {
    return each_part([&](int i) { return widen_bfloat16(load_vector<Shorts>(from + i * kLanes)); });
  }
  return each_part([&](int i) { return halves_to_floats(reinterpret_cast<const Half*>(from + i * kLanes)); });
}

// Non-temporal, aligned to whole vectors.
inline void stream_block(const Block& x, float* data) {
  BICM_UNROLL(4)
  for (int i = 0; i < kBlockVectors; ++i) {
#if defined(BICM_ISA_AVX512)
    _mm512_stream_ps(data + i * kLanes, (__m512)x.part[i]);
#else
    _mm256_stream_ps(data + i * kLanes, (__m256)x.part[i]);
#endif
  }
}

// Rounds once.
BICM_HD void store_block(const Block& x, void* data, DType dtype, int64_t place) {
  if (dtype == DType::bfloat16) return store_bfloat16(x, static_cast<uint16_t*>(data) + place);
  BICM_UNROLL(4)
  for (int i = 0; i < kBlockVectors; ++i) {
    const int64_t at = place + i * kLanes;
    if (dtype == DType::float32) {
      __builtin_memcpy(static_cast<float*>(data) + at, &x.part[i], sizeof(Floats));
    } else {
      floats_to_halves(x.part[i], static_cast<Half*>(data) + at);
    }
  }
}

// A unit of a dense operand of 16 or 32 bits. `streams`: written with non-temporal stores, vector by vector.
struct Run {
  void* data;
  DType dtype;
  bool streams;
};

inline bool is_run(const Operand& x) { return x.dense && x.dtype != DType::float64; }

inline Run run_of(const Operand& x, const Unit& unit) {
  const int64_t size = x.dtype == DType::float32 ? 4 : 2;
  return {static_cast<char*>(x.data) + (unit.sample * x.batch_stride + unit.begin) * size, x.dtype, false};
}

// Non-temporal stores write whole cache lines: from registers where they are aligned to lines, otherwise in one burst
// from a buffer, because stores between loads would flush partial lines.
inline Run target_of(const Operand& x, const Unit& unit, void* buffer) {
  const Run run = run_of(x, unit);
  if (!x.streams) return run;
  if (x.dtype == DType::float32 && reinterpret_cast<uintptr_t>(run.data) % 64 == 0) return {run.data, run.dtype, true};
  return {buffer, run.dtype, false};
}

// `kFloats`: all are known to be float32.
template <bool kFloats>
BICM_HD Block load_block(const Run& from, int64_t place) {
  return load_block(from.data, kFloats ? DType::float32 : from.dtype, place);
}

template <bool kFloats>
BICM_HD void store_block(const Block& x, const Run& to, int64_t place) {
  if (to.streams) return stream_block(x, static_cast<float*>(to.data) + place);
  store_block(x, to.data, kFloats ? DType::float32 : to.dtype, place);
}

inline void finish_run(const Operand& x, const Unit& unit, const Run& run, int64_t count) {
  if (!x.streams || run.streams) return;
  const int64_t size = x.dtype == DType::float32 ? 4 : 2;
  stream_bytes(static_cast<const unsigned char*>(run.data), static_cast<unsigned char*>(run_of(x, unit).data),
               count * size);
}

BICM_NAMESPACE_END

#endif
