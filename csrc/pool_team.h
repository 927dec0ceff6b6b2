// Team of the calling thread and threads of XLA's pool.
//
// Not here: division of a kernel's work into items (the header of each op).

#pragma once

#include <atomic>
#include <cstdint>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace slipway {

// The caller waits only for items that other threads run, not for a thread to start. A thread that
// starts late finds no item left, and accesses only memory that it owns, not that of the caller.
class PoolTeam final : public Team {
 public:
  // one_thread: the caller runs all items.
  PoolTeam(xla::ffi::ThreadPool& pool, bool one_thread)
      : pool_(pool), threads_(one_thread ? 1 : pool.num_threads()) {
    kernel_calls.fetch_add(1, std::memory_order_relaxed);
  }

  void* shared(int64_t bytes) override;
  void* workspace(int64_t bytes) override;
  void run(int64_t items, int64_t together, int64_t bytes,
           void (*body)(const void*, int64_t, void*), const void* context) override;

 private:
  xla::ffi::ThreadPool& pool_;
  int64_t threads_;
};

}  // namespace slipway
