// Population of memory: its pages are taken from the system before the first write to them.
//
// Not here: the array in this memory (slipway/runtime/populating.py).
//
// A thread of the lowest priority populates it, and pauses while kernels run.

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "kernels.h"

namespace {

// One population that was started.
struct Populating {
  std::atomic<bool> stop{false};
  std::thread thread;
};

// Bytes of one request to the system. Other threads that map memory wait until it ends: 0.2 ms on a
// host that has to find free memory first.
constexpr uintptr_t kPiece = 1 << 16;
// Pause after kernels were called.
constexpr auto kPause = std::chrono::milliseconds(50);

// Populate the pages from `first` to `last`, addresses of pages, until `stop` is set.
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
void populate(uintptr_t first, uintptr_t last, const std::atomic<bool>& stop) {
  const sched_param none{};
  // For this thread only. A thread of low priority in the normal class gives way more slowly.
  sched_setscheduler(0, SCHED_IDLE, &none);
  int64_t calls = -1;
  for (uintptr_t at = first; at < last && !stop.load(std::memory_order_relaxed);) {
    if (const int64_t now = slipway::kernel_calls.load(std::memory_order_relaxed); now != calls) {
      calls = now;
      std::this_thread::sleep_for(kPause);
      continue;
    }
    const uintptr_t size = last - at < kPiece ? last - at : kPiece;
    if (madvise(reinterpret_cast<void*>(at), size, MADV_POPULATE_WRITE)) return;
    at += size;
  }
}
#else
void populate(uintptr_t, uintptr_t, const std::atomic<bool>&) {}
#endif

}  // namespace

std::atomic<int64_t> slipway::kernel_calls{0};

// Start to populate `size` bytes. Their contents stay, and they may be read and written meanwhile.
// Return a handle for slipway_end_populate.
extern "C" void* slipway_populate(char* data, int64_t size) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + size) / page * page;
  auto* work = new Populating;
  work->thread = std::thread([work, first, last] { populate(first, last, work->stop); });
  return work;
}

// Stop a population, complete or not, and return when its thread no longer accesses the memory.
extern "C" void slipway_end_populate(void* started) {
  auto* work = static_cast<Populating*>(started);
  work->stop.store(true, std::memory_order_relaxed);
  work->thread.join();
  delete work;
}
