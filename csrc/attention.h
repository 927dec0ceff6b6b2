// Attention over the paged cache, and writing into it: decides the cache's order of units, tiles and the online softmax.
//
// One item is some tokens of one sequence and one KV head; its rows are those tokens' query heads. Keys come in blocks of
// kBlock that lie at the same places whatever is asked, and each row's own running maximum and sum follow Milakov and
// Gimelshein, 2018: a row's bits depend on its sequence alone. Padding is never read; cost follows the keys that are seen.

#pragma once

#include "simd.h"

namespace slipway {
namespace SLIPWAY_ISA {

constexpr int64_t kBlock = 64;      // keys between two looks at the maximum
constexpr int64_t kGroup = 16;      // keys that lie together in a page of any size
constexpr int64_t kQueryRows = 48;  // rows of an item, about
constexpr float kMasked = -1e30f;   // finite, so that a row without keys stays free of NaN

template <class T>
uint32_t* block_of(const Cache& cache, int64_t page, int64_t head, int which) {
  const int64_t units = cache.page_size * cache.head_dim / T::kPerUnit;
  return static_cast<uint32_t*>(cache.data) + ((page * cache.kv_heads + head) * 2 + which) * units;
}

template <class T>
void write_row(const Cache& cache, int64_t slot, int64_t head, const uint8_t* key, const uint8_t* value) {
  const int64_t offset = slot % cache.page_size, S = cache.page_size, D = cache.head_dim;
  uint32_t* keys = block_of<T>(cache, slot / S, head, 0);
  for (int64_t d = 0; d < D / T::kPerUnit; ++d) std::memcpy(keys + d * S + offset, key + 4 * d, 4);
  uint8_t* values = reinterpret_cast<uint8_t*>(block_of<T>(cache, slot / S, head, 1));
  constexpr int64_t size = 4 / T::kPerUnit;
  values += (offset / T::kPerUnit * D * T::kPerUnit + offset % T::kPerUnit) * size;
  for (int64_t d = 0; d < D; ++d) std::memcpy(values + 4 * d, value + size * d, size);
}

template <class T>
void write_kv_of(const WriteKv& op, Team& team) {
  team.run(op.cache.kv_heads, 1, 0,
           [](const void* context, int64_t head, void*) {
             const WriteKv& op = *static_cast<const WriteKv*>(context);
             const Cache& cache = op.cache;
             const int64_t bytes = cache.head_dim * 4 / T::kPerUnit;
             for (int64_t t = 0; t < op.ragged.tokens; ++t) {
               const int64_t slot = op.ragged.slots[t], at = (t * cache.kv_heads + head) * bytes;
               if (slot < 0 || slot >= cache.pages * cache.page_size) continue;
               write_row<T>(cache, slot, head, static_cast<const uint8_t*>(op.keys) + at,
                            static_cast<const uint8_t*>(op.values) + at);
             }
           },
           &op);
}

inline void write_kv(const WriteKv& op, Team& team) {
  op.cache.type == Type::kFloat ? write_kv_of<Float>(op, team) : write_kv_of<BFloat16>(op, team);
}

struct Item {  // `tokens` of one sequence from flat token `first` on; `seen`: keys of the last of them
  int64_t row, first, tokens, seen, oldest;
};

// What one item works in: sizes in units or floats.
struct Desk {
  int64_t rows, width;  // of o: head_dim rounded up to lanes
  uint32_t* q;          // [rows][head_dim / u]
  float* scores;        // [rows][kBlock]
  uint32_t* weights;    // [rows][kBlock / u]
  float *o, *peak, *total;
  uint32_t *keys, *values;  // copies of pages that cannot be read where they lie
};

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline Desk lay_out(void* memory, int64_t rows, int64_t head_dim) {
  Desk desk{rows, padded(head_dim), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  uint32_t* at = static_cast<uint32_t*>(memory);
  auto take = [&at](int64_t units) {
    uint32_t* taken = at;
    at += (units + 15) / 16 * 16;
    return taken;
  };
  desk.q = take(rows * head_dim);
  desk.scores = reinterpret_cast<float*>(take(rows * kBlock));
  desk.weights = take(rows * kBlock);
  desk.o = reinterpret_cast<float*>(take(rows * desk.width));
  desk.peak = reinterpret_cast<float*>(take(rows));
  desk.total = reinterpret_cast<float*>(take(rows));
  desk.values = take(kBlock * desk.width);
  desk.keys = at;  // the end: how much was laid out
  return desk;
}

// The lines of the next block's pages, each with its keys and values, asked for bit by bit while this one is computed: pages
// lie apart, and the processor follows none into the next.
template <class T>
struct Ahead {
  const Attention& op;
  const int32_t* pages;
  int64_t head, page, end, at = 0;  // `at`: units of `page` that were asked for

  // The share of one call among the kTurns of a block.
  ALWAYS void take() {
    const int64_t units = 2 * op.cache.page_size * op.cache.head_dim / T::kPerUnit;
    for (int64_t left = (kBlock / kTurns) * 2 * op.cache.head_dim / T::kPerUnit; left > 0 && page < end; left -= kLine) {
      __builtin_prefetch(block_of<T>(op.cache, pages[page], head, 0) + at, 0, 2);
      at += kLine;
      if (at >= units) at = 0, ++page;
    }
  }
  static constexpr int64_t kLine = 16, kTurns = 8;
};

// scores[r][s] = q[r] . key[first + s] for the block's keys; those past `count` are left as they come out.
template <class T>
void score(const Attention& op, const int32_t* pages, int64_t head, int64_t first, int64_t count, const Desk& desk,
           Ahead<T>& ahead) {
  const int64_t S = op.cache.page_size, units = op.cache.head_dim / T::kPerUnit;
  for (int64_t s = 0; s < count; s += kTileCols * kLanes) {
    const uint32_t* columns[kTileCols];
    int held = 0;
    ahead.take();
    for (int j = 0; j < kTileCols && s + j * kLanes < count; ++j, ++held) {
      const int64_t at = first + s + j * kLanes;
      columns[j] = block_of<T>(op.cache, pages[at / S], head, 0) + at % S;
    }
    if (held == kTileCols) {
      tiles<T, kTileCols>(desk.rows, desk.q, units, {columns, units, units, S}, desk.scores + s, kBlock, true);
    } else {
      for (int j = 0; j < held; ++j)
        tiles<T, 1>(desk.rows, desk.q, units, {columns + j, units, units, S}, desk.scores + s + j * kLanes, kBlock,
                    true);
    }
  }
}

// One row's scores to weights: capped, masked, exponentiated; what was summed before is scaled to the new maximum.
template <class T, bool kSeesAll>
void soften(const Attention& op, int64_t position, int64_t first, int64_t count, int64_t row, const Desk& desk) {
  float* scores = desk.scores + row * kBlock;
  I at;
  for (int i = 0; i < kLanes; ++i) at[i] = i;
  const int32_t stop = static_cast<int32_t>(position + 1 - first);
  const int32_t start = op.window ? static_cast<int32_t>(position + 1 - op.window - first) : INT32_MIN;
  F peak = all(kMasked);
  for (int64_t s = 0; s < count; s += kLanes) {
    F x = load<F>(scores + s) * op.scale;
    if (op.soft_cap > 0) x = (1.0f - 2.0f / (exp(x * (2.0f / op.soft_cap)) + 1.0f)) * op.soft_cap;
    const I here = at + static_cast<int32_t>(s);
    if (!kSeesAll) x = select((here < stop) & (here >= start), x, all(kMasked));
    store(scores + s, x);
    peak = max(peak, x);
  }
  const float before = desk.peak[row], highest_here = highest(peak), now = highest_here > before ? highest_here : before;
  F total = {};
  for (int64_t s = 0; s < count; s += kLanes) {
    F p = exp(load<F>(scores + s) - now);
    const I here = at + static_cast<int32_t>(s);
    if (!kSeesAll) p = select((here < stop) & (here >= start), p, F{});
    total = total + p;
    T::write(desk.weights + row * kBlock / T::kPerUnit, s, p, kLanes);
  }
  desk.peak[row] = now;
  if (now == before) {
    desk.total[row] += sum(total);
    return;
  }
  const float shrink = exp(all(before - now))[0];
  desk.total[row] = desk.total[row] * shrink + sum(total);
  for (int64_t d = 0; d < desk.width; d += kLanes)
    store(desk.o + row * desk.width + d, load<F>(desk.o + row * desk.width + d) * shrink);
}

// Where the values of the block's keys lie: in their pages, or in a copy without lanes past the head and with zeros for
// neighbours that were never written.
template <class T>
Operand values_of(const Attention& op, const int32_t* pages, int64_t head, int64_t first, int64_t count,
                  const Desk& desk, const uint32_t** bases) {
  const int64_t S = op.cache.page_size, D = op.cache.head_dim;
  const int64_t together = (S & -S) < kBlock ? S & -S : kBlock;  // keys of a block that surely lie in one page
  const int64_t rows = (count + T::kPerUnit - 1) / T::kPerUnit, segment = together / T::kPerUnit;
  int64_t segments = 0;
  for (int64_t s = 0; s < count; s += together)
    bases[segments++] = block_of<T>(op.cache, pages[(first + s) / S], head, 1) + (first + s) % S / T::kPerUnit * D;
  if (D == desk.width && count % T::kPerUnit == 0) return {bases, rows, segment, D};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t s = first + r * T::kPerUnit;
    const uint32_t* from = block_of<T>(op.cache, pages[s / S], head, 1) + s % S / T::kPerUnit * D;
    std::memset(desk.values + r * desk.width, 0, 4 * desk.width);
    std::memcpy(desk.values + r * desk.width, from, 4 * D);
  }
  if (count % T::kPerUnit)
    for (int64_t d = 0; d < D; ++d) desk.values[(rows - 1) * desk.width + d] &= 0xffffu;
  bases[0] = desk.values;
  return {bases, rows, rows, desk.width};
}

// o[r] += sum over the block's keys of weight[r][s] * value[first + s].
template <class T>
void mix(const Attention& op, const int32_t* pages, int64_t head, int64_t first, int64_t count, const Desk& desk,
         Ahead<T>& ahead) {
  const uint32_t *bases[kBlock / kGroup], *columns[kTileCols * kBlock / kGroup];
  const Operand values = values_of<T>(op, pages, head, first, count, desk, bases);
  const int64_t segments = (values.rows + values.segment - 1) / values.segment;
  for (int64_t d = 0; d < desk.width; d += kTileCols * kLanes) {
    const bool whole = desk.width - d >= kTileCols * kLanes;
    const int64_t cols = whole ? kTileCols : 1;
    ahead.take();
    for (int64_t s = 0; s < segments; ++s)
      for (int64_t j = 0; j < cols; ++j) columns[s * cols + j] = bases[s] + d + j * kLanes;
    const Operand b{columns, values.rows, values.segment, values.step};
    if (whole)
      tiles<T, kTileCols>(desk.rows, desk.weights, kBlock / T::kPerUnit, b, desk.o + d, desk.width, false);
    else
      tiles<T, 1>(desk.rows, desk.weights, kBlock / T::kPerUnit, b, desk.o + d, desk.width, false);
  }
}

template <class T>
void attend(const Attention& op, const Item& item, int64_t head, void* memory) {
  const int64_t D = op.cache.head_dim, units = D / T::kPerUnit, group = op.heads / op.cache.kv_heads;
  const Desk desk = lay_out(memory, item.tokens * group, D);
  const int32_t* pages = op.ragged.page_table + item.row * op.ragged.table_width;
  for (int64_t t = 0; t < item.tokens; ++t)
    std::memcpy(desk.q + t * group * units,
                static_cast<const uint32_t*>(op.q) + ((item.first + t) * op.heads + head * group) * units,
                4 * group * units);
  std::memset(desk.o, 0, 4 * desk.rows * desk.width);
  for (int64_t r = 0; r < desk.rows; ++r) {
    desk.peak[r] = op.sinks ? op.sinks[head * group + r % group] : kMasked;
    desk.total[r] = op.sinks ? 1.0f : 0.0f;
  }
  for (int64_t first = item.oldest / kBlock * kBlock; first < item.seen; first += kBlock) {
    const int64_t count = item.seen - first < kBlock ? item.seen - first : kBlock, next = first + kBlock;
    const int64_t S = op.cache.page_size, stop = next + kBlock < item.seen ? next + kBlock : item.seen;
    Ahead<T> ahead{op, pages, head, next / S, next < item.seen ? (stop + S - 1) / S : 0};
    score<T>(op, pages, head, first, count, desk, ahead);
    for (int64_t r = 0; r < desk.rows; ++r) {
      const int64_t position = op.ragged.positions[item.first + r / group];
      const bool sees_all = count % kLanes == 0 && position + 1 - first >= count;
      if (sees_all && (!op.window || position + 1 - op.window <= first))
        soften<T, true>(op, position, first, count, r, desk);
      else
        soften<T, false>(op, position, first, count, r, desk);
      ahead.take();
    }
    mix<T>(op, pages, head, first, count, desk, ahead);
  }
  for (int64_t r = 0; r < desk.rows; ++r) {
    const float share = desk.total[r] > 0 ? 1.0f / desk.total[r] : 0.0f;
    const int64_t row = (item.first + r / group) * op.heads + head * group + r % group;
    for (int64_t d = 0; d < D; d += kLanes)
      T::write(op.out, row * D + d, load<F>(desk.o + r * desk.width + d) * share, D - d);
  }
}

// Which tokens item number `i` holds: rows of the batch in order, each cut into pieces of `piece` tokens.
inline Item item_of(const Attention& op, int64_t piece, int64_t i) {
  for (int64_t row = 0; row < op.ragged.rows; ++row) {
    const int64_t count = op.ragged.counts[row], pieces = (count + piece - 1) / piece;
    if (i >= pieces) {
      i -= pieces;
      continue;
    }
    const int64_t first = op.ragged.starts[row] + i * piece, tokens = count - i * piece < piece ? count - i * piece : piece;
    const int64_t seen = op.ragged.positions[first + tokens - 1] + 1;
    const int64_t oldest = op.window ? op.ragged.positions[first] + 1 - op.window : 0;
    return {row, first, tokens, seen, oldest > 0 ? oldest : 0};
  }
  return {};
}

template <class T>
void attention_of(const Attention& op, Team& team) {
  struct Call {
    const Attention& op;
    int64_t piece, pieces;
  };
  const int64_t group = op.heads / op.cache.kv_heads, piece = kQueryRows / group > 1 ? kQueryRows / group : 1;
  int64_t pieces = 0, longest = 0;
  for (int64_t row = 0; row < op.ragged.rows; ++row) {
    const int64_t count = op.ragged.counts[row];
    pieces += (count + piece - 1) / piece;
    longest = count > longest ? count : longest;
  }
  const int64_t rows = (longest < piece ? longest : piece) * group;
  const Desk none = lay_out(nullptr, rows, op.cache.head_dim);
  const Call call{op, piece, pieces};
  team.run(pieces * op.cache.kv_heads, 1, reinterpret_cast<int64_t>(none.keys),
           [](const void* context, int64_t i, void* memory) {
             const Call& call = *static_cast<const Call*>(context);
             // the last pieces of a prompt see the most keys: they come first
             const Item item = item_of(call.op, call.piece, call.pieces - 1 - i / call.op.cache.kv_heads);
             attend<T>(call.op, item, i % call.op.cache.kv_heads, memory);
           },
           &call);
}

inline void attention(const Attention& op, Team& team) {
  op.cache.type == Type::kFloat ? attention_of<Float>(op, team) : attention_of<BFloat16>(op, team);
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
