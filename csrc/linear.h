// Weights (out, in) times tokens: decides panels, packing and when to pack at all. One instruction set per inclusion.
//
// A panel is kTileCols blocks of kLanes output rows. Its units are transposed on the fly, so that a lane is an output and
// the sum over k runs in order: a token's result is the same bits whatever else is in the batch, and weights stay as they
// are mapped from the file. Few tokens use the transposed registers at once; more find the panel packed in the cache.

#pragma once

#include "simd.h"

namespace slipway {
namespace SLIPWAY_ISA {

constexpr int kPieceRows = 48;    // up to here weights are read from memory while sums are computed
constexpr int64_t kPiece = 256;   // units of k that are packed at a time then

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Panel {
  const uint8_t* rows[kTileCols][kLanes];  // past the last output: the last one again
  int64_t row_bytes, ahead;                // ahead: bytes from here to the panel that this thread is likely to take next
};

// kLanes units of one block's rows from unit k on, transposed: a lane is a row. Past the rows' end: zeros.
template <bool kFetch>
ALWAYS void load_block(const Panel& panel, int column, int64_t k, U (&block)[kLanes]) {
  const uint8_t* const* rows = panel.rows[column];
  const int64_t bytes = panel.row_bytes - 4 * k;
  const uint8_t* next = rows[0] + panel.ahead + 4 * kLanes * k;  // in the order of memory
  if (bytes >= 4 * kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      block[i] = load<U>(rows[i] + 4 * k);
      if (kFetch) __builtin_prefetch(next + 4 * kLanes * i, 0, 3);
    }
  } else {
    for (int i = 0; i < kLanes; ++i) {
      uint32_t rest[kLanes] = {};
      std::memcpy(rest, rows[i] + 4 * k, bytes);
      block[i] = load<U>(rest);
    }
  }
  transpose(block);
}

// Straight from transposed registers.
template <class T, int kRows>
void few_of(const Panel& panel, int column, const uint32_t* x, int64_t ldx, int64_t units, float* sums) {
  F acc[kRows] = {};
  for (int64_t k = 0; k < units; k += kLanes) {
    U block[kLanes];
    load_block<true>(panel, column, k, block);
    if (units - k >= kLanes) {
#pragma GCC unroll 16
      for (int u = 0; u < kLanes; ++u)
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) acc[m] = T::dot(acc[m], block[u], all(x[m * ldx + k + u]));
    } else {
      for (int u = 0; u < units - k; ++u)
        for (int m = 0; m < kRows; ++m) acc[m] = T::dot(acc[m], block[u], all(x[m * ldx + k + u]));
    }
  }
  for (int m = 0; m < kRows; ++m) store(sums + (m * kTileCols + column) * kLanes, acc[m]);
}

template <class T, int kRows = kFewRows>
void few(int64_t rows, const Panel& panel, const uint32_t* x, int64_t ldx, int64_t units, float* sums) {
  if (rows == kRows) {
    for (int j = 0; j < kTileCols; ++j) few_of<T, kRows>(panel, j, x, ldx, units, sums);
  } else if constexpr (kRows > 1) {
    few<T, kRows - 1>(rows, panel, x, ldx, units, sums);
  }
}

// Packed a piece at a time; the next panel is fetched while this one is multiplied.
template <class T>
void many(int64_t rows, const Panel& panel, const uint32_t* x, int64_t ldx, int64_t units, uint32_t* packed,
          float* sums) {
  constexpr int64_t width = kTileCols * kLanes;
  const uint32_t* columns[kTileCols];
  for (int j = 0; j < kTileCols; ++j) columns[j] = packed + j * kLanes;
  const int64_t piece = rows <= kPieceRows ? kPiece : units;
  for (int64_t first = 0; first < units; first += piece) {
    const int64_t count = least(piece, units - first);
    for (int64_t k = 0; k < count; k += kLanes)
      for (int j = 0; j < kTileCols; ++j) {
        U block[kLanes];
        load_block<false>(panel, j, first + k, block);
        for (int u = 0; u < kLanes; ++u) store(packed + (k + u) * width + j * kLanes, block[u]);
      }
    const uint8_t* next[kTileCols];
    for (int j = 0; j < kTileCols; ++j) next[j] = panel.rows[j][0] + panel.ahead + 4 * first * kLanes;
    tiles<T, kTileCols>(rows, x + first, ldx, {columns, count, count, width}, sums, width, first == 0, next);
  }
}

// One token's sums of the panel from output `first` on, to where they belong.
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
struct Call {
  const Linear& op;
  const uint32_t* x;
  int64_t ldx, units, outs, threads;  // outs: of one panel
};

template <class T>
void panel_of(const Call<T>& call, int64_t item, void* scratch) {
  const Linear& op = call.op;
  const int64_t first = item * call.outs;
  Panel panel;
  panel.row_bytes = op.in * size_of(op.type);
  panel.ahead = call.threads * call.outs * panel.row_bytes;
  for (int j = 0; j < kTileCols; ++j)
    for (int i = 0; i < kLanes; ++i) {  // gate and up share a panel
      const uint8_t* weight = static_cast<const uint8_t*>(op.up && j ? op.up : op.weight);
      const int64_t row = first + (op.up ? 0 : j * kLanes) + i;
      panel.rows[j][i] = weight + least(row, op.out_size - 1) * panel.row_bytes;
    }
  float* sums = static_cast<float*>(scratch);
  if (op.tokens <= kFewRows) {
    few<T>(op.tokens, panel, call.x, call.ldx, call.units, sums);
  } else {
    uint32_t* packed = reinterpret_cast<uint32_t*>(sums + op.tokens * kTileCols * kLanes);
    many<T>(op.tokens, panel, call.x, call.ldx, call.units, packed, sums);
  }
  for (int64_t t = 0; t < op.tokens; ++t) finish<T>(op, first, sums + t * kTileCols * kLanes, t);
}

template <class T>
void linear_of(const Linear& op, Team& team) {
  constexpr int64_t width = kTileCols * kLanes;
  const int64_t units = (op.in + T::kPerUnit - 1) / T::kPerUnit;
  const Call<T> call{op, static_cast<const uint32_t*>(op.x), op.in / T::kPerUnit, units, op.up ? kLanes : width,
                     team.threads()};
  const int64_t packed = op.tokens <= kFewRows ? 0 : (op.tokens <= kPieceRows ? least(kPiece, units) : units) + kLanes;
  team.run((op.out_size + call.outs - 1) / call.outs, 4 * width * (op.tokens + packed),
           [](const void* context, int64_t item, void* memory) {
             panel_of<T>(*static_cast<const Call<T>*>(context), item, memory);
           },
           &call);
}

inline void linear(const Linear& op, Team& team) {
  if (op.tokens == 0) return;
  op.type == Type::kFloat ? linear_of<Float>(op, team) : linear_of<BFloat16>(op, team);
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
