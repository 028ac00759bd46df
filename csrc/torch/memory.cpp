#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <new>

namespace bicm {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#elif defined(__has_feature)
constexpr bool kSanitized = __has_feature(address_sanitizer);
#else
constexpr bool kSanitized = false;
#endif

// The limit of unused memory: enough for the largest results of alternating steps, not for all results ever made.
std::atomic<int64_t> most_kept{0};

// 4096 bytes on x86-64, up to 65536 on Arm.
int64_t page() {
  static const int64_t size = sysconf(_SC_PAGESIZE);
  return size;
}

char* up_to(char* address, int64_t unit) {
  return address + (-reinterpret_cast<intptr_t>(address) & static_cast<intptr_t>(unit - 1));
}

// Large pages reduce page faults and TLB misses.
void* map(int64_t bytes) {
  const int64_t slack = bytes >= kHugePage ? kHugePage : 0;
  void* const mapped =
      mmap(nullptr, static_cast<size_t>(bytes + slack), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapped);
  if (slack == 0) return begin;
  char* const data = up_to(begin, kHugePage);
  if (data > begin) munmap(begin, static_cast<size_t>(data - begin));
  if (const int64_t rest = begin + slack - data) munmap(data + bytes, static_cast<size_t>(rest));
#ifdef MADV_HUGEPAGE
  madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
  return data;
}

void unmap(KeptBlock* block) {
  munmap(block->data, static_cast<size_t>(block->capacity));
  delete block;
}

// The unused blocks, most recent first. Never destroyed: tensors may outlive static objects.
class Kept {
 public:
  KeptBlock* take(int64_t bytes, bool streamed) {
    // A forked process may inherit a lock that is never released: use try_lock, and skip the list if it fails.
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return nullptr;
    KeptBlock** best = nullptr;
    for (KeptBlock** place = &first_; *place != nullptr; place = &(*place)->next) {
      const int64_t capacity = (*place)->capacity;
      if (capacity < bytes || capacity / 2 > bytes) continue;
      const bool alike = best != nullptr && capacity == (*best)->capacity;
      const bool suits = alike && (*best)->streamed != streamed && (*place)->streamed == streamed;
      if (best == nullptr || capacity < (*best)->capacity || suits) best = place;
    }
    return best == nullptr ? nullptr : remove(best);
  }

  bool give(KeptBlock* block) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    const int64_t most = most_kept.load(std::memory_order_relaxed);
    if (!lock.owns_lock() || block->capacity > most) return false;
    block->next = first_;
    first_ = block;
    bytes_ += block->capacity;
    while (bytes_ > most) unmap(remove(last()));
    return true;
  }

  int64_t release() {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return 0;
    const int64_t bytes = bytes_;
    while (first_ != nullptr) unmap(remove(&first_));
    return bytes;
  }

 private:
  KeptBlock* remove(KeptBlock** place) {
    KeptBlock* const block = *place;
    *place = block->next;
    bytes_ -= block->capacity;
    return block;
  }

  KeptBlock** last() {
    KeptBlock** place = &first_;
    while ((*place)->next != nullptr) place = &(*place)->next;
    return place;
  }

  std::mutex mutex_;
  KeptBlock* first_ = nullptr;
  int64_t bytes_ = 0;
};

Kept& kept() {
  static Kept& blocks = *new Kept;
  return blocks;
}

}  // namespace

void keep_at_most(int64_t bytes) {
  // The address sanitizer detects accesses out of bounds or after free only in memory that torch allocated.
  most_kept.store(kSanitized ? 0 : bytes, std::memory_order_relaxed);
}

KeptBlock* take_block(int64_t bytes, bool streamed) {
  const int64_t capacity = (bytes + page() - 1) / page() * page();
  // What cannot be kept is torch's: its allocator may keep it, and a new mapping is page-faulted in every call.
  if (capacity > most_kept.load(std::memory_order_relaxed)) return nullptr;
  if (KeptBlock* const block = kept().take(capacity, streamed)) return block->streamed = streamed, block;
  void* const data = map(capacity);
  if (data == nullptr) return nullptr;
  KeptBlock* const block = new (std::nothrow) KeptBlock{data, capacity, nullptr, streamed};
  if (block == nullptr) munmap(data, static_cast<size_t>(capacity));
  return block;
}

void give_back(KeptBlock* block) {
  if (!kept().give(block)) unmap(block);
}

int64_t release_blocks() { return kept().release(); }

}  // namespace bicm
