// A case of the comparison of instruction sets: a problem that follows from one number, the same on every machine, and
// all the memory that a kernel may write for it, guard zones included.
#pragma once

#include <stdint.h>

#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "../cpu/kernels.h"

namespace bicm {
namespace bits {

int64_t size_of(DType dtype);

class Case {
 public:
  explicit Case(uint64_t seed) : state_(seed) {}

  // --- choices ---
  uint64_t random();  // splitmix64
  int64_t below(int64_t count) { return static_cast<int64_t>(random() % static_cast<uint64_t>(count)); }
  bool one_in(int64_t count) { return below(count) == 0; }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<int64_t>(values.size()))];
  }
  DType floating() { return one_of({DType::float16, DType::bfloat16, DType::float32, DType::float64}); }
  DType mostly(DType usual) { return one_in(6) ? floating() : usual; }
  // In [-4, 4), exact in float32.
  double number() { return static_cast<double>(random() >> 40) * 0x1p-21 - 4.0; }

  // --- arguments ---
  // Up to 4 samples of rows by columns: of one element, of less than any vector, beside its multiples, of several units.
  Layout layout();
  // In order, transposed, or with gaps; of any alignment, magnitude, and with special values.
  Operand input(const Layout& layout, DType dtype);
  Operand integers(const Layout& layout, DType dtype, int bits);
  Operand output(const Layout& layout, DType dtype);
  // An input's memory, which the kernel writes too; where it only may: that or other memory.
  Operand in_place(const Operand& input);
  Operand output_over(const Layout& layout, const Operand& input);
  // One number, in the call or in memory, or one per sample.
  Number number(const Layout& layout, bool positive = false);
  Integer integer(const Layout& layout, int64_t least, int64_t most);
  NoiseKey key(const Layout& layout);
  // Memory for a sum or a mark per item.
  double* doubles(int64_t count) { return static_cast<double*>(memory(count, DType::float64, true)); }
  int64_t* zeros(int64_t count);
  float* floats(int64_t count) { return static_cast<float*>(memory(count, DType::float32, true)); }
  const bool* flags(int64_t count);
  // From -1 up to `most`.
  const int64_t* places(int64_t count, int64_t most);

  // Runs a kernel's units in one call or in two.
  template <class Problem>
  void run(void (*kernel)(const Problem&, int64_t, int64_t), const Problem& problem, int64_t units) {
    const int64_t first = below(units + 1);
    if (first > 0) kernel(problem, 0, first);
    if (first < units) kernel(problem, first, units);
  }

  // --- results: the bits of everything written, in order; all NaNs are one ---
  std::vector<uint64_t> written() const;

  std::string about;  // in words

 private:
  struct Free {
    void operator()(void* data) const;
  };
  struct Memory {
    std::unique_ptr<unsigned char, Free> bytes;
    int64_t size;
    DType dtype;
    bool is_written;
  };

  // `count` elements between guard zones.
  void* memory(int64_t count, DType dtype, bool is_written);
  Operand place(const Layout& layout, DType dtype, bool is_written);

  uint64_t state_;
  std::vector<Memory> memories_;
};

// Cases of one kind: what they are called, how many there are, and what runs one.
struct Family {
  const char* name;
  int64_t cases;
  void (*run)(Case& c, const Kernels& kernels);
};
const std::vector<Family>& families();

}  // namespace bits
}  // namespace bicm
