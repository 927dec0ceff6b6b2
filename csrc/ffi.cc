// The doors through which XLA calls the kernels: unpacks buffers and shares work over XLA's own
// threads. Computes nothing; dtypes and shapes are as slipway/ops/cpu.py has checked them.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using slipway::Type;

// A thread's own memory, kept and grown: one buffer for the items that it runs, one for the calls
// that it leads.
enum Use { kItems, kCall };
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

// One call's items, taken from one counter by whoever works on it.
struct Job {
  std::atomic<int64_t> next{0}, done{0};
  int64_t items, share, together, bytes;
  void (*body)(const void*, int64_t, void*);
  const void* context;

  void work() {
    int64_t i = next.load(std::memory_order_relaxed);
    while (i < items) {
      // a share of what is left, so that all end at about the same time
      const int64_t count = std::clamp<int64_t>((items - i) / share, 1, together);
      if (!next.compare_exchange_weak(i, i + count, std::memory_order_relaxed)) continue;
      void* memory = scratch<kItems>(bytes);
      for (int64_t item = i; item < i + count; ++item) body(context, item, memory);
      done.fetch_add(count, std::memory_order_release);
      i = next.load(std::memory_order_relaxed);
    }
  }
};

// Where a helper waits a little for the next call, before it goes back to the pool: a step's calls
// lie some microseconds apart, and to wake a thread costs who wakes it up to 60 on a virtual
// machine.
class IdleWorkers {
 public:
  // Hands the job to up to `most` of those who wait, and says to how many.
  int64_t give(const std::shared_ptr<Job>& job, int64_t most) {
    int64_t given = 0;
    for (Place& place : places_) {
      State state = kWaits;
      if (given == most) break;
      if (place.state.load(std::memory_order_relaxed) != kWaits ||
          !place.state.compare_exchange_strong(state, kBusy))
        continue;
      place.job = job, ++given;
      place.state.store(kHasJob, std::memory_order_release);
    }
    return given;
  }

  // The next job, or null when none came in time.
  std::shared_ptr<Job> wait() {
    Place* place = enter();
    if (!place) return nullptr;
    const auto begun = std::chrono::steady_clock::now();
    for (int turn = 1; place->state.load(std::memory_order_acquire) != kHasJob; ++turn) {
      relax();
      State state = kWaits;
      if (turn % 16 == 0 && std::chrono::steady_clock::now() - begun > kPatience &&
          place->state.compare_exchange_strong(state, kFree))
        return nullptr;
    }
    std::shared_ptr<Job> job = std::move(place->job);
    place->state.store(kFree, std::memory_order_release);
    return job;
  }

 private:
  enum State { kFree, kBusy, kWaits, kHasJob };
  struct alignas(64) Place {
    std::atomic<State> state{kFree};
    std::shared_ptr<Job> job;
  };
  static constexpr auto kPatience = std::chrono::microseconds(100);

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  Place* enter() {
    for (Place& place : places_) {
      State state = kFree;
      if (place.state.load(std::memory_order_relaxed) == kFree &&
          place.state.compare_exchange_strong(state, kWaits))
        return &place;
    }
    return nullptr;
  }

  Place places_[64];
};
IdleWorkers idle_workers;

// XLA's threads and the caller share the items; the caller waits for items that somebody runs,
// never for a thread to start. A thread that comes late finds no item, and touches nothing that the
// caller owned.
class PoolTeam final : public slipway::Team {
 public:
  PoolTeam(ffi::ThreadPool& pool, bool alone)
      : pool_(pool), threads_(alone ? 1 : pool.num_threads()) {
    slipway::kernel_calls.fetch_add(1, std::memory_order_relaxed);
  }

  void* shared(int64_t bytes) override { return scratch<kCall>(bytes); }

  void run(int64_t items, int64_t together, int64_t bytes,
           void (*body)(const void*, int64_t, void*), const void* context) override {
    const int64_t helpers = std::min<int64_t>(threads_, items) - 1;
    if (helpers <= 0) {
      for (int64_t i = 0; i < items; ++i) body(context, i, scratch<kItems>(bytes));
      return;
    }
    auto job = std::make_shared<Job>();
    job->items = items, job->share = 2 * (helpers + 1), job->together = together,
    job->bytes = bytes;
    job->body = body, job->context = context;
    for (int64_t i = idle_workers.give(job, helpers); i < helpers; ++i)
      pool_.Schedule([job]() mutable {
        for (; job; job = idle_workers.wait()) job->work();
      });
    job->work();
    for (int turns = 0; job->done.load(std::memory_order_acquire) < items; ++turns)
      if (turns > 4096) std::this_thread::yield();
  }

 private:
  ffi::ThreadPool& pool_;
  int64_t threads_;
};

// Less work than this is over before another thread has started.
constexpr int64_t kAloneBytes = 1 << 17, kAloneNumbers = 1 << 14;

Type type_of(ffi::DataType type) {
  return type == ffi::DataType::F32 ? Type::kFloat : Type::kBFloat16;
}

int64_t live(ffi::Buffer<ffi::S32> tokens, int64_t rows) {
  return std::min<int64_t>(tokens.typed_data()[0], rows);
}

// `arrays` holds groups of equally many arrays, one per layer; which layer is known only when it
// runs. An index outside is clamped, as XLA's own are.
const void* pick(const ffi::RemainingArgs& arrays, size_t groups, size_t group, int32_t layer) {
  const int64_t layers = arrays.size() / groups, at = std::clamp<int64_t>(layer, 0, layers - 1);
  return arrays.get<ffi::AnyBuffer>(group * layers + at)->untyped_data();
}

// Groups, for each result: weights; their scales, if packed; their biases, if biased. If gated,
// there is one result, and the same of up follows.
ffi::Error Linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> tokens,
                  ffi::Buffer<ffi::S32> layer, ffi::RemainingArgs arrays, ffi::RemainingRets outs,
                  bool gated, bool biased, int64_t bits, int64_t group) {
  constexpr size_t kMost = 4;
  if (outs.size() > kMost) return ffi::Error::InvalidArgument("linear: more than 4 results");
  const size_t each = 1 + (bits > 0) + biased, groups = (outs.size() + gated) * each;
  const int32_t at = layer.typed_data()[0];
  slipway::Linear ops[kMost] = {};
  int64_t bytes = 0;
  for (size_t i = 0; i < outs.size(); ++i) {
    slipway::Linear& op = ops[i];
    auto out = outs.get<ffi::AnyBuffer>(i).value();
    const size_t first = i * each;
    op.weight = pick(arrays, groups, first, at);
    if (bits) op.scale = pick(arrays, groups, first + 1, at);
    if (biased) op.bias = pick(arrays, groups, first + each - 1, at);
    if (gated) op.up = pick(arrays, groups, each, at);
    if (gated && bits) op.up_scale = pick(arrays, groups, each + 1, at);
    if (gated && biased) op.up_bias = pick(arrays, groups, 2 * each - 1, at);
    op.type = type_of(x.element_type()), op.out_type = type_of(out->element_type());
    op.tokens = live(tokens, x.dimensions()[0]);
    op.in = x.dimensions()[1], op.out_size = out->dimensions()[1];
    op.x = x.untyped_data(), op.out = out->untyped_data();
    op.bits = static_cast<int32_t>(bits), op.group = group;
    bytes += op.in * op.out_size * (bits ? bits : 8 * size_of(op.type)) / 8;
  }
  PoolTeam team(pool, bytes < kAloneBytes);
  (bits ? slipway::kernels()->quantized_linear : slipway::kernels()->linear)(ops, outs.size(),
                                                                             team);
  return ffi::Error::Success();
}

ffi::Error Embed(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> ids, ffi::Buffer<ffi::S32> tokens,
                 ffi::AnyBuffer table, ffi::RemainingArgs scale, ffi::Result<ffi::AnyBuffer> out) {
  slipway::Embed op{};
  op.type = type_of(out->element_type());
  op.tokens = live(tokens, ids.element_count()), op.rows = table.dimensions()[0],
  op.size = out->dimensions()[1];
  op.ids = ids.typed_data(), op.table = table.untyped_data(), op.out = out->untyped_data();
  if (scale.size()) op.scale = scale.get<ffi::AnyBuffer>(0)->untyped_data();
  PoolTeam team(pool, op.tokens * op.size < kAloneNumbers);
  slipway::kernels()->embed(op, team);
  return ffi::Error::Success();
}

ffi::Error Norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> tokens,
                ffi::Buffer<ffi::S32> layer, ffi::RemainingArgs weights,
                ffi::Result<ffi::AnyBuffer> out, float eps) {
  slipway::Norm op{};
  op.type = type_of(x.element_type());
  op.tokens = live(tokens, x.dimensions()[0]), op.size = x.dimensions()[1];
  op.x = x.untyped_data(), op.weight = pick(weights, 1, 0, layer.typed_data()[0]), op.eps = eps;
  op.out = out->untyped_data();
  PoolTeam team(pool, op.tokens * op.size < kAloneNumbers);
  slipway::kernels()->norm(op, team);
  return ffi::Error::Success();
}

ffi::Error Rotate(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> cos,
                  ffi::Buffer<ffi::F32> sin, ffi::Buffer<ffi::S32> tokens,
                  ffi::Buffer<ffi::S32> layer, ffi::RemainingArgs weights,
                  ffi::Result<ffi::AnyBuffer> out, float eps) {
  slipway::Rotate op{};
  op.type = type_of(x.element_type());
  op.tokens = live(tokens, x.dimensions()[0]), op.heads = x.dimensions()[1],
  op.head_dim = x.dimensions()[2];
  op.x = x.untyped_data(),
  op.weight = weights.size() ? pick(weights, 1, 0, layer.typed_data()[0]) : nullptr;
  op.cos = cos.typed_data(), op.sin = sin.typed_data(), op.eps = eps, op.out = out->untyped_data();
  PoolTeam team(pool, op.tokens * op.heads * op.head_dim < kAloneNumbers);
  slipway::kernels()->rotate(op, team);
  return ffi::Error::Success();
}

ffi::Error Sample(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::S32> rows,
                  ffi::Buffer<ffi::F32> temperature, ffi::Buffer<ffi::S32> top_k,
                  ffi::Buffer<ffi::F32> top_p, ffi::Buffer<ffi::F32> min_p,
                  ffi::Buffer<ffi::F32> uniform, ffi::Result<ffi::Buffer<ffi::S32>> token) {
  slipway::Sample op{};
  op.rows = live(rows, logits.dimensions()[0]), op.vocab = logits.dimensions()[1];
  op.logits = logits.typed_data(), op.temperature = temperature.typed_data(),
  op.top_k = top_k.typed_data();
  op.top_p = top_p.typed_data(), op.min_p = min_p.typed_data(), op.uniform = uniform.typed_data();
  op.token = token->typed_data();
  PoolTeam team(pool, op.rows * op.vocab < kAloneNumbers);
  slipway::kernels()->sample(op, team);
  return ffi::Error::Success();
}

ffi::Error LogNormalizer(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits,
                         ffi::Buffer<ffi::S32> rows, ffi::Result<ffi::Buffer<ffi::F32>> largest,
                         ffi::Result<ffi::Buffer<ffi::F32>> log_sum) {
  slipway::LogNormalizer op{};
  op.rows = live(rows, logits.dimensions()[0]), op.vocab = logits.dimensions()[1];
  op.logits = logits.typed_data(), op.largest = largest->typed_data(),
  op.log_sum = log_sum->typed_data();
  PoolTeam team(pool, op.rows * op.vocab < kAloneNumbers);
  slipway::kernels()->log_normalizer(op, team);
  return ffi::Error::Success();
}

// Zeros that take no memory: whole pages are given back to the system, which hands out empty ones
// where they are touched.
ffi::Error Zeros(ffi::Result<ffi::AnyBuffer> out) {
  char *data = static_cast<char*>(out->untyped_data()), *end = data + out->size_bytes();
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  char* first =
      reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(data) + page - 1) / page * page);
  char* last = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(end) / page * page);
  if (first < last) {
    *first = 1;  // to see whether this memory is of the kind that comes back empty
    if (madvise(first, last - first, MADV_DONTNEED) || *first) first = last = end;
  } else {
    first = last = end;
  }
  std::memset(data, 0, first - data);
  std::memset(last, 0, end - last);
  return ffi::Error::Success();
}

slipway::Cache cache_of(ffi::AnyBuffer kv, void* data, int32_t layer) {  // [L][P][K][2][S][H]
  const auto d = kv.dimensions();
  const int64_t layer_bytes =
      d[1] * d[2] * d[3] * d[4] * d[5] * static_cast<int64_t>(ffi::ByteWidth(kv.element_type()));
  const Type type = kv.element_type() == ffi::DataType::F32 ? Type::kFloat : Type::kBFloat16;
  return {type, d[1], d[2], d[4], d[5], static_cast<char*>(data) + layer * layer_bytes};
}

ffi::Error WriteKv(ffi::ThreadPool pool, ffi::AnyBuffer kv, ffi::Buffer<ffi::S32> layer,
                   ffi::AnyBuffer keys, ffi::AnyBuffer values, ffi::Buffer<ffi::S32> tokens,
                   ffi::Buffer<ffi::S32> slots, ffi::Result<ffi::AnyBuffer> out) {
  if (out->untyped_data() != kv.untyped_data())
    return ffi::Error::Internal("write_kv: the cache was copied, not updated in place");
  slipway::WriteKv op{};
  op.cache = cache_of(kv, out->untyped_data(), layer.typed_data()[0]);
  op.ragged.tokens = live(tokens, slots.element_count());
  op.ragged.slots = slots.typed_data();
  op.keys = keys.untyped_data(), op.values = values.untyped_data();
  PoolTeam team(pool, op.ragged.tokens * static_cast<int64_t>(keys.size_bytes()) < kAloneBytes);
  slipway::kernels()->write_kv(op, team);
  return ffi::Error::Success();
}

ffi::Error Attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer kv,
                     ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> positions,
                     ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> counts,
                     ffi::Buffer<ffi::S32> page_table, ffi::RemainingArgs sinks,
                     ffi::Result<ffi::AnyBuffer> out, float scale, int64_t window, float soft_cap) {
  slipway::Attention op{};
  op.cache = cache_of(kv, kv.untyped_data(), layer.typed_data()[0]);
  op.ragged.rows = counts.element_count(), op.ragged.table_width = page_table.dimensions()[1];
  op.ragged.positions = positions.typed_data(), op.ragged.starts = starts.typed_data();
  op.ragged.counts = counts.typed_data(), op.ragged.page_table = page_table.typed_data();
  op.heads = q.dimensions()[1], op.scale = scale, op.soft_cap = soft_cap, op.window = window;
  if (sinks.size() == 1) {
    auto held = sinks.get<ffi::Buffer<ffi::F32>>(0);
    if (held.has_error()) return held.error();
    op.sinks = held->typed_data();
  }
  op.q = q.untyped_data(), op.out = out->untyped_data();
  int64_t keys = 0;
  for (int64_t row = 0; row < op.ragged.rows; ++row)
    if (op.ragged.counts[row] > 0)
      keys += op.ragged.counts[row] *
              (1 + op.ragged.positions[op.ragged.starts[row] + op.ragged.counts[row] - 1]);
  PoolTeam team(pool, keys * op.heads * op.cache.head_dim < kAloneBytes);
  slipway::kernels()->attention(op, team);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_linear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("gated")
                                  .Attr<bool>("biased")
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_embed, Embed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_norm, Norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_rotate, Rotate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_sample, Sample,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_log_normalizer, LogNormalizer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_zeros, Zeros, ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_write_kv, WriteKv,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_attention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("soft_cap"));
