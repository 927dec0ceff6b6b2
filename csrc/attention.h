// Attention to the paged KV cache, and writes of keys and values into it.
//
// Not here: layout of the cache (struct Cache in kernels.h), products of matrices (amx.h, simd.h).
//
// The work is divided into items. An item is a piece of one sequence, for one KV head: up to
// kQueryRows rows, each of them one query head of one token. An item passes the keys in blocks of
// kBlock, at positions that are multiples of kBlock, and keeps a maximum and a sum for each row
// (online softmax: Milakov and Gimelshein, 2018). So the bits of a row depend only on its sequence,
// not on the batch. Padding is never read, and the cost follows the number of keys that are seen.

#pragma once

#include "amx.h"

namespace slipway {
namespace SLIPWAY_ISA {

constexpr int64_t kBlock = 64;      // keys between two updates of the maximum of a row
constexpr int64_t kGroup = 16;      // keys that lie in one page, whatever the page size
constexpr int64_t kQueryRows = 48;  // approximate number of rows of an item
constexpr int64_t kPieces = 8;      // consecutive pieces of a sequence that use one KV head
constexpr float kMasked = -1e30f;   // masked score; finite, so rows without keys have no NaN

// Return the keys (`which` 0) or the values (1) of one page and KV head.
template <class T>
uint32_t* block_of(const Cache& cache, int64_t page, int64_t head, int which) {
  const int64_t units = cache.page_size * cache.head_dim / T::kPerUnit;
  return static_cast<uint32_t*>(cache.data) + ((page * cache.kv_heads + head) * 2 + which) * units;
}

// Keys or values of one head: those of token t lie `distance` bytes after those of token t - 1.
struct Rows {
  const uint8_t* first;
  int64_t distance;
  const uint8_t* operator[](int64_t t) const { return first + t * distance; }
};

// Write `count` keys to neighbouring slots of one page. kLanes keys that fill a line are transposed
// in registers, kLanes units at a time.
template <class T>
void write_keys(const Cache& cache, int64_t slot, int64_t head, const Rows& keys, int64_t count) {
  const int64_t S = cache.page_size, units = cache.head_dim / T::kPerUnit;
  uint32_t* out = block_of<T>(cache, slot / S, head, 0) + slot % S;
  int64_t d = 0;
#if defined(__AVX512F__)
  for (; count == kLanes && d + kLanes <= units; d += kLanes) {
    U w[kLanes];
    for (int i = 0; i < kLanes; ++i) w[i] = load<U>(keys[i] + 4 * d);
    transpose(w);
    for (int i = 0; i < kLanes; ++i) store(out + (d + i) * S, w[i]);
  }
#endif
  for (; d < units; ++d)
    for (int64_t i = 0; i < count; ++i) std::memcpy(out + d * S + i, keys[i] + 4 * d, 4);
}

// Write `count` values to neighbouring slots of one page. With two numbers in a unit, the values of
// two neighbouring slots share a row of units.
template <class T>
void write_values(const Cache& cache, int64_t slot, int64_t head, const Rows& values,
                  int64_t count) {
  constexpr int64_t P = T::kPerUnit, size = 4 / P;
  const int64_t D = cache.head_dim, first = slot % cache.page_size;
  uint32_t* block = block_of<T>(cache, slot / cache.page_size, head, 1);
  for (int64_t i = 0; i < count;) {
    const int64_t place = first + i;
    uint32_t* out = block + place / P * D;
    int64_t d = 0;
    const bool pair = P == 2 && place % 2 == 0 && i + 1 < count;
    if (P == 1) {
      std::memcpy(out, values[i], 4 * D);
      d = D;
    }
    for (; pair && d + kLanes <= D; d += kLanes) {
      const U low = __builtin_convertvector(load<H>(values[i] + 2 * d), U);
      const U high = __builtin_convertvector(load<H>(values[i + 1] + 2 * d), U);
      store(out + d, low | (high << 16));
    }
    for (int64_t one = 0; one < 1 + pair; ++one)
      for (int64_t at = d; at < D; ++at)
        std::memcpy(reinterpret_cast<uint8_t*>(out + at) + (place + one) % P * size,
                    values[i + one] + size * at, size);
    i += 1 + pair;
  }
}

// Write keys and values of all tokens; each item is one KV head.
template <class T>
void write_kv_of(const WriteKv& op, Team& team) {
  team.run(
      op.cache.kv_heads, 1, 0,
      [](const void* context, int64_t head, void*) {
        const WriteKv& op = *static_cast<const WriteKv*>(context);
        const int64_t bytes = op.cache.head_dim * 4 / T::kPerUnit, row = bytes * op.cache.kv_heads;
        const int32_t* slots = op.ragged.slots;
        for (int64_t t = 0, count; t < op.ragged.tokens; t += count) {
          count = 1;  // tokens from t on, with neighbouring slots in one group of kGroup
          while (t + count < op.ragged.tokens && slots[t + count] == slots[t] + count &&
                 slots[t + count] % kGroup)
            ++count;
          if (slots[t] < 0 || slots[t] >= op.cache.pages * op.cache.page_size) continue;
          const int64_t at = t * row + head * bytes;
          write_keys<T>(op.cache, slots[t], head, {static_cast<const uint8_t*>(op.keys) + at, row},
                        count);
          write_values<T>(op.cache, slots[t], head,
                          {static_cast<const uint8_t*>(op.values) + at, row}, count);
        }
      },
      &op);
}

inline void write_kv(const WriteKv& op, Team& team) {
  op.cache.type == Type::kFloat ? write_kv_of<Float>(op, team) : write_kv_of<BFloat16>(op, team);
}

// Part of the work: `tokens` tokens of batch row `row` from flat token `first` on, for one KV head.
struct Item {
  int64_t row, first, tokens;
  int64_t seen;    // keys that the last of the tokens sees, from the first of the sequence on
  int64_t oldest;  // position of the oldest key that the first token sees
  int64_t head;    // KV head

  int64_t first_block() const { return oldest / kBlock * kBlock; }
};

// Memory of one item. u: numbers of a unit.
struct ItemScratch {
  int64_t rows;                 // tokens of the item x query heads of a KV head
  int64_t width;                // head_dim rounded up to a multiple of kLanes
  uint32_t* q = nullptr;        // [rows][head_dim / u]
  float* scores = nullptr;      // [rows][kBlock]
  uint32_t* weights = nullptr;  // [rows][kBlock / u]
  float* o = nullptr;           // [rows][width]: weighted sums of values, not yet normalized
  float* peak = nullptr;        // [rows]: maximum of the scores so far
  float* total = nullptr;       // [rows]: sum of the weights so far
  uint32_t* end = nullptr;      // end of the memory in use
  uint32_t* values = nullptr;   // [kBlock / u][width]: copy of values that cannot be read in place
};

// Round `n` up to a multiple of `to`.
inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Divide `memory` among the arrays of an item. With memory at address 0, the end is the size in
// bytes.
inline ItemScratch scratch_at(void* memory, int64_t rows, int64_t head_dim) {
  ItemScratch scratch{rows, padded(head_dim, kLanes)};
  uint32_t* at = static_cast<uint32_t*>(memory);
  rows = padded(rows, kRowsAtOnce);
  auto take = [&at](int64_t units) {
    uint32_t* taken = at;
    at += (units + 15) / 16 * 16;
    return taken;
  };
  scratch.q = take(rows * head_dim);
  scratch.scores = reinterpret_cast<float*>(take(rows * kBlock));
  scratch.weights = take(rows * kBlock);
  scratch.o = reinterpret_cast<float*>(take(rows * scratch.width));
  scratch.peak = reinterpret_cast<float*>(take(rows));
  scratch.total = reinterpret_cast<float*>(take(rows));
  scratch.values = take(kBlock * scratch.width);
  scratch.end = at;
  return scratch;
}

// Keys of one head, from position `first` on, in the pages of a sequence. If `count` is 0, there is
// no block.
struct Block {
  const int32_t* pages;
  int64_t head, first, count;

  Block(const Attention& op, const Item& item, int64_t first)
      : pages(op.ragged.page_table + item.row * op.ragged.table_width),
        head(item.head),
        first(first),
        count(item.seen - first < kBlock ? item.seen - first : kBlock) {}

  // Return where key `s` of the block, or its value, lies.
  template <class T>
  const uint32_t* key(const Attention& op, int64_t s) const {
    return block_of<T>(op.cache, pages[(first + s) / op.cache.page_size], head, 0) +
           (first + s) % op.cache.page_size;
  }
  template <class T>
  const uint32_t* value(const Attention& op, int64_t s) const {
    const int64_t S = op.cache.page_size, D = op.cache.head_dim;
    return block_of<T>(op.cache, pages[(first + s) / S], head, 1) +
           (first + s) % S / T::kPerUnit * D;
  }
};

// Compute scores[r][s] = q[r] . key[s] for all keys of the block. Scores after the last key of the
// block are undefined.
template <class T>
void score(const Attention& op, const Block& block, const Block& next, const ItemScratch& scratch) {
  const int64_t S = op.cache.page_size, units = op.cache.head_dim / T::kPerUnit;
  const uint32_t *columns[kWideCols], *later[kWideCols];
  for (int64_t first = 0, cols; first < block.count; first += cols * kLanes) {
    cols = columns_for(scratch.rows, (block.count - first + kLanes - 1) / kLanes);
    for (int64_t j = 0, s = first; j < cols; ++j, s += kLanes) {
      columns[j] = block.key<T>(op, s);
      later[j] = s < next.count ? next.key<T>(op, s) : columns[j];
    }
    const Operand keys{columns, later, units, units, S};
    // This choice depends only on head_dim, so that results do not depend on the batch.
    const auto multiply = units % 16 ? products<T, kUnitsAtOnce> : products<T, 16>;
    multiply(cols, scratch.rows, scratch.q, units, keys, scratch.scores + first, kBlock, true);
  }
}

// Turn the scores of one row into weights: scale, cap, mask, and exponential of the distance to the
// maximum. If the block raises the maximum, scale the sums of earlier blocks.
//
// kSeesAll: no key of the block is masked for this row. position: of the token of the row. first,
// count: keys of the block.
template <class T, bool kSeesAll>
void update_weights(const Attention& op, int64_t position, int64_t first, int64_t count,
                    int64_t row, const ItemScratch& scratch) {
  float* scores = scratch.scores + row * kBlock;
  I at;
  for (int i = 0; i < kLanes; ++i) at[i] = i;
  const int32_t stop = static_cast<int32_t>(position + 1 - first);
  const int32_t start =
      op.window ? static_cast<int32_t>(position + 1 - op.window - first) : INT32_MIN;
  F peak = all(kMasked);
  for (int64_t s = 0; s < count; s += kLanes) {
    F x = load<F>(scores + s) * op.scale;
    if (op.soft_cap > 0) x = (1.0f - 2.0f / (exp(x * (2.0f / op.soft_cap)) + 1.0f)) * op.soft_cap;
    const I here = at + static_cast<int32_t>(s);
    if (!kSeesAll) x = select((here < stop) & (here >= start), x, all(kMasked));
    store(scores + s, x);
    peak = max(peak, x);
  }
  const float before = scratch.peak[row], highest_here = highest(peak);
  const float now = highest_here > before ? highest_here : before;
  F total = {};
  for (int64_t s = 0; s < count; s += kLanes) {
    F p = exp(load<F>(scores + s) - now);
    const I here = at + static_cast<int32_t>(s);
    if (!kSeesAll) p = select((here < stop) & (here >= start), p, F{});
    total = total + p;
    T::write(scratch.weights + row * kBlock / T::kPerUnit, s, p, kLanes);
  }
  scratch.peak[row] = now;
  if (now == before) {
    scratch.total[row] += sum(total);
    return;
  }
  const float shrink = exp(all(before - now))[0];
  scratch.total[row] = scratch.total[row] * shrink + sum(total);
  for (int64_t d = 0; d < scratch.width; d += kLanes)
    store(scratch.o + row * scratch.width + d,
          load<F>(scratch.o + row * scratch.width + d) * shrink);
}

// Return the values of a block as an operand. Its addresses are written to `bases`, those of the
// next block to `later`.
//
// Values are read from their pages where possible. A copy is made of all values if head_dim is not
// a multiple of kLanes, and of the last segment if its rows are not all written. The copy has zeros
// in lanes after head_dim and in rows without a token.
template <class T>
Operand values_of(const Attention& op, const Block& block, const Block& next,
                  const ItemScratch& scratch, const uint32_t** bases, const uint32_t** later) {
  const int64_t S = op.cache.page_size, D = op.cache.head_dim, count = block.count;
  // keys of a block that lie in one page, whatever the first one
  const int64_t together = (S & -S) < kBlock ? S & -S : kBlock;
  const int64_t rows = (count + T::kPerUnit - 1) / T::kPerUnit, segment = together / T::kPerUnit;
  int64_t segments = 0;
  for (int64_t s = 0; s < count; s += together, ++segments) {
    bases[segments] = block.value<T>(op, s);
    later[segments] = s < next.count ? next.value<T>(op, s) : bases[segments];
  }
  const bool fills = D == scratch.width;
  const int64_t all = padded(rows, kUnitsAtOnce);
  const int64_t first = fills ? (rows - 1) / segment * segment : 0;
  if (fills && all == rows && count % T::kPerUnit == 0) return {bases, later, rows, segment, D};
  std::memset(scratch.values, 0, 4 * scratch.width * (all - first));
  for (int64_t r = first; r < rows; ++r)
    std::memcpy(scratch.values + (r - first) * scratch.width, block.value<T>(op, r * T::kPerUnit),
                4 * D);
  if (count % T::kPerUnit)
    for (int64_t d = 0; d < D; ++d)
      scratch.values[(rows - 1 - first) * scratch.width + d] &= 0xffffu;
  if (fills) {
    bases[segments - 1] = scratch.values;
    return {bases, later, all, segment, D};
  }
  bases[0] = later[0] = scratch.values;
  return {bases, later, all, all, scratch.width};
}

// Add the weighted values of a block: o[r] += sum over its keys s of weight[r][s] * value[s].
template <class T>
void add_values(const Attention& op, const Block& block, const Block& next,
                const ItemScratch& scratch) {
  constexpr int64_t kSegments = kBlock / kGroup;
  const uint32_t *bases[kSegments], *after[kSegments];
  const uint32_t *columns[kWideCols * kSegments], *later[kWideCols * kSegments];
  const Operand values = values_of<T>(op, block, next, scratch, bases, after);
  const int64_t segments = (values.rows + values.segment - 1) / values.segment;
  for (int64_t d = 0, cols; d < scratch.width; d += cols * kLanes) {
    cols = columns_for(scratch.rows, (scratch.width - d) / kLanes);
    for (int64_t s = 0; s < segments; ++s)
      for (int64_t j = 0; j < cols; ++j) {
        columns[s * cols + j] = bases[s] + d + j * kLanes;
        later[s * cols + j] = after[s] + d + j * kLanes;
      }
    const Operand b{columns, later, values.rows, values.segment, values.step};
    products<T, kUnitsAtOnce>(cols, scratch.rows, scratch.weights, kBlock / T::kPerUnit, b,
                              scratch.o + d, scratch.width, false);
  }
}

// Compute one item. `next` is the item that this thread probably computes afterwards: its first
// block is prefetched during the last block of this one.
template <class T>
void attend(const Attention& op, const Item& item, const Item& next, void* memory) {
  const int64_t D = op.cache.head_dim, units = D / T::kPerUnit;
  const int64_t group = op.heads / op.cache.kv_heads;
  const ItemScratch scratch = scratch_at(memory, item.tokens * group, D);
  const Tiles held(scratch.rows, kUnitsAtOnce);
  for (int64_t t = 0; t < item.tokens; ++t)
    std::memcpy(scratch.q + t * group * units,
                static_cast<const uint32_t*>(op.q) +
                    ((item.first + t) * op.heads + item.head * group) * units,
                4 * group * units);
  std::memset(scratch.o, 0, 4 * scratch.rows * scratch.width);
  for (int64_t r = 0; r < scratch.rows; ++r) {
    scratch.peak[r] = op.sinks ? op.sinks[item.head * group + r % group] : kMasked;
    scratch.total[r] = op.sinks ? 1.0f : 0.0f;
  }
  for (int64_t first = item.first_block(); first < item.seen; first += kBlock) {
    const Block block(op, item, first);
    const Block later = first + kBlock < item.seen ? Block(op, item, first + kBlock)
                                                   : Block(op, next, next.first_block());
    score<T>(op, block, later, scratch);
    for (int64_t r = 0; r < scratch.rows; ++r) {
      const int64_t position = op.ragged.positions[item.first + r / group];
      const bool sees_all = block.count % kLanes == 0 && position + 1 - first >= block.count;
      if (sees_all && (!op.window || position + 1 - op.window <= first))
        update_weights<T, true>(op, position, first, block.count, r, scratch);
      else
        update_weights<T, false>(op, position, first, block.count, r, scratch);
    }
    add_values<T>(op, block, later, scratch);
  }
  for (int64_t r = 0; r < scratch.rows; ++r) {
    const float share = scratch.total[r] > 0 ? 1.0f / scratch.total[r] : 0.0f;
    const int64_t row = (item.first + r / group) * op.heads + item.head * group + r % group;
    for (int64_t d = 0; d < D; d += kLanes)
      T::write(op.out, row * D + d, load<F>(scratch.o + r * scratch.width + d) * share, D - d);
  }
}

// Return item `i` of `items`; for i == items an item without keys. A piece is `piece` tokens.
//
// The order is reversed: last pieces of a sequence come first, because they see the most keys and
// take longest. Up to kPieces pieces of a sequence follow each other on one KV head, while its keys
// stay in the second-level cache. The heads of a sequence with one piece follow in order.
inline Item item_of(const Attention& op, int64_t piece, int64_t items, int64_t i) {
  int64_t left = items - 1 - i;
  for (int64_t row = 0; row < op.ragged.rows && left >= 0; ++row) {
    const int64_t heads = op.cache.kv_heads, count = op.ragged.counts[row];
    const int64_t held = (count + piece - 1) / piece;
    if (left >= held * heads) {
      left -= held * heads;
      continue;
    }
    const int64_t before = left / (kPieces * heads) * kPieces;
    const int64_t together = least(kPieces, held - before);
    left -= before * heads;
    const int64_t done = (before + left % together) * piece, first = op.ragged.starts[row] + done;
    const int64_t tokens = least(count - done, piece);
    const int64_t seen = op.ragged.positions[first + tokens - 1] + 1;
    const int64_t oldest = op.window ? op.ragged.positions[first] + 1 - op.window : 0;
    return {row, first, tokens, seen, oldest > 0 ? oldest : 0, heads - 1 - left / together};
  }
  return {};
}

// Compute attention of all tokens of a step.
template <class T>
void attention_of(const Attention& op, Team& team) {
  struct Call {
    const Attention& op;
    int64_t piece, items;
  };
  const int64_t group = op.heads / op.cache.kv_heads;
  const int64_t piece = kQueryRows / group > 1 ? kQueryRows / group : 1;
  int64_t pieces = 0, longest = 0;
  for (int64_t row = 0; row < op.ragged.rows; ++row) {
    const int64_t count = op.ragged.counts[row];
    pieces += (count + piece - 1) / piece;
    longest = count > longest ? count : longest;
  }
  const int64_t rows = (longest < piece ? longest : piece) * group;
  const ItemScratch none = scratch_at(nullptr, rows, op.cache.head_dim);
  const Call call{op, piece, pieces * op.cache.kv_heads};
  team.run(
      call.items, op.cache.kv_heads, reinterpret_cast<int64_t>(none.end),
      [](const void* context, int64_t i, void* memory) {
        const auto& [op, piece, items] = *static_cast<const Call*>(context);
        attend<T>(op, item_of(op, piece, items, i), item_of(op, piece, items, i + 1), memory);
      },
      &call);
}

inline void attention(const Attention& op, Team& team) {
  op.cache.type == Type::kFloat ? attention_of<Float>(op, team) : attention_of<BFloat16>(op, team);
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
