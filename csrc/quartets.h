// Products of weights with quartets of tokens, where the processor multiplies units of bfloat16.
//
// Not here: the order of the work (linear.h), rows times single tokens (rows.h).
//
// Each sum has kQuads parts: unit u of a row belongs to part u / 4 % kQuads. Each part is added in
// order, and the parts are added in pairs at the end. A quartet is four neighbouring tokens. A
// vector holds the parts of the sums of one quartet: lane 4 q + i is part q of its token i.

#pragma once

#include "panels.h"

namespace slipway {
namespace SLIPWAY_ISA {

// Multiply a piece by a block of kBlock quartets.
//
// parts: [quartet][row][kLanes], the parts of the sums after the steps so far; not read if
// `is_first`. sums: null, or the place of the completed sums, [token][kWidth], instead of `parts`.
template <class T, int kBlock>
void multiply_quartets(const Piece& piece, const uint32_t* x, float* parts, bool is_first,
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
      __builtin_prefetch(ahead + r * line, 0, kIntoSecondLevel);
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

// Kernel that takes tokens in bundles of four; linear.h has what its members mean.
template <class T>
struct Quartets {
  using Number = T;
  static constexpr int64_t kTokens = 4, kMost = kQuartets, kWords = 4 * kLanes;
  static constexpr int64_t kBlockBytes = 32768;
  static constexpr bool kFetchesTokens = true;

  // Write quartets as [step][4][quartet][kLanes]: lane 4 q + i of vector c is unit 4 q + c of the
  // step, of token i of the quartet. Missing tokens of the last quartet are zeros.
  static void arrange(const TokenRows& rows, int64_t first, int64_t quartets, uint32_t* out) {
    for (int64_t t = 0; t < rows.steps; ++t, out += quartets * kWords)
      for (int64_t quartet = 0; quartet < quartets; ++quartet) {
        const int64_t token = 4 * (first + quartet);
        U x[4] = {};
        for (int64_t i = 0; i < least(4, rows.count - token); ++i)
          x[i] = load_step(rows.at + (token + i) * rows.bytes, t, rows.bytes);
        quads(x);
        for (int c = 0; c < 4; ++c) store(out + (c * quartets + quartet) * kLanes, x[c]);
      }
  }

  template <int kBlock = kQuartets>
  static void multiply(int64_t quartets, const Piece& piece, const uint32_t* x, const Sums& sums) {
    if (quartets == kBlock)
      multiply_quartets<T, kBlock>(piece, x, sums.parts, sums.is_first, sums.done);
    else if constexpr (kBlock > 1)
      multiply<kBlock - 1>(quartets, piece, x, sums);
  }
};

}  // namespace SLIPWAY_ISA
}  // namespace slipway
