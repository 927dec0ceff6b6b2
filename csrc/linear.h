// Weights (out, in) times tokens: decides panels, the order of sums, and when weights are packed. One set per inclusion.
//
// Weights stay as they are mapped from the file: rows of units along `in`. A sum has kQuads parts: unit u of a row belongs
// to part u / 4 % kQuads; each part runs in order, and the parts are added in pairs. Both kernels below keep that order, so
// a token's result is the same bits whatever else is in the batch:
//   few tokens:  a vector holds the parts of four tokens, and rows are read as they lie, at the speed of memory;
//   many tokens: a vector holds one part of kLanes outputs, packed in the cache and used for every token.

#pragma once

#include "simd.h"

namespace slipway {
namespace SLIPWAY_ISA {

constexpr int kWidth = kTileCols * kLanes;  // outputs of a panel; a gated one holds half as many of either weight
constexpr int kFewRows = 4;                 // read side by side: 40 GB/s where 8 read 36 and 16 read 35
constexpr int64_t kTogether = 32;           // panels that a thread takes at once: 44 GB/s where one by one has 39
constexpr int64_t kChunk = 48;              // tokens between two looks at a packed panel
constexpr int64_t kPiece = 256;             // units that are packed at a time where all tokens are one chunk

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Matrices times the same tokens: the panels of one after those of the other.
struct Batch {
  const Linear* ops;
  int64_t count;
  int64_t outs;  // of a panel

  int64_t panels(const Linear& op) const { return (op.out_size + outs - 1) / outs; }
  int64_t panels() const {
    int64_t all = 0;
    for (int64_t i = 0; i < count; ++i) all += panels(ops[i]);
    return all;
  }
  // The matrix of a panel, and its number there.
  const Linear& at(int64_t& panel) const {
    int64_t i = 0;
    for (; panel >= panels(ops[i]); ++i) panel -= panels(ops[i]);
    return ops[i];
  }
};

template <class T>
struct Call {
  Batch batch;
  const Linear& op;     // the first: `x`, `tokens` and `in` are the same for all
  uint32_t* x;          // the tokens, in the order that the kernel reads them
  int64_t steps;        // of kLanes units, the last one filled up with zeros
  int64_t row_bytes() const { return op.in * 4 / T::kPerUnit; }
};

struct Panel {
  const uint8_t* rows[kWidth];     // past the last output: the last one again
  const uint8_t* next[kTileCols];  // where the columns of the next panel start
};

// kLanes units of a row from step `t` on; zeros past its end.
ALWAYS U load_step(const uint8_t* row, int64_t t, int64_t row_bytes) {
  return load_part<U>(row + 4 * kLanes * t, (row_bytes - 4 * kLanes * t) / 4);
}

// Four tokens for `few`, those past the last zeros: for each step and c < 4 a vector whose lane 4 q + i is unit 4 q + c of
// token i; fours side by side.
template <class T>
void interleave(const Call<T>& call, int64_t four) {
  const int64_t fours = (call.op.tokens + 3) / 4, row_bytes = call.row_bytes();
  for (int64_t t = 0; t < call.steps; ++t) {
    U x[4] = {};
    for (int64_t i = 0; i < least(4, call.op.tokens - 4 * four); ++i)
      x[i] = load_step(static_cast<const uint8_t*>(call.op.x) + (4 * four + i) * row_bytes, t, row_bytes);
    quads(x);
    for (int c = 0; c < 4; ++c) store(call.x + ((t * 4 + c) * fours + four) * kLanes, x[c]);
  }
}

// Adds up the parts of four tokens.
ALWAYS void join_parts(F parts, float* sums) {
  float p[kLanes];
  store(p, parts);
  for (int i = 0; i < 4; ++i) {
    if constexpr (kQuads == 4)
      sums[i * kWidth] = (p[i] + p[4 + i]) + (p[8 + i] + p[12 + i]);
    else if constexpr (kQuads == 2)
      sums[i * kWidth] = p[i] + p[4 + i];
    else
      sums[i * kWidth] = p[i];
  }
}

template <class T, int kFours>
void few_of(const Call<T>& call, const Panel& panel, float* sums) {
  const int64_t row_bytes = call.row_bytes();
  for (int first = 0; first < kWidth; first += kFewRows) {
    F acc[kFewRows][kFours] = {};
    // the rows after these are fetched, in the order of memory
    const uint8_t* next = first + kFewRows < kWidth ? panel.rows[first + kFewRows] : panel.next[0];
    const uint32_t* x = call.x;
    for (int64_t t = 0; t < call.steps; ++t) {
      U w[kFewRows];
#pragma GCC unroll 4
      for (int r = 0; r < kFewRows; ++r) {
        w[r] = load_step(panel.rows[first + r], t, row_bytes);
        __builtin_prefetch(next, 0, 3);
        next += 4 * kLanes;
      }
#pragma GCC unroll 4
      for (uint32_t c = 0; c < 4; ++c) {
        U xs[kFours];
#pragma GCC unroll 4
        for (int f = 0; f < kFours; ++f, x += kLanes) xs[f] = load<U>(x);
#pragma GCC unroll 4
        for (int r = 0; r < kFewRows; ++r) {
          const U unit = __builtin_shuffle(w[r], kFirstOfQuad + c);
#pragma GCC unroll 4
          for (int f = 0; f < kFours; ++f) acc[r][f] = T::dot(acc[r][f], unit, xs[f]);
        }
      }
    }
    for (int r = 0; r < kFewRows; ++r)
      for (int f = 0; f < kFours; ++f) join_parts(acc[r][f], sums + 4 * f * kWidth + first + r);
  }
}

template <class T, int kFours = kFewTokens / 4>
void few(const Call<T>& call, const Panel& panel, float* sums) {
  if ((call.op.tokens + 3) / 4 == kFours)
    few_of<T, kFours>(call, panel, sums);
  else if constexpr (kFours > 1)
    few<T, kFours - 1>(call, panel, sums);
}

// A token for `many`: its parts one after the other.
template <class T>
void part(const Call<T>& call, int64_t token) {
  const uint8_t* row = static_cast<const uint8_t*>(call.op.x) + token * call.row_bytes();
  uint32_t* out = call.x + token * call.steps * kLanes;
  for (int64_t t = 0; t < call.steps; ++t) {
    uint32_t units[kLanes];
    store(units, load_step(row, t, call.row_bytes()));
    for (int q = 0; q < kQuads; ++q) std::memcpy(out + (q * call.steps + t) * 4, units + 4 * q, 16);
  }
}

// Steps `first` to `first + count` of a panel: for each part and unit of it one vector per column.
template <class T>
void pack(const Call<T>& call, const Panel& panel, int64_t first, int64_t count, uint32_t* packed) {
  for (int64_t t = 0; t < count; ++t)
    for (int j = 0; j < kTileCols; ++j) {
      U block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load_step(panel.rows[j * kLanes + i], first + t, call.row_bytes());
      transpose(block);
#pragma GCC unroll 16
      for (int u = 0; u < kLanes; ++u)
        store(packed + ((u / 4 * count + t) * 4 + u % 4) * kWidth + j * kLanes, block[u]);
    }
}

// Multiplies a chunk of tokens by what is packed; parts[q] [tokens][kWidth] are written or, if not `fresh`, added to.
template <class T>
void multiply(const Call<T>& call, int64_t token, int64_t tokens, int64_t first, int64_t count, const uint32_t* packed,
              float* parts, const uint8_t* const* next) {
  for (int q = 0; q < kQuads; ++q) {
    const uint32_t* columns[kTileCols];
    for (int j = 0; j < kTileCols; ++j) columns[j] = packed + q * count * 4 * kWidth + j * kLanes;
    const uint32_t* x = call.x + token * call.steps * kLanes + (q * call.steps + first) * 4;
    const uint8_t* ahead[kTileCols];
    for (int j = 0; j < kTileCols && next; ++j) ahead[j] = next[j] + q * count * 4 * 4 * kLanes;
    tiles<T, kTileCols>(tokens, x, call.steps * kLanes, {columns, count * 4, count * 4, kWidth},
                        parts + q * kChunk * kWidth, kWidth, first == 0, next ? ahead : nullptr);
  }
}

// Sums of a chunk from its parts, into the first.
inline void join_chunk(float* parts, int64_t tokens) {
  if constexpr (kQuads == 1) return;
  for (int64_t i = 0; i < tokens * kWidth; i += kLanes) {
    auto at = [parts, i](int q) { return load<F>(parts + q * kChunk * kWidth + i); };
    if constexpr (kQuads == 4)
      store(parts + i, (at(0) + at(1)) + (at(2) + at(3)));
    else
      store(parts + i, at(0) + at(1));
  }
}

// One token's sums of a panel, to where they belong.
template <class T>
void finish(const Linear& op, int64_t first, const float* sums, int64_t token) {
  for (int j = 0; j < (op.up ? 1 : kTileCols); ++j) {
    const int64_t at = first + j * kLanes, n = op.out_size - at;
    if (n <= 0) return;
    F y = load<F>(sums + j * kLanes);
    if (op.bias) y = y + T::read(op.bias, at, n);
    if (op.up) {
      F up = load<F>(sums + kLanes);
      if (op.up_bias) up = up + T::read(op.up_bias, at, n);
      y = y / (exp(F{} - y) + 1.0f) * up;
    }
    if (op.out_type == Type::kFloat)
      Float::write(op.out, token * op.out_size + at, y, n);
    else
      BFloat16::write(op.out, token * op.out_size + at, y, n);
  }
}

template <class T>
void many(const Call<T>& call, const Linear& op, const Panel& panel, int64_t first_out, float* parts, uint32_t* packed) {
  const int64_t tokens = op.tokens, steps = call.steps, piece = tokens <= kChunk ? kPiece / kLanes : steps;
  for (int64_t first = 0; first < steps; first += piece) {
    const int64_t count = least(piece, steps - first);
    pack(call, panel, first, count, packed);
    for (int64_t token = 0; token < tokens; token += kChunk) {
      const int64_t n = least(kChunk, tokens - token);
      const uint8_t* next[kTileCols];
      for (int j = 0; j < kTileCols; ++j) next[j] = panel.next[j] + first * kLanes * 4 * kLanes;
      multiply(call, token, n, first, count, packed, parts, token + n == tokens ? next : nullptr);
      if (first + count < steps) continue;
      join_chunk(parts, n);
      for (int64_t t = 0; t < n; ++t) finish<T>(op, first_out, parts + t * kWidth, token + t);
    }
  }
}

// The rows of a panel whose first output is `first`; a gated one holds half as many of gate and up each.
inline Panel panel_at(const Linear& op, int64_t first, int64_t outs, int64_t row_bytes) {
  Panel panel;
  for (int i = 0; i < kWidth; ++i) {
    const bool up = op.up && i >= kLanes;
    const uint8_t* weight = static_cast<const uint8_t*>(up ? op.up : op.weight);
    panel.rows[i] = weight + least(first + (up ? i - kLanes : i), op.out_size - 1) * row_bytes;
  }
  for (int j = 0; j < kTileCols; ++j) panel.next[j] = panel.rows[j * kLanes] + outs * row_bytes;
  return panel;
}

template <class T>
void panel_of(const Call<T>& call, int64_t item, void* scratch) {
  const Linear& op = call.batch.at(item);
  const int64_t first = item * call.batch.outs;
  const Panel panel = panel_at(op, first, call.batch.outs, call.row_bytes());
  float* sums = static_cast<float*>(scratch);
  if (op.tokens > kFewTokens)
    return many(call, op, panel, first, sums, reinterpret_cast<uint32_t*>(sums + kQuads * kChunk * kWidth));
  few(call, panel, sums);
  for (int64_t t = 0; t < op.tokens; ++t) finish<T>(op, first, sums + t * kWidth, t);
}

template <class T>
void linear_of(const Linear* ops, int64_t matrices, Team& team) {
  const Linear& op = ops[0];
  const int64_t units = (op.in + T::kPerUnit - 1) / T::kPerUnit, steps = (units + kLanes - 1) / kLanes;
  const bool is_few = op.tokens <= kFewTokens;
  Call<T> call{{ops, matrices, op.up ? kLanes : kWidth}, op, nullptr, steps};
  call.x = static_cast<uint32_t*>(team.shared(4 * (op.tokens + 3) / 4 * 4 * steps * kLanes));
  if (is_few) {
    for (int64_t four = 0; four < (op.tokens + 3) / 4; ++four) interleave(call, four);
  } else {
    team.run(op.tokens, 1, 0,
             [](const void* context, int64_t t, void*) { part(*static_cast<const Call<T>*>(context), t); }, &call);
  }
  const int64_t packed = (op.tokens <= kChunk ? least(kPiece / kLanes, steps) : steps) * kLanes * kWidth;
  team.run(call.batch.panels(), kTogether, 4 * (kQuads * kChunk * kWidth + (is_few ? 0 : packed)),
           [](const void* context, int64_t item, void* memory) {
             panel_of(*static_cast<const Call<T>*>(context), item, memory);
           },
           &call);
}

inline void linear(const Linear* ops, int64_t count, Team& team) {
  if (ops->tokens == 0) return;
  ops->type == Type::kFloat ? linear_of<Float>(ops, count, team) : linear_of<BFloat16>(ops, count, team);
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
