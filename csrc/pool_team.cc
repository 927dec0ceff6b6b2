// Distribution of work over XLA's threads, and scratch memory of each thread.
//
// Not here: calls of the kernels (ffi.cc).

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <thread>
#include <utility>

#include "pool_team.h"

namespace slipway {
namespace {

// Purpose of a buffer: the items that a thread runs, the call that it started, or an op that calls
// several kernels.
enum Use { kItems, kCall, kWorkspace };

// Return memory of this thread, 4096-byte aligned. It is kept for later calls, and grows.
template <Use>
void* scratch(int64_t bytes) {
  struct Memory {
    void* data = nullptr;
    int64_t size = 0;
    ~Memory() { std::free(data); }
  };
  thread_local Memory memory;
  if (bytes > memory.size) {
    std::free(memory.data);
    memory.size = (bytes + 4095) / 4096 * 4096;
    memory.data = std::aligned_alloc(4096, memory.size);
  }
  return memory.data;
}

// Items of one call. Threads take them from one counter.
struct Job {
  std::atomic<int64_t> next{0}, done{0};
  int64_t items;
  int64_t share;     // a thread takes one of `share` parts of the remaining items at once
  int64_t together;  // but at most this number
  int64_t bytes;     // scratch memory of a thread
  void (*body)(const void*, int64_t, void*);
  const void* context;

  // Run items until none is left.
  void work() {
    int64_t i = next.load(std::memory_order_relaxed);
    while (i < items) {
      // Parts become smaller, so that all threads end at about the same time.
      const int64_t count = std::clamp<int64_t>((items - i) / share, 1, together);
      if (!next.compare_exchange_weak(i, i + count, std::memory_order_relaxed)) continue;
      void* memory = scratch<kItems>(bytes);
      for (int64_t item = i; item < i + count; ++item) body(context, item, memory);
      done.fetch_add(count, std::memory_order_release);
      i = next.load(std::memory_order_relaxed);
    }
  }
};

// Helper threads that wait for the next call before they go back to XLA's pool.
//
// The calls of a step are some microseconds apart. On a virtual machine, to wake a thread of the
// pool costs the caller up to 60 microseconds.
class IdleWorkers {
 public:
  // Hand the job to at most `most` waiting threads, and return their number.
  int64_t assign(const std::shared_ptr<Job>& job, int64_t most) {
    int64_t assigned = 0;
    for (Slot& slot : slots_) {
      State state = kWaits;
      if (assigned == most) break;
      if (slot.state.load(std::memory_order_relaxed) != kWaits ||
          !slot.state.compare_exchange_strong(state, kBusy))
        continue;
      slot.job = job;
      ++assigned;
      slot.state.store(kHasJob, std::memory_order_release);
    }
    return assigned;
  }

  // Wait for a job for at most kMaxWait. Return null if there is none, or if no slot is free.
  std::shared_ptr<Job> wait() {
    Slot* slot = take_slot();
    if (!slot) return nullptr;
    const auto begun = std::chrono::steady_clock::now();
    for (int turn = 1; slot->state.load(std::memory_order_acquire) != kHasJob; ++turn) {
      pause();
      State state = kWaits;
      if (turn % 16 == 0 && std::chrono::steady_clock::now() - begun > kMaxWait &&
          slot->state.compare_exchange_strong(state, kFree))
        return nullptr;
    }
    std::shared_ptr<Job> job = std::move(slot->job);
    slot->state.store(kFree, std::memory_order_release);
    return job;
  }

 private:
  // A slot is free, or a thread waits in it, or a caller writes its job (busy), or it has a job.
  enum State { kFree, kBusy, kWaits, kHasJob };
  struct alignas(64) Slot {
    std::atomic<State> state{kFree};
    std::shared_ptr<Job> job;
  };
  static constexpr auto kMaxWait = std::chrono::microseconds(100);

  // Tell the processor that this thread spins.
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  // Take a free slot for this thread; null if there is none.
  Slot* take_slot() {
    for (Slot& slot : slots_) {
      State state = kFree;
      if (slot.state.load(std::memory_order_relaxed) == kFree &&
          slot.state.compare_exchange_strong(state, kWaits))
        return &slot;
    }
    return nullptr;
  }

  Slot slots_[64];
};
IdleWorkers idle_workers;

}  // namespace

void* PoolTeam::shared(int64_t bytes) { return scratch<kCall>(bytes); }

void* PoolTeam::workspace(int64_t bytes) { return scratch<kWorkspace>(bytes); }

void PoolTeam::run(int64_t items, int64_t together, int64_t bytes,
                   void (*body)(const void*, int64_t, void*), const void* context) {
  const int64_t helpers = std::min<int64_t>(threads_, items) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < items; ++i) body(context, i, scratch<kItems>(bytes));
    return;
  }
  auto job = std::make_shared<Job>();
  job->items = items;
  job->share = 2 * (helpers + 1);
  job->together = together;
  job->bytes = bytes;
  job->body = body;
  job->context = context;
  for (int64_t i = idle_workers.assign(job, helpers); i < helpers; ++i)
    pool_.Schedule([job]() mutable {
      for (; job; job = idle_workers.wait()) job->work();
    });
  job->work();
  for (int turns = 0; job->done.load(std::memory_order_acquire) < items; ++turns)
    if (turns > 4096) std::this_thread::yield();
}

}  // namespace slipway
