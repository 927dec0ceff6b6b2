// Weights (out, in) times tokens: decides panels, the order of sums and of reading. Included once
// per instruction set.
//
// Weights stay as they are mapped from the file: rows of units along `in`. A sum has kQuads parts:
// unit u of a row belongs to part u / 4 % kQuads; each part runs in order, and the parts are added
// in pairs. A vector holds the parts of four tokens, so rows are read as they lie, and a token's
// result is the same bits whatever else is in the batch.
//
// A panel is kWidth rows, cut along `in` where a block of tokens would outgrow the first cache.
// Each block goes through the panel by itself: the first while weights are fetched from memory,
// those after it while the next tokens are.

#pragma once

#include "simd.h"

namespace slipway {
namespace SLIPWAY_ISA {

constexpr int kHalf = kLanes,
              kWidth =
                  2 * kHalf;  // outputs of a panel; a gated one holds half as many of either weight
constexpr int kPieceRows = 4;  // read side by side: 40 GB/s where 8 read 36 and 16 read 35
constexpr int kGroups = kWidth / kPieceRows;
constexpr int64_t kLine = 4 * kLanes;
constexpr int64_t kAhead =
    16384;  // bytes between what is read and what is fetched: 8 tokens 43 GB/s, with 8 kB 38
constexpr int64_t kTogether =
    32;  // panels that a thread takes at once: 44 GB/s where one by one has 39
constexpr int64_t kNear = 32768;  // bytes of a block of tokens that stay in the first cache

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
  const Linear& op;  // the first: `x`, `tokens` and `in` are the same for all
  uint32_t* x;       // the tokens, in the order that the kernel reads them
  int64_t steps;     // of kLanes units, the last one filled up with zeros
  int64_t row_bytes() const { return op.in * 4 / T::kPerUnit; }
};

// kLanes units of a row from step `t` on; zeros past its end.
ALWAYS U load_step(const uint8_t* row, int64_t t, int64_t row_bytes) {
  return load_part<U>(row + kLine * t, (row_bytes - kLine * t) / 4);
}

// Tokens come in blocks of up to kFours fours, as equal as they can be.
struct Blocks {
  int64_t fours, count;
  explicit Blocks(int64_t tokens) : fours((tokens + 3) / 4), count((fours + kFours - 1) / kFours) {}
  int64_t first(int64_t block) const { return block * fours / count; }  // the first four of a block
};

// A block of tokens, past the last zeros: for each step, c < 4 and four a vector whose lane 4 q + i
// is unit 4 q + c of the four's token i.
template <class T>
void interleave(const Call<T>& call, int64_t block) {
  const Blocks blocks(call.op.tokens);
  const int64_t row_bytes = call.row_bytes(), first = blocks.first(block),
                fours = blocks.first(block + 1) - first;
  uint32_t* out = call.x + first * call.steps * 4 * kLanes;
  for (int64_t t = 0; t < call.steps; ++t, out += 4 * fours * kLanes)
    for (int64_t four = 0; four < fours; ++four) {
      const int64_t token = 4 * (first + four);
      U x[4] = {};
      for (int64_t i = 0; i < least(4, call.op.tokens - token); ++i)
        x[i] = load_step(static_cast<const uint8_t*>(call.op.x) + (token + i) * row_bytes, t,
                         row_bytes);
      quads(x);
      for (int c = 0; c < 4; ++c) store(out + (c * fours + four) * kLanes, x[c]);
    }
}

struct Panel {
  const uint8_t* rows[kWidth];  // past the last output: the last one again
  int64_t next;                 // bytes from here to the same row of the next panel
};

// The rows of a panel whose first output is `first`, of weights or of their scales; a gated one
// holds half as many of gate and up each.
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

// A piece of a panel: kPieceRows rows from step `first` on. As many lines are fetched meanwhile:
// those of a step lie `line` bytes apart, those of the next `step` bytes on.
struct Piece {
  const uint8_t *const *rows, *ahead;
  int64_t line, step, first, count, row_bytes;
};

// Times a block of tokens. The parts go from (none yet: `is_first`) and to [four][row][kLanes];
// with `sums`, they are added up to sums[token * kWidth + row].
template <class T, int kBlock>
void piece_of(const Piece& piece, const uint32_t* x, float* parts, bool is_first, float* sums) {
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

template <class T, int kBlock = kFours>
void piece_of(int64_t fours, const Piece& piece, const uint32_t* x, float* parts, bool is_first,
              float* sums) {
  if (fours == kBlock)
    piece_of<T, kBlock>(piece, x, parts, is_first, sums);
  else if constexpr (kBlock > 1)
    piece_of<T, kBlock - 1>(fours, piece, x, parts, is_first, sums);
}

// One token's sums of a panel, to where they belong.
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

// How a panel is cut: pieces of kPieceRows rows and `slice` steps, a slice of all rows before the
// next.
struct Cut {
  int64_t slice, slices, pieces, fetched;  // pieces between what is read and what is fetched
  Cut(int64_t steps, const Blocks& blocks) {
    slice = least(steps, kNear / (4 * kLine * least(blocks.fours, kFours)));
    slices = (steps + slice - 1) / slice, pieces = slices * kGroups;
    fetched = (kAhead + slice * kLine * kPieceRows - 1) / (slice * kLine * kPieceRows);
  }
};

// What a thread needs beside a panel: the parts of a block of tokens, and its sums.
constexpr int64_t kParts = kFours * kWidth * kLanes, kScratch = 4 * (kParts + 4 * kFours * kWidth);

// A panel times a block of tokens.
template <class T>
void block_of(const Call<T>& call, const Panel& panel, const Blocks& blocks, int64_t block,
              float* parts, float* sums) {
  const Cut cut(call.steps, blocks);
  const int64_t row_bytes = call.row_bytes(), fours = blocks.first(block + 1) - blocks.first(block);
  for (int64_t i = 0; i < cut.pieces; ++i) {
    const int64_t group = i % kGroups, first = i / kGroups * cut.slice,
                  count = least(cut.slice, call.steps - first);
    const uint32_t* x = call.x + (blocks.first(block) * call.steps + first * fours) * 4 * kLanes;
    Piece piece{panel.rows + group * kPieceRows, nullptr, 0, 0, first, count, row_bytes};
    if (block == 0) {  // of whole rows the lines in the order of memory, else as they will be read
      const int64_t later = i + cut.fetched, at = later % cut.pieces / kGroups * cut.slice * kLine;
      piece.ahead =
          panel.rows[later % kGroups * kPieceRows] + at + (later < cut.pieces ? 0 : panel.next);
      piece.line = cut.slices == 1 ? kLine : row_bytes,
      piece.step = cut.slices == 1 ? kLine * kPieceRows : kLine;
    } else {  // the tokens behind these, a part with each group
      piece.step = 4 * fours * kLine / kGroups, piece.line = piece.step / kPieceRows;
      piece.ahead = reinterpret_cast<const uint8_t*>(x + count * fours * 4 * kLanes) +
                    group * piece.step * count;
    }
    piece_of<T>(fours, piece, x, parts + group * kFours * kPieceRows * kLanes, first == 0,
                first + count == call.steps ? sums + group * kPieceRows : nullptr);
  }
}

template <class T>
void panel_of(const Call<T>& call, int64_t item, float* scratch) {
  const Linear& op = call.batch.at(item);
  const int64_t first = item * call.batch.outs;
  const Panel panel = panel_at(op, op.weight, op.up, first, call.batch.outs, call.row_bytes());
  const Blocks blocks(op.tokens);
  float* sums = scratch + kParts;
  for (int64_t b = 0; b < blocks.count; ++b) {
    block_of(call, panel, blocks, b, scratch, sums);
    for (int64_t t = 4 * blocks.first(b); t < least(4 * blocks.first(b + 1), op.tokens); ++t)
      finish<T>(op, first, sums + (t - 4 * blocks.first(b)) * kWidth, t);
  }
}

template <class T>
void linear_of(const Linear* ops, int64_t matrices, Team& team) {
  const Linear& op = ops[0];
  const int64_t units = (op.in + T::kPerUnit - 1) / T::kPerUnit,
                steps = (units + kLanes - 1) / kLanes;
  const Blocks blocks(op.tokens);
  Call<T> call{{ops, matrices, op.up ? kHalf : kWidth}, op, nullptr, steps};
  call.x = static_cast<uint32_t*>(team.shared(4 * blocks.fours * 4 * steps * kLanes));
  const auto one = [](const void* context, int64_t block, void*) {
    interleave(*static_cast<const Call<T>*>(context), block);
  };
  if (blocks.count == 1)
    one(&call, 0, nullptr);
  else
    team.run(blocks.count, 1, 0, one, &call);
  team.run(
      call.batch.panels(), kTogether, kScratch,
      [](const void* context, int64_t item, void* memory) {
        panel_of(*static_cast<const Call<T>*>(context), item, static_cast<float*>(memory));
      },
      &call);
}

#if defined(__AMX_BF16__)
void tiled_linear(const Linear* ops, int64_t matrices, Team& team);
#endif

inline void linear(const Linear* ops, int64_t count, Team& team) {
  if (ops->tokens == 0) return;
  if (ops->type == Type::kFloat) return linear_of<Float>(ops, count, team);
#if defined(__AMX_BF16__)
  tiled_linear(ops, count, team);
#else
  linear_of<BFloat16>(ops, count, team);
#endif
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
