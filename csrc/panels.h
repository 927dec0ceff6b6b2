// Panels of weights, the tokens that they meet, and the completion of their outputs.
//
// Not here: the multiplications (quartets.h, rows.h), the order of the work (linear.h).
//
// A panel is kWidth rows of weights. It is cut into pieces of kPieceRows rows and one slice along
// `in`, so that a slice of a block of tokens stays in the first-level cache.

#pragma once

#include "simd.h"

namespace slipway {
namespace SLIPWAY_ISA {

// Rows of a panel, and half of them. A panel of a gated layer has kHalf rows of each matrix.
constexpr int kHalf = kLanes, kWidth = 2 * kHalf;
// Rows that are read side by side. Measured with one token: 4 rows read 40 GB/s, 8 rows 36, 16 rows
// 35.
constexpr int kPieceRows = 4;
constexpr int kGroups = kWidth / kPieceRows;
constexpr int64_t kLine = 4 * kLanes;  // bytes of a vector
// Distance of prefetched weights in bytes. Measured with 8 tokens: 16 kB read 43 GB/s, 8 kB 38.
constexpr int64_t kPrefetchBytes = 16384;
// Cache that data is prefetched into, as the compiler numbers it. Measured with bf16 weights on a
// Zen 4: into the second level, 1 token reads 1.2 and 8 tokens 1.8 times as fast.
constexpr int kIntoFirstLevel = 3, kIntoSecondLevel = 2;
// Panels that a thread takes at once. Measured: 32 panels read 44 GB/s, single panels 39.
constexpr int64_t kPanelsAtOnce = 32;

// Several matrices, each times its own tokens or all times the same. Their panels have consecutive
// numbers, matrix by matrix. All have the same `in`, types and packing.
struct Batch {
  const Linear* ops;
  int64_t count;
  int64_t outs;  // outputs of a panel
  bool equal;    // all matrices have the same number of outputs

  Batch(const Linear* ops, int64_t count, int64_t outs)
      : ops(ops), count(count), outs(outs), equal(true) {
    for (int64_t i = 1; i < count; ++i) equal = equal && ops[i].out_size == ops[0].out_size;
  }

  int64_t panels(const Linear& op) const { return (op.out_size + outs - 1) / outs; }
  int64_t panels() const {
    int64_t all = 0;
    for (int64_t i = 0; i < count; ++i) all += panels(ops[i]);
    return all;
  }
  // Return the number of the matrix of a panel, and turn `panel` into its number within it.
  int64_t find(int64_t& panel) const {
    int64_t i = equal ? panel / panels(ops[0]) : 0;
    panel -= i * panels(ops[0]);
    for (; panel >= panels(ops[i]); ++i) panel -= panels(ops[i]);
    return i;
  }
};

// Whether a matrix has the tokens of the matrix before it.
inline bool shares_tokens(const Linear* ops, int64_t i) {
  return i > 0 && ops[i].x == ops[i - 1].x;
}

// Places of the tokens of each matrix of a batch, one behind the other.
struct Places {
  int64_t inputs = 0, end = 0;  // matrices with tokens of their own; end of the last place
  int64_t* firsts;              // [count]

  // size: places that the tokens of a matrix take. firsts: memory for them.
  template <class Size>
  Places(const Batch& batch, int64_t* firsts, Size size) : firsts(firsts) {
    for (int64_t i = 0; i < batch.count; ++i) {
      const bool shared = shares_tokens(batch.ops, i);
      firsts[i] = shared ? firsts[i - 1] : end;
      if (shared) continue;
      end += size(batch.ops[i]);
      ++inputs;
    }
  }
};

// Load step `t` of a row: kLanes units, zeros after the end of the row.
ALWAYS U load_step(const uint8_t* row, int64_t t, int64_t row_bytes) {
  return load_part<U>(row + kLine * t, (row_bytes - kLine * t) / 4);
}

// Addresses of the rows of a panel.
struct Panel {
  const uint8_t* rows[kWidth];  // rows after the last output repeat its row
  int64_t next;                 // bytes from a row to the row of the same number in the next panel
};

// Return the panel with first output `first`, of weights or of their scales. `up` is null, or a
// panel has kHalf rows of `gate` and then kHalf rows of `up`.
inline Panel panel_at(const Linear& op, const void* gate, const void* up, int64_t first,
                      int64_t outs, int64_t row_bytes) {
  Panel panel;
  for (int i = 0; i < kWidth; ++i) {
    const bool upper = up && i >= kHalf;
    const auto* matrix = static_cast<const uint8_t*>(upper ? up : gate);
    panel.rows[i] = matrix + least(first + (upper ? i - kHalf : i), op.out_size - 1) * row_bytes;
  }
  panel.next = outs * row_bytes;
  return panel;
}

// Rows of numbers: the tokens of a matrix.
struct TokenRows {
  const uint8_t* at;
  int64_t count, bytes, steps;  // rows; bytes of a row; steps of a row
};

// Place of the sums of a piece with a block of tokens.
struct Sums {
  float* parts;   // what a kernel keeps from slice to slice
  bool is_first;  // the first slice: `parts` holds nothing yet
  float* done;    // null, or the place of the completed sums: [token][kWidth]
};

// Piece of a panel: kPieceRows rows, `count` steps from step `first` on. For each step it
// prefetches kPieceRows lines: they lie `line` bytes apart, and those of the next step `step` bytes
// later.
struct Piece {
  const uint8_t *const *rows, *ahead;  // rows of the piece; first line to prefetch
  int64_t line, step, first, count, row_bytes;
};

// Complete the outputs of one token from its sums of a panel: bias, gate, conversion to the type of
// `out`. first: first output of the panel.
template <class T>
ALWAYS void finish(const Linear& op, int64_t first, const float* sums, int64_t token) {
  for (int j = 0; j < (op.up ? 1 : kWidth / kLanes); ++j) {
    const int64_t at = first + j * kLanes, n = op.out_size - at;
    if (n <= 0) return;
    F y = load<F>(sums + j * kLanes);
    if (op.bias) y = y + T::read(op.bias, at, n);
    if (op.up) {
      F up = load<F>(sums + kHalf);
      if (op.up_bias) up = up + T::read(op.up_bias, at, n);
      y = y / (exp(F{} - y) + 1.0f) * up;
    }
    if (op.out_type == Type::kFloat)
      Float::write(op.out, token * op.out_size + at, y, n);
    else
      BFloat16::write(op.out, token * op.out_size + at, y, n);
  }
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
