// The threads of a block as fibres: each runs until it waits for others or ends. Waiting threads go on when all whom
// they wait for have come; where that cannot happen, the launch fails and says why.
#pragma once

#include <stdint.h>
#include <ucontext.h>

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

enum class Wait { none, block, warp, ended };

class Fibres {
 public:
  // Runs `count` threads to their ends, in order or backwards. `select` is told which one goes on.
  void run(unsigned count, bool backwards, std::function<void()> body, std::function<void(unsigned)> select) {
    body_ = std::move(body);
    select_ = std::move(select);
    grow(count);
    count_ = count;
    exchanges_.assign((count + kWarp - 1) / kWarp, {});
    for (unsigned i = 0; i < count; ++i) start(i);
    block_ = ++interval_;  // what was shared before is no longer
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
      if (!moved) release_block();
    }
  }

  unsigned current() const { return current_; }
  // The times between barriers have numbers, growing over all blocks; `block` is the first of this block's.
  int64_t interval() const { return interval_; }
  int64_t block() const { return block_; }

  void barrier(Site site) {
    threads_[current_].site = site;
    pause(Wait::block);
  }

  // Every lane that the mask names gives a number and gets those of all; names[i] belongs to lane i.
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
    thread.fake_stack = nullptr;
  }

  static void enter(unsigned low, unsigned high) {
    Fibres* fibres = reinterpret_cast<Fibres*>(static_cast<uintptr_t>(high) << 32 | low);
    fibres->arrived_in_fibre(nullptr);
    try {
      fibres->body_();
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

  // The address sanitizer keeps a shadow of each stack and must hear of every change from one to another.
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

  // Nobody can go on by himself: either all wait at one barrier, or some will wait for ever.
  void release_block() {
    const Site site = threads_[0].site;
    for (unsigned i = 0; i < count_; ++i) {
      const Thread& thread = threads_[i];
      if (thread.wait == Wait::block && threads_[0].wait == Wait::block && thread.site == site) continue;
      std::string text = "deadlock:";
      for (unsigned k : {0u, i}) text += " thread " + std::to_string(k) + " " + describe(threads_[k]) + ",";
      throw std::logic_error(text + " and others wait for them");
    }
    ++interval_;
    for (unsigned i = 0; i < count_; ++i) threads_[i].wait = Wait::none;
  }

  static std::string describe(const Thread& thread) {
    switch (thread.wait) {
      case Wait::block: return "waits at the barrier " + thread.site.name();
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
  unsigned current_ = 0, count_ = 0;
  int64_t interval_ = 0, block_ = 0;
  std::exception_ptr error_;
};

}  // namespace emulator
}  // namespace bicm
