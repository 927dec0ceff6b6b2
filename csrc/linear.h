// Matrix multiplication of 16- and 32-bit weights by tokens, in vectors.
//
// Not here: bfloat16 tokens where the processor has AMX (tiled_linear.h), packed weights
// (quantized.h).
//
// Weights [out][in] stay as they are mapped from the file: rows of units along `in`. Each sum has
// kQuads parts: unit u of a row belongs to part u / 4 % kQuads. Each part is added in order, and
// the parts are added in pairs at the end. A quartet is four neighbouring tokens. A vector holds
// the parts of the sums of one quartet: lane 4 q + i is part q of its token i. So rows are read in
// the order of memory, and the bits of a result do not depend on the other tokens of the batch.
//
// A panel is kWidth rows of weights. It is cut into slices along `in`, so that a slice of a block
// of tokens stays in the first-level cache. Each block of tokens passes the panel separately. The
// first block prefetches weights, later blocks prefetch tokens.

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
// Panels that a thread takes at once. Measured: 32 panels read 44 GB/s, single panels 39.
constexpr int64_t kPanelsAtOnce = 32;
// Bytes of a slice of a block of tokens, so that it stays in the first-level cache.
constexpr int64_t kBlockBytes = 32768;

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

// Arguments of one call for all of its items.
template <class T>
struct Call {
  Batch batch;
  int64_t steps;          // of kLanes units along `in`; the last one is padded with zeros
  const int64_t* firsts;  // first quartet of each matrix
  uint32_t* x;            // tokens in the order that the kernel reads (`interleave`)

  int64_t row_bytes() const { return batch.ops->in * 4 / T::kPerUnit; }
};

// Load step `t` of a row: kLanes units, zeros after the end of the row.
ALWAYS U load_step(const uint8_t* row, int64_t t, int64_t row_bytes) {
  return load_part<U>(row + kLine * t, (row_bytes - kLine * t) / 4);
}

// Blocks of tokens: at most kQuartets quartets each, and of nearly equal size.
struct Blocks {
  int64_t quartets, count;  // quartets of all tokens; blocks

  explicit Blocks(int64_t tokens)
      : quartets((tokens + 3) / 4), count((quartets + kQuartets - 1) / kQuartets) {}

  // Return the first quartet of a block.
  int64_t first(int64_t block) const { return block * quartets / count; }
};

// Write one block of tokens of a matrix to call.x as [step][4][quartet][kLanes]: lane 4 q + i of
// vector c is unit 4 q + c of the step, of token i of the quartet. Missing tokens of the last
// quartet are zeros.
template <class T>
void interleave(const Call<T>& call, int64_t matrix, int64_t block) {
  const Linear& op = call.batch.ops[matrix];
  const Blocks blocks(op.tokens);
  const int64_t row_bytes = call.row_bytes(), first = blocks.first(block);
  const int64_t quartets = blocks.first(block + 1) - first;
  uint32_t* out = call.x + (call.firsts[matrix] + first) * call.steps * 4 * kLanes;
  for (int64_t t = 0; t < call.steps; ++t, out += 4 * quartets * kLanes)
    for (int64_t quartet = 0; quartet < quartets; ++quartet) {
      const int64_t token = 4 * (first + quartet);
      U x[4] = {};
      for (int64_t i = 0; i < least(4, op.tokens - token); ++i)
        x[i] = load_step(static_cast<const uint8_t*>(op.x) + (token + i) * row_bytes, t, row_bytes);
      quads(x);
      for (int c = 0; c < 4; ++c) store(out + (c * quartets + quartet) * kLanes, x[c]);
    }
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

// Piece of a panel: kPieceRows rows, `count` steps from step `first` on. For each step it
// prefetches kPieceRows lines: they lie `line` bytes apart, and those of the next step `step` bytes
// later.
struct Piece {
  const uint8_t *const *rows, *ahead;  // rows of the piece; first line to prefetch
  int64_t line, step, first, count, row_bytes;
};

// Multiply a piece by a block of kBlock quartets.
//
// parts: [quartet][row][kLanes], the parts of the sums after the steps so far; not read if
// `is_first`. sums: null, or the place of the completed sums, [token][kWidth], instead of `parts`.
template <class T, int kBlock>
void multiply_piece(const Piece& piece, const uint32_t* x, float* parts, bool is_first,
                    float* sums) {
  const int64_t line = piece.line, step = piece.step, row_bytes = piece.row_bytes;
  const uint8_t* ahead = piece.ahead;
  F acc[kBlock][kPieceRows] = {};
#pragma GCC unroll 4
  for (int f = 0; f < kBlock && !is_first; ++f)
#pragma GCC unroll 4
    for (int r = 0; r < kPieceRows; ++r) acc[f][r] = load<F>(parts + (f * kPieceRows + r) * kLanes);
  for (int64_t t = piece.first; t < piece.first + piece.count; ++t, ahead += step) {
    U w[kPieceRows];
#pragma GCC unroll 4
    for (int r = 0; r < kPieceRows; ++r) {
      w[r] = load_step(piece.rows[r], t, row_bytes);
      __builtin_prefetch(ahead + r * line, 0, 3);
    }
#pragma GCC unroll 4
    for (uint32_t c = 0; c < 4; ++c) {
      U xs[kBlock];
#pragma GCC unroll 4
      for (int f = 0; f < kBlock; ++f, x += kLanes) xs[f] = load<U>(x);
#pragma GCC unroll 4
      for (int r = 0; r < kPieceRows; ++r) {
        const U unit = __builtin_shuffle(w[r], kFirstOfQuad + c);
#pragma GCC unroll 4
        for (int f = 0; f < kBlock; ++f) acc[f][r] = T::dot(acc[f][r], unit, xs[f]);
      }
    }
  }
#pragma GCC unroll 4
  for (int f = 0; f < kBlock; ++f) {
    if (sums) {
      float joined[4 * kPieceRows];
      add_quads(acc[f], joined);
      for (int i = 0; i < 4; ++i)
        std::memcpy(sums + (4 * f + i) * kWidth, joined + i * kPieceRows, 4 * kPieceRows);
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < kPieceRows; ++r) store(parts + (f * kPieceRows + r) * kLanes, acc[f][r]);
    }
  }
}

// Multiply a piece by a block of `quartets` quartets, a number from 1 to kBlock.
template <class T, int kBlock = kQuartets>
void multiply_piece(int64_t quartets, const Piece& piece, const uint32_t* x, float* parts,
                    bool is_first, float* sums) {
  if (quartets == kBlock)
    multiply_piece<T, kBlock>(piece, x, parts, is_first, sums);
  else if constexpr (kBlock > 1)
    multiply_piece<T, kBlock - 1>(quartets, piece, x, parts, is_first, sums);
}

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

// Division of a panel into pieces of kPieceRows rows and `slice` steps. All rows of a slice come
// before the next slice.
struct Cut {
  int64_t slice, slices, pieces;
  int64_t fetched;  // distance of the prefetched piece

  Cut(int64_t steps, const Blocks& blocks) {
    slice = least(steps, kBlockBytes / (4 * kLine * least(blocks.quartets, kQuartets)));
    slices = (steps + slice - 1) / slice;
    pieces = slices * kGroups;
    fetched = (kPrefetchBytes + slice * kLine * kPieceRows - 1) / (slice * kLine * kPieceRows);
  }
};

// Scratch memory of a thread: floats of the parts of a block of tokens; bytes of parts and sums.
constexpr int64_t kParts = kQuartets * kWidth * kLanes;
constexpr int64_t kScratch = 4 * (kParts + 4 * kQuartets * kWidth);

// Multiply a panel by one block of tokens. first_quartet: of the panel's matrix.
template <class T>
void multiply_block(const Call<T>& call, int64_t first_quartet, const Panel& panel,
                    const Blocks& blocks, int64_t block, float* parts, float* sums) {
  const Cut cut(call.steps, blocks);
  const int64_t row_bytes = call.row_bytes();
  const int64_t quartets = blocks.first(block + 1) - blocks.first(block);
  for (int64_t i = 0; i < cut.pieces; ++i) {
    const int64_t group = i % kGroups, first = i / kGroups * cut.slice;
    const int64_t count = least(cut.slice, call.steps - first);
    const int64_t before = (first_quartet + blocks.first(block)) * call.steps + first * quartets;
    const uint32_t* x = call.x + before * 4 * kLanes;
    Piece piece{panel.rows + group * kPieceRows, nullptr, 0, 0, first, count, row_bytes};
    if (block == 0) {
      // Prefetch weights: lines of whole rows in the order of memory, lines of slices in the order
      // in which they are read.
      const int64_t later = i + cut.fetched, at = later % cut.pieces / kGroups * cut.slice * kLine;
      piece.ahead =
          panel.rows[later % kGroups * kPieceRows] + at + (later < cut.pieces ? 0 : panel.next);
      piece.line = cut.slices == 1 ? kLine : row_bytes;
      piece.step = cut.slices == 1 ? kLine * kPieceRows : kLine;
    } else {
      // Prefetch the tokens of the next slice, an equal share with each group of rows.
      piece.step = 4 * quartets * kLine / kGroups;
      piece.line = piece.step / kPieceRows;
      piece.ahead = reinterpret_cast<const uint8_t*>(x + count * quartets * 4 * kLanes) +
                    group * piece.step * count;
    }
    multiply_piece<T>(quartets, piece, x, parts + group * kQuartets * kPieceRows * kLanes,
                      first == 0,
                      first + count == call.steps ? sums + group * kPieceRows : nullptr);
  }
}

// Compute the outputs of one panel for all tokens.
template <class T>
void multiply_panel(const Call<T>& call, int64_t item, float* scratch) {
  const int64_t matrix = call.batch.find(item);
  const Linear& op = call.batch.ops[matrix];
  const int64_t first = item * call.batch.outs;
  const Panel panel = panel_at(op, op.weight, op.up, first, call.batch.outs, call.row_bytes());
  const Blocks blocks(op.tokens);
  float* sums = scratch + kParts;
  for (int64_t b = 0; b < blocks.count; ++b) {
    multiply_block(call, call.firsts[matrix], panel, blocks, b, scratch, sums);
    for (int64_t t = 4 * blocks.first(b); t < least(4 * blocks.first(b + 1), op.tokens); ++t)
      finish<T>(op, first, sums + (t - 4 * blocks.first(b)) * kWidth, t);
  }
}

// Multiply by `matrices` matrices: interleave the tokens, then compute all panels.
template <class T>
void linear_of(const Linear* ops, int64_t matrices, Team& team) {
  const Linear& op = ops[0];
  const int64_t units = (op.in + T::kPerUnit - 1) / T::kPerUnit;
  const int64_t steps = (units + kLanes - 1) / kLanes;
  const auto quartets = [](const Linear& op) { return Blocks(op.tokens).quartets; };
  int64_t all = 0;
  for (int64_t i = 0; i < matrices; ++i)
    if (!shares_tokens(ops, i)) all += quartets(ops[i]);
  const int64_t x_bytes = 4 * all * 4 * steps * kLanes;
  auto* memory = static_cast<uint8_t*>(team.shared(x_bytes + 8 * matrices));
  const Batch batch(ops, matrices, op.up ? kHalf : kWidth);
  const Places places(batch, reinterpret_cast<int64_t*>(memory + x_bytes), quartets);
  const Call<T> call{batch, steps, places.firsts, reinterpret_cast<uint32_t*>(memory)};
  if (places.inputs == 1) {
    const auto one = [](const void* context, int64_t block, void*) {
      interleave(*static_cast<const Call<T>*>(context), 0, block);
    };
    if (Blocks(op.tokens).count == 1)
      one(&call, 0, nullptr);
    else
      team.run(Blocks(op.tokens).count, 1, 0, one, &call);
  } else {
    const auto one = [](const void* context, int64_t matrix, void*) {
      const Call<T>& call = *static_cast<const Call<T>*>(context);
      if (shares_tokens(call.batch.ops, matrix)) return;
      const Blocks blocks(call.batch.ops[matrix].tokens);
      for (int64_t block = 0; block < blocks.count; ++block) interleave(call, matrix, block);
    };
    team.run(matrices, kPanelsAtOnce, 0, one, &call);
  }
  team.run(
      call.batch.panels(), kPanelsAtOnce, kScratch,
      [](const void* context, int64_t item, void* memory) {
        multiply_panel(*static_cast<const Call<T>*>(context), item, static_cast<float*>(memory));
      },
      &call);
}

#if defined(__AMX_BF16__)
void tiled_linear(const Linear* ops, int64_t matrices, Team& team);

// Call tiled_linear, which takes matrices with the same tokens only.
inline void tiled_by_tokens(const Linear* ops, int64_t matrices, Team& team) {
  for (int64_t first = 0, i = 1; i <= matrices; ++i)
    if (i == matrices || !shares_tokens(ops, i)) {
      tiled_linear(ops + first, i - first, team);
      first = i;
    }
}
#endif

inline void linear(const Linear* ops, int64_t count, Team& team) {
  if (ops->tokens == 0) return;
  if (ops->type == Type::kFloat) return linear_of<Float>(ops, count, team);
#if defined(__AMX_BF16__)
  tiled_by_tokens(ops, count, team);
#else
  linear_of<BFloat16>(ops, count, team);
#endif
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
