// Memory of large results on the CPU, kept for the next ones.
//
// A step's results live until the step after it. The C library gives blocks of this size back to the system and pages
// them anew each time, which takes several times as long as filling them.
#pragma once

#include <stdint.h>

namespace bicm {

// Below this the C library's own lists serve as well.
constexpr int64_t kKeptFrom = int64_t{64} << 10;

// Sets how many bytes may lie unused. At first, with 0, and in a build for the address sanitizer there are no blocks.
void keep_at_most(int64_t bytes);

// A block of memory, owned by whoever took it until it is given back; nullptr where there is none.
// `streamed`: last written past the cache. What is to be written past it, or not, had better find it as it needs it.
struct KeptBlock {
  void* data;
  int64_t capacity;
  KeptBlock* next;
  bool streamed;
};
KeptBlock* take_block(int64_t bytes, bool streamed = false);
void give_back(KeptBlock* block);

// Gives what is kept to the system; the number of bytes.
int64_t release_blocks();

}  // namespace bicm
