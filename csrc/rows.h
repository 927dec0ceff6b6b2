// Products of rows of weights with tokens, where the processor has no products of bfloat16.
//
// Not here: the order of the work (linear.h), tokens in quartets (quartets.h).
//
// A vector of a row is converted to floats once, and multiplied by every token of a block. The sum
// of a row and a token is a vector, to which products are added in the order of the row; its lanes
// are added at the end.

#pragma once

#include "panels.h"

namespace slipway {
namespace SLIPWAY_ISA {

// Multiply one step of kRows rows by kTokens tokens, and add to their sums. x: [token][T::kPerUnit]
// [kLanes]. units: of each row.
template <class T, int kTokens, int kRows>
ALWAYS void multiply_step(const U (&units)[kRows], const float* x, F (&sums)[kTokens][kRows]) {
  // Registers: the sums, the numbers, those of a token, and a mask. A single token reads memory
  // faster row by row: 16.2 against 14.6 GB/s a core.
  if constexpr (kTokens > 1 && kRows * (kTokens + T::kPerUnit) + 2 <= kRegisters) {
    F numbers[kRows][T::kPerUnit];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) T::widen(units[r], numbers[r]);
#pragma GCC unroll 4
    for (int c = 0; c < kTokens; ++c)
#pragma GCC unroll 2
      for (int n = 0; n < T::kPerUnit; ++n) {
        const F of_token = load<F>(x + (c * T::kPerUnit + n) * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[c][r] = sums[c][r] + numbers[r][n] * of_token;
      }
  } else {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      F numbers[T::kPerUnit];
      T::widen(units[r], numbers);
#pragma GCC unroll 4
      for (int c = 0; c < kTokens; ++c)
#pragma GCC unroll 2
        for (int n = 0; n < T::kPerUnit; ++n)
          sums[c][r] = sums[c][r] + numbers[n] * load<F>(x + (c * T::kPerUnit + n) * kLanes);
      // Each row reads the tokens again: there are no registers to keep them.
      if (kTokens > 1) asm volatile("" ::: "memory");
    }
  }
}

// Multiply kRows rows of a piece, from row `begin` on, by kTokens tokens. kFetch: with prefetching.
template <class T, int kTokens, int kRows, bool kFetch>
ALWAYS void multiply_rows_of(const Piece& piece, int begin, const float* x,
                             F (&sums)[kTokens][kRows]) {
  constexpr int64_t kStep = kTokens * T::kPerUnit * kLanes;
  const int64_t line = piece.line, step = piece.step, end = piece.first + piece.count;
  const int64_t whole = least(end, piece.row_bytes / kLine);  // the last step may be a part
  const uint8_t* ahead = piece.ahead + begin * line;
  const uint8_t* rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = piece.rows[begin + r];
  U units[kRows];
  for (int64_t t = piece.first; t < whole; ++t, ahead += step, x += kStep) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      units[r] = load<U>(rows[r] + kLine * t);
      if (kFetch) __builtin_prefetch(ahead + r * line, 0, kIntoSecondLevel);
    }
    multiply_step<T, kTokens, kRows>(units, x, sums);
  }
  if (whole == end) return;
  for (int r = 0; r < kRows; ++r) units[r] = load_step(rows[r], whole, piece.row_bytes);
  multiply_step<T, kTokens, kRows>(units, x, sums);
}

// Multiply a piece by kTokens tokens. x: [step][token][T::kPerUnit][kLanes], floats.
template <class T, int kTokens, bool kFetch>
void multiply_rows(const Piece& piece, const float* x, const Sums& sums) {
  // Rows with sums in registers at the same time.
  constexpr int kRows = kTokens <= 3 || kRegisters == 32 ? kPieceRows : kPieceRows / 2;
  F held[kTokens][kPieceRows];
  for (int begin = 0; begin < kPieceRows; begin += kRows) {
    F acc[kTokens][kRows] = {};
    if (!sums.is_first)
      for (int c = 0; c < kTokens; ++c)
        for (int r = 0; r < kRows; ++r)
          acc[c][r] = load<F>(sums.parts + (c * kPieceRows + begin + r) * kLanes);
    multiply_rows_of<T, kTokens, kRows, kFetch>(piece, begin, x, acc);
    for (int c = 0; c < kTokens; ++c)
      for (int r = 0; r < kRows; ++r) held[c][begin + r] = acc[c][r];
  }
  for (int c = 0; c < kTokens; ++c)
    if (sums.done)
      add_lanes(held[c], sums.done + c * kWidth);
    else
      for (int r = 0; r < kPieceRows; ++r)
        store(sums.parts + (c * kPieceRows + r) * kLanes, held[c][r]);
}

// Kernel that takes single tokens; linear.h has what its members mean.
template <class T>
struct Singles {
  using Number = T;
  static constexpr int64_t kTokens = 1, kMost = 4, kWords = T::kPerUnit * kLanes;
  static constexpr int64_t kBlockBytes = 16384;
  static constexpr bool kFetchesTokens = false;

  // Write tokens as floats: [step][token][T::kPerUnit][kLanes].
  static void arrange(const TokenRows& rows, int64_t first, int64_t tokens, uint32_t* out) {
    for (int64_t t = 0; t < rows.steps; ++t)
      for (int64_t token = first; token < first + tokens; ++token, out += kWords) {
        F numbers[T::kPerUnit];
        T::widen(load_step(rows.at + token * rows.bytes, t, rows.bytes), numbers);
        for (int n = 0; n < T::kPerUnit; ++n) store(out + n * kLanes, numbers[n]);
      }
  }

  template <int kBlock = kMost>
  static void multiply(int64_t tokens, const Piece& piece, const uint32_t* x, const Sums& sums) {
    if (tokens == kBlock) {
      const auto* floats = reinterpret_cast<const float*>(x);
      piece.ahead ? multiply_rows<T, kBlock, true>(piece, floats, sums)
                  : multiply_rows<T, kBlock, false>(piece, floats, sums);
    } else if constexpr (kBlock > 1) {
      multiply<kBlock - 1>(tokens, piece, x, sums);
    }
  }
};

}  // namespace SLIPWAY_ISA
}  // namespace slipway
