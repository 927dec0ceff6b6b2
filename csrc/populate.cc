// Takes memory from the system before anybody writes to it, on a thread that gives way to all
// others and rests while kernels run; knows no array.

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "kernels.h"

namespace {

struct Populating {
  std::atomic<bool> stop{false};
  std::thread thread;
};

constexpr uintptr_t kPiece =
    1 << 16;  // who maps memory waits for a piece to end: 0.2 ms where the host has to find it
constexpr auto kRest = std::chrono::milliseconds(50);

#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
void populate(uintptr_t first, uintptr_t last, const std::atomic<bool>& stop) {
  const sched_param none{};
  sched_setscheduler(
      0, SCHED_IDLE,
      &none);  // this thread's; with a low priority alone it would not give way at once
  int64_t calls = -1;
  for (uintptr_t at = first; at < last && !stop.load(std::memory_order_relaxed);) {
    if (const int64_t now = slipway::kernel_calls.load(std::memory_order_relaxed); now != calls) {
      calls = now;
      std::this_thread::sleep_for(kRest);
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

// Starts; what is in the memory stays, and anybody may read and write it meanwhile. To be ended
// with the next.
extern "C" void* slipway_populate(char* data, int64_t size) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)),
                  begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + size) / page * page;
  auto* work = new Populating;
  work->thread = std::thread([work, first, last] { populate(first, last, work->stop); });
  return work;
}

// Returns once nothing touches the memory any more, whether all was populated or not.
extern "C" void slipway_end_populate(void* started) {
  auto* work = static_cast<Populating*>(started);
  work->stop.store(true, std::memory_order_relaxed);
  work->thread.join();
  delete work;
}
