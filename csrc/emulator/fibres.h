// The threads of a block, or of the blocks of a cluster, as fibres: each runs until it waits for others or exits.
// Waiting threads continue when all others have arrived; where that cannot happen, the launch fails with the reason.
#pragma once

#include <stdint.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace bicm {
namespace emulator {

constexpr unsigned kWarp = 32;

// A place in a kernel where threads wait.
struct Site {
  const char* file;
  int line;

  bool operator==(const Site& other) const { return line == other.line && file == other.file; }
  std::string name() const {
    const std::string path = file;
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
  }
};

enum class Wait { none, block, cluster, warp, ended };

constexpr unsigned kMaxCluster = 8;  // blocks, on every GPU that has clusters

class Fibres {
 public:
  // Runs `blocks` of `threads` threads to their ends, in order or backwards. `select` receives the one that continues.
  void run(unsigned blocks, unsigned threads, bool backwards, std::function<void()> body,
           std::function<void(unsigned)> select) {
    if (blocks > 1 && threads % kWarp != 0) throw std::logic_error("the blocks of a cluster must be whole warps");
    body_ = std::move(body);
    select_ = std::move(select);
    const unsigned count = blocks * threads;
    grow(count);
    count_ = count;
    per_block_ = threads;
    exchanges_.assign((count + kWarp - 1) / kWarp, {});
    for (unsigned i = 0; i < count; ++i) start(i);
    block_ = ++last_interval_;  // earlier shared memory is invalid
    for (unsigned rank = 0; rank < blocks; ++rank) intervals_[rank] = block_;
    ++epoch_;
    while (!all_ended()) {
      bool moved = false;
      for (unsigned k = 0; k < count; ++k) {
        const unsigned i = backwards ? count - 1 - k : k;
        if (threads_[i].wait != Wait::none) continue;
        resume(i);
        moved = true;
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
      }
      moved = release_warps() || moved;
      if (!moved) release_blocks(blocks);
    }
  }

  unsigned current() const { return current_; }
  unsigned rank() const { return per_block_ == 0 ? 0 : current_ / per_block_; }  // of the running block in its cluster
  unsigned blocks() const { return per_block_ == 0 ? 1 : count_ / per_block_; }
  // The intervals between a block's barriers are numbered, increasing over all blocks; `block` is the first of these
  // blocks. Epochs are the intervals between a cluster's barriers.
  int64_t interval() const { return intervals_[rank()]; }
  int64_t block() const { return block_; }
  int64_t epoch() const { return epoch_; }

  bool has_ended(unsigned rank) const {
    for (unsigned i = rank * per_block_; i < (rank + 1) * per_block_; ++i) {
      if (threads_[i].wait != Wait::ended) return false;
    }
    return true;
  }

  void arrive(Site site) {
    if (threads_[current_].arrived) throw std::logic_error(site.name() + ": a thread arrives twice and has not waited");
    threads_[current_].arrived = true;
  }

  void wait_for_cluster(Site site) {
    Thread& thread = threads_[current_];
    if (!thread.arrived) throw std::logic_error(site.name() + ": a thread waits for a cluster and has not arrived");
    thread.site = site;
    pause(Wait::cluster);
    thread.arrived = false;
  }

  void barrier(Site site) {
    threads_[current_].site = site;
    pause(Wait::block);
  }

  // Every lane in the mask provides a number and receives those of all; names[i] belongs to lane i.
  const uint64_t* exchange(uint32_t mask, uint64_t number, Site site) {
    Thread& thread = threads_[current_];
    const unsigned lane = current_ % kWarp, first = current_ - lane;
    if ((mask >> lane & 1) == 0) throw std::logic_error(site.name() + ": a lane is not in its own mask");
    if (count_ - first < kWarp && mask >> (count_ - first) != 0) {
      throw std::logic_error(site.name() + ": the mask names a lane that does not exist");
    }
    thread.site = site;
    thread.mask = mask;
    Exchange& exchange = exchanges_[current_ / kWarp];
    exchange.given[lane] = number;
    pause(Wait::warp);
    return exchange.got;
  }

 private:
  static constexpr size_t kStack = 128 << 10;

  struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Wait wait = Wait::ended;
    Site site = {};
    uint32_t mask = 0;
    bool arrived = false;  // at the cluster's barrier
    void* fake_stack = nullptr;
  };
  struct Exchange {
    uint64_t given[kWarp], got[kWarp];
  };

  void grow(unsigned count) {
    while (threads_.size() < count) {
      threads_.emplace_back();
      threads_.back().stack.reset(new char[kStack]);
    }
  }

  void start(unsigned i) {
    Thread& thread = threads_[i];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    const uintptr_t self = reinterpret_cast<uintptr_t>(this);
    makecontext(&thread.context, reinterpret_cast<void (*)()>(&enter), 2, static_cast<unsigned>(self),
                static_cast<unsigned>(self >> 32));
    thread.wait = Wait::none;
    thread.arrived = false;
    thread.fake_stack = nullptr;
  }

  static void enter(unsigned low, unsigned high) {
    Fibres* fibres = reinterpret_cast<Fibres*>(static_cast<uintptr_t>(high) << 32 | low);
    fibres->arrived_in_fibre(nullptr);
    try {
      fibres->body_();
      if (fibres->threads_[fibres->current_].arrived) {
        throw std::logic_error("a thread arrives at a cluster's barrier and ends without waiting");
      }
    } catch (...) {
      fibres->error_ = std::current_exception();
    }
    fibres->pause(Wait::ended);
  }

  void resume(unsigned i) {
    current_ = i;
    select_(i);
    leaving(&scheduler_fake_stack_, threads_[i].stack.get(), kStack);
    swapcontext(&scheduler_, &threads_[i].context);
    arrived_in_scheduler();
  }

  void pause(Wait wait) {
    Thread& thread = threads_[current_];
    thread.wait = wait;
    leaving(wait == Wait::ended ? nullptr : &thread.fake_stack, scheduler_stack_, scheduler_size_);
    swapcontext(&thread.context, &scheduler_);
    arrived_in_fibre(thread.fake_stack);
  }

  // The address sanitizer keeps a shadow of each stack and must be notified of every switch.
#if defined(__SANITIZE_ADDRESS__)
  void leaving(void** fake_stack, const void* stack, size_t size) {
    __sanitizer_start_switch_fiber(fake_stack, stack, size);
  }
  void arrived_in_fibre(void* fake_stack) {
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_size_);
  }
  void arrived_in_scheduler() { __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr); }
#else
  void leaving(void**, const void*, size_t) {}
  void arrived_in_fibre(void*) {}
  void arrived_in_scheduler() {}
#endif

  bool all_ended() const {
    for (unsigned i = 0; i < count_; ++i) {
      if (threads_[i].wait != Wait::ended) return false;
    }
    return true;
  }

  bool release_warps() {
    bool moved = false;
    for (unsigned first = 0; first < count_; first += kWarp) {
      for (unsigned i = first; i < count_ && i < first + kWarp; ++i) {
        if (threads_[i].wait == Wait::warp && warp_is_here(first, threads_[i])) {
          release_lanes(first, threads_[i].mask);
          moved = true;
        }
      }
    }
    return moved;
  }

  bool warp_is_here(unsigned first, const Thread& asking) const {
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if ((asking.mask >> lane & 1) == 0) continue;
      const Thread& other = threads_[first + lane];
      if (other.wait != Wait::warp) return false;
      if (other.mask != asking.mask || !(other.site == asking.site)) {
        throw std::logic_error(asking.site.name() + ": lanes of one warp wait in different places or for others");
      }
    }
    return true;
  }

  void release_lanes(unsigned first, uint32_t mask) {
    Exchange& exchange = exchanges_[first / kWarp];
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      exchange.got[lane] = exchange.given[lane];
      threads_[first + lane].wait = Wait::none;
    }
  }

  // No thread can continue alone: either all threads of a block wait at one barrier, or all of the cluster, or
  // there is a deadlock.
  void release_blocks(unsigned blocks) {
    bool moved = false;
    for (unsigned rank = 0; rank < blocks; ++rank) {
      const unsigned first = rank * per_block_;
      if (odd_one(first, first + per_block_, Wait::block) != count_) continue;
      intervals_[rank] = ++last_interval_;
      for (unsigned i = first; i < first + per_block_; ++i) threads_[i].wait = Wait::none;
      moved = true;
    }
    if (moved) return;
    const unsigned odd = odd_one(0, count_, Wait::cluster);
    if (odd == count_) {
      ++epoch_;
      for (unsigned rank = 0; rank < blocks; ++rank) intervals_[rank] = ++last_interval_;
      for (unsigned i = 0; i < count_; ++i) threads_[i].wait = Wait::none;
      return;
    }
    throw std::logic_error(describe_deadlock());
  }

  // Two threads that wait in different places, one of them the first that has not exited.
  std::string describe_deadlock() const {
    unsigned waiting = 0;
    while (threads_[waiting].wait == Wait::ended) ++waiting;
    const bool of_block = threads_[waiting].wait == Wait::block;
    unsigned other = of_block ? waiting / per_block_ * per_block_ : 0;
    const unsigned last = of_block ? other + per_block_ : count_;
    const auto alike = [&](const Thread& thread) {
      return thread.wait == threads_[waiting].wait && thread.site == threads_[waiting].site;
    };
    while (other + 1 < last && alike(threads_[other])) ++other;
    std::string text = "deadlock:";
    for (unsigned k : {std::min(waiting, other), std::max(waiting, other)}) {
      text += " thread " + std::to_string(k) + " " + describe(threads_[k]) + ",";
    }
    return text + " and others wait for them";
  }

  // The first thread of a range that does not wait where the first of the range does, or `count_`.
  unsigned odd_one(unsigned first, unsigned last, Wait wait) const {
    for (unsigned i = first; i < last; ++i) {
      if (threads_[i].wait != wait || !(threads_[i].site == threads_[first].site)) return i;
    }
    return count_;
  }

  static std::string describe(const Thread& thread) {
    switch (thread.wait) {
      case Wait::block: return "waits at the barrier " + thread.site.name();
      case Wait::cluster: return "waits for its cluster at " + thread.site.name();
      case Wait::warp: return "waits for its warp at " + thread.site.name();
      default: return "has ended";
    }
  }

  std::function<void()> body_;
  std::function<void(unsigned)> select_;
  std::vector<Thread> threads_;
  std::vector<Exchange> exchanges_;
  ucontext_t scheduler_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
  unsigned current_ = 0, count_ = 0, per_block_ = 0;
  int64_t intervals_[kMaxCluster] = {}, last_interval_ = 0, block_ = 0, epoch_ = 0;
  std::exception_ptr error_;
};

}  // namespace emulator
}  // namespace bicm
