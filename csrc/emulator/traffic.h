// Every access of a kernel to global memory: its bytes are counted, and it must be inside an argument of the problem.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

namespace bicm {
namespace emulator {

struct Range {
  uintptr_t begin, end;
};

// Bytes of tensors, and of per-batch and per-sample numbers.
struct Traffic {
  int64_t read = 0, written = 0, numbers = 0;
};

inline Traffic traffic;
// The numbers that the running blocks have read: the first thread fetches one, the others find it in the cache.
inline std::unordered_set<uintptr_t> numbers_of_block[8];
inline unsigned block_of_cluster = 0;  // which of them runs
// The memory that a launch may touch; none: any. What the kernels' own library allocated belongs to every launch.
inline std::vector<Range> ranges, allocated;

inline void check_access(const void* address, size_t bytes, size_t alignment, const char* what) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (begin % alignment != 0) throw std::runtime_error(std::string("a misaligned ") + what);
  if (ranges.empty()) return;
  for (const auto* known : {&ranges, &allocated}) {
    for (const Range& range : *known) {
      if (begin >= range.begin && begin + bytes <= range.end) return;
    }
  }
  throw std::out_of_range(std::string("a ") + what + " outside every tensor");
}

inline void count_read(const void* address, size_t bytes, size_t alignment) {
  check_access(address, bytes, alignment, "load");
  traffic.read += static_cast<int64_t>(bytes);
}

inline void count_number(const void* address, size_t bytes) {
  check_access(address, bytes, bytes, "load");
  if (numbers_of_block[block_of_cluster].insert(reinterpret_cast<uintptr_t>(address)).second) {
    traffic.numbers += static_cast<int64_t>(bytes);
  }
}

inline void count_write(const void* address, size_t bytes, size_t alignment) {
  check_access(address, bytes, alignment, "store");
  traffic.written += static_cast<int64_t>(bytes);
}

}  // namespace emulator
}  // namespace bicm
