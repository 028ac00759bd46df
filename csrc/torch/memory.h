// Memory of large results on the CPU, kept for the next ones.
//
// A step's results live until the next step. The C library returns blocks of this size to the system and faults
// them in again each time, which takes several times as long as filling them.
#pragma once

#include <stdint.h>

namespace bicm {

// Below this the C library's own free lists are as fast.
constexpr int64_t kKeptFrom = int64_t{64} << 10;

// Sets the maximum of unused bytes. Initially, with 0, and in a build for the address sanitizer no blocks are kept.
void keep_at_most(int64_t bytes);

// A block of memory, owned by the caller until it is returned; nullptr where there is none, or it could not be kept.
// `streamed`: written with non-temporal stores. Prefer a block that was last written the same way.
struct KeptBlock {
  void* data;
  int64_t capacity;
  KeptBlock* next;
  bool streamed;
};
KeptBlock* take_block(int64_t bytes, bool streamed = false);
void give_back(KeptBlock* block);

// Returns kept memory to the system; returns the number of bytes.
int64_t release_blocks();

}  // namespace bicm
