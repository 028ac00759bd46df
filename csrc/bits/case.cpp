// Problems made of a number, and what is compared of them.
#include "case.h"

#include <stdlib.h>
#include <string.h>

#include "../core/half.h"

namespace bicm {
namespace bits {

namespace {

constexpr int64_t kGuard = 128;  // bytes before and after every memory

const char* name_of(DType dtype) {
  const char* const names[] = {"float16", "bfloat16", "float32", "float64", "int32", "int64"};
  return names[static_cast<int>(dtype)];
}

// The element's bits from a number, or any bits.
uint64_t element(DType dtype, double x) {
  switch (dtype) {
    case DType::float16: return float_to_half(static_cast<float>(x));
    case DType::bfloat16: return float_to_bfloat16(static_cast<float>(x));
    case DType::float32: return bit_cast<uint32_t>(static_cast<float>(x));
    default: return bit_cast<uint64_t>(x);
  }
}

uint64_t infinity_of(DType dtype) {
  const uint64_t bits[] = {0x7C00, 0x7F80, 0x7F800000, 0x7FF0000000000000};
  return bits[static_cast<int>(dtype)];
}
uint64_t sign_of(DType dtype) { return uint64_t{1} << (8 * size_of(dtype) - 1); }

uint64_t one_nan(DType dtype, uint64_t bits) {
  if (dtype > DType::float64) return bits;
  const uint64_t infinity = infinity_of(dtype);
  return (bits & ~sign_of(dtype)) > infinity ? infinity + 1 : bits;
}

}  // namespace

int64_t size_of(DType dtype) {
  const int64_t sizes[] = {2, 2, 4, 8, 4, 8};
  return sizes[static_cast<int>(dtype)];
}

void Case::Free::operator()(void* data) const { free(data); }

uint64_t Case::random() {
  uint64_t z = state_ += 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

Layout Case::layout() {
  Layout layout = {};
  layout.dims = 2;
  layout.batch = 1 + below(4);
  layout.sizes[0] = one_of({1, 1, 2, 3, 5});
  layout.sizes[1] =
      one_of({1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 129, 500, 513, 1024, 1025});
  layout.elements = layout.sizes[0] * layout.sizes[1];
  about += std::to_string(layout.batch) + " samples of " + std::to_string(layout.sizes[0]) + " x " +
           std::to_string(layout.sizes[1]);
  return layout;
}

void* Case::memory(int64_t count, DType dtype, bool is_written) {
  const int64_t size = (2 * kGuard + count * size_of(dtype) + 63) / 64 * 64;
  memories_.push_back({std::unique_ptr<unsigned char, Free>(static_cast<unsigned char*>(aligned_alloc(64, size))), size,
                       dtype, is_written});
  unsigned char* const bytes = memories_.back().bytes.get();
  memset(bytes, 0x3C, static_cast<size_t>(size));
  return bytes + kGuard;
}

// An operand in memory of its own.
Operand Case::place(const Layout& layout, DType dtype, bool is_written) {
  Operand x = {};
  const int64_t rows = layout.sizes[0], columns = layout.sizes[1], kind = below(6);
  x.dtype = dtype;
  x.strides[0] = kind == 4 ? 1 : kind == 5 ? 2 * columns + 1 : columns;
  x.strides[1] = kind == 4 ? rows : kind == 5 ? 2 : 1;
  x.dense = kind < 4;
  const int64_t reach = kind == 5 ? rows * (2 * columns + 1) : layout.elements;
  x.batch_stride = reach + one_of({0, 0, 1, 7});
  const int64_t shift = one_in(2) ? 0 : below(8);
  x.data =
      static_cast<char*>(memory(layout.batch * x.batch_stride + shift, dtype, is_written)) + shift * size_of(dtype);
  about += std::string(", ") + name_of(dtype) + (kind == 4 ? " transposed" : kind == 5 ? " with gaps" : "");
  return x;
}

Operand Case::input(const Layout& layout, DType dtype) {
  const Operand x = place(layout, dtype, false);
  const Memory& memory = memories_.back();
  const int64_t size = size_of(dtype), count = (memory.size - 2 * kGuard) / size;
  const double scale = one_in(4) ? bit_cast<double>(static_cast<uint64_t>(1023 - 140 + below(260)) << 52) : 1.0;
  const int64_t special = one_of({0, 0, 0, 3, 500});  // one element in so many is any bits
  const uint64_t infinity = infinity_of(dtype), sign = sign_of(dtype);
  // 0, the least and the largest number, infinity, a NaN that signals, and one that rounding would carry out of.
  const std::initializer_list<uint64_t> ends = {0, 1, infinity - 1, infinity, infinity + 1, sign - 1};
  const auto special_bits = [&] { return one_in(2) ? random() : one_of(ends) ^ (one_in(2) ? sign : 0); };
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t bits = special > 0 && one_in(special) ? special_bits() : element(dtype, scale * number());
    memcpy(memory.bytes.get() + kGuard + i * size, &bits, static_cast<size_t>(size));
  }
  if (special > 0) about += " special";
  if (scale != 1.0) about += " scaled";
  return x;
}

Operand Case::integers(const Layout& layout, DType dtype, int bits) {
  const Operand x = place(layout, dtype, false);
  const Memory& memory = memories_.back();
  const int64_t size = size_of(dtype), count = (memory.size - 2 * kGuard) / size;
  const bool misses = one_in(3);
  const uint64_t missing = dtype == DType::int32 ? 0x80000000 : uint64_t{1} << 63;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t q = static_cast<uint64_t>(static_cast<int64_t>(random()) >> (dtype == DType::int32 ? 33 : 63 - bits));
    if (misses && one_in(20)) q = missing;
    memcpy(memory.bytes.get() + kGuard + i * size, &q, static_cast<size_t>(size));
  }
  about += " of " + std::to_string(bits) + " bits";
  return x;
}

Operand Case::output(const Layout& layout, DType dtype) {
  Operand x = place(layout, dtype, true);
  x.streams = one_in(4);
  if (x.streams) about += " streamed";
  return x;
}

Operand Case::in_place(const Operand& input) {
  const auto* const data = static_cast<unsigned char*>(input.data);
  for (Memory& memory : memories_) {
    const unsigned char* const bytes = memory.bytes.get();
    memory.is_written = memory.is_written || (data >= bytes && data < bytes + memory.size);
  }
  about += ", in place";
  return input;
}

Operand Case::output_over(const Layout& layout, const Operand& input) {
  return one_in(5) ? in_place(input) : output(layout, input.dtype);
}

Number Case::number(const Layout& layout, bool positive) {
  const auto any = [&] {
    const double x =
        one_in(40) ? one_of({0.0, 1e-42, 1e-310, 1e30, 1e300, __builtin_inf(), __builtin_nan("")}) : number();
    return positive && x < 0.0 ? -x : x;
  };
  if (one_in(2)) return {any(), nullptr, 0, DType::float64};
  const DType dtype = floating();
  const int64_t stride = below(3), size = size_of(dtype);
  void* const data = memory(1 + (layout.batch - 1) * stride, dtype, false);
  for (int64_t i = 0; i <= (layout.batch - 1) * stride; ++i) {
    const uint64_t bits = element(dtype, any());
    memcpy(static_cast<char*>(data) + i * size, &bits, static_cast<size_t>(size));
  }
  return {0.0, data, stride, dtype};
}

Integer Case::integer(const Layout& layout, int64_t least, int64_t most) {
  const auto any = [&] {
    return static_cast<int64_t>(static_cast<uint64_t>(least) +
                                random() % (static_cast<uint64_t>(most) - static_cast<uint64_t>(least)));
  };
  if (one_in(2)) return {any(), nullptr, 0};
  const int64_t stride = below(3);
  auto* const data = static_cast<int64_t*>(memory(1 + (layout.batch - 1) * stride, DType::int64, false));
  for (int64_t i = 0; i <= (layout.batch - 1) * stride; ++i) data[i] = any();
  return {0, data, stride};
}

NoiseKey Case::key(const Layout& layout) {
  return {integer(layout, -kLargest, kLargest), integer(layout, 0, 1 << 20), integer(layout, 0, 1 << 20), one_in(2)};
}

int64_t* Case::zeros(int64_t count) {
  auto* const data = static_cast<int64_t*>(memory(count, DType::int64, true));
  memset(data, 0, static_cast<size_t>(count) * sizeof(int64_t));
  return data;
}

const bool* Case::flags(int64_t count) {
  auto* const data = static_cast<bool*>(memory(count, DType::int64, false));
  for (int64_t i = 0; i < count; ++i) data[i] = one_in(2);
  return data;
}

const int64_t* Case::places(int64_t count, int64_t most) {
  auto* const data = static_cast<int64_t*>(memory(count, DType::int64, false));
  for (int64_t i = 0; i < count; ++i) data[i] = below(most + 2) - 1;
  return data;
}

std::vector<uint64_t> Case::written() const {
  std::vector<uint64_t> result;
  for (const Memory& memory : memories_) {
    const int64_t size = size_of(memory.dtype);
    for (int64_t i = 0; memory.is_written && i < memory.size; i += size) {
      uint64_t bits = 0;
      memcpy(&bits, memory.bytes.get() + i, static_cast<size_t>(size));
      result.push_back(one_nan(memory.dtype, bits));
    }
  }
  return result;
}

}  // namespace bits
}  // namespace bicm
