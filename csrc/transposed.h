// Multiplication of tokens by matrices that lie transposed: rows along `out`, as gpt-oss stores
// its experts.
//
// Not here: the experts of a layer (experts.h), matrices with rows along `in` (linear.h).
//
// An item is a run of columns of one matrix. It is read row by row, kTurnRows rows at a time, and
// each token adds these rows, times its inputs, to its sums of the columns. The sums lie in the
// output. A sum is added in the order of the rows, so that its bits do not depend on the other
// tokens.

#pragma once

#include "simd.h"

namespace slipway {
namespace SLIPWAY_ISA {

// Columns of an item; rows that are added together; rows of a slice, which all tokens pass before
// the next slice is read; distance of the prefetched rows.
constexpr int64_t kRunColumns = 256, kTurnRows = 4, kSliceRows = 128, kRowsAhead = 8;

// out = x @ weight + bias_scale * bias. All arrays but `out` have the same type.
struct Transposed {
  int64_t tokens, in, out_size;
  const void *x, *weight, *bias;  // [tokens][in], [in][out_size], [out_size]
  float bias_scale;
  float* out;  // [tokens][out_size]
};

// Arguments of one call for all of its items. All matrices have the same size.
struct TransposedCall {
  const Transposed* ops;
  int64_t count;

  int64_t runs() const { return (ops->out_size + kRunColumns - 1) / kRunColumns; }
};

// Add kRows rows from row `row` on, times the inputs of one token, to its sums of `count` columns.
template <class T, int kRows>
ALWAYS void add_rows_of(const Transposed& op, int64_t row, int64_t token, int64_t first,
                        int64_t count) {
  constexpr int64_t kItem = 4 / T::kPerUnit;
  const auto* weight = static_cast<const uint8_t*>(op.weight);
  const auto* x = static_cast<const uint8_t*>(op.x) + (token * op.in + row) * kItem;
  F factor[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) factor[r] = all(T::first(x + r * kItem));
  float* sums = op.out + token * op.out_size + first;
  for (int64_t i = 0; i < count; i += kLanes) {
    F sum = load_part<F>(sums + i, count - i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = (row + r) * op.out_size + first + i;
      if (i * kItem % 64 == 0)
        __builtin_prefetch(weight + (at + kRowsAhead * op.out_size) * kItem, 0, 3);
      sum = sum + factor[r] * T::read(op.weight, at, count - i);
    }
    store_part(sums + i, sum, count - i);
  }
}

// Compute one run of columns for all tokens of its matrix.
template <class T>
void transposed_run(const TransposedCall& call, int64_t item) {
  const Transposed& op = call.ops[item / call.runs()];
  const int64_t first = item % call.runs() * kRunColumns;
  const int64_t count = least(kRunColumns, op.out_size - first);
  for (int64_t token = 0; token < op.tokens; ++token)
    for (int64_t i = 0; i < count; i += kLanes)
      store_part(op.out + token * op.out_size + first + i,
                 T::read(op.bias, first + i, count - i) * op.bias_scale, count - i);
  for (int64_t begin = 0; begin < op.in; begin += kSliceRows) {
    const int64_t end = least(begin + kSliceRows, op.in);
    for (int64_t token = 0; token < op.tokens; ++token) {
      int64_t row = begin;
      for (; row + kTurnRows <= end; row += kTurnRows)
        add_rows_of<T, kTurnRows>(op, row, token, first, count);
      for (; row < end; ++row) add_rows_of<T, 1>(op, row, token, first, count);
    }
  }
}

// Multiply by `count` matrices of one size, each with tokens of its own.
template <class T>
void transposed_linear_of(const Transposed* ops, int64_t count, Team& team) {
  const TransposedCall call{ops, count};
  team.run(
      call.runs() * count, kLanes, 0,
      [](const void* context, int64_t item, void*) {
        transposed_run<T>(*static_cast<const TransposedCall*>(context), item);
      },
      &call);
}

inline void transposed_linear(Type type, const Transposed* ops, int64_t count, Team& team) {
  if (!count) return;
  type == Type::kFloat ? transposed_linear_of<Float>(ops, count, team)
                       : transposed_linear_of<BFloat16>(ops, count, team);
}

// Activation of gpt-oss, of the sums of gate and up in turn: min(gate, limit) * sigmoid(alpha *
// min(gate, limit)) * (clip(up, -limit, limit) + 1).
struct Clamp {
  float alpha, limit;
};

// Apply the activation to `hidden` pairs of sums, and write the results in the type of T.
template <class T>
void clamped(const Clamp& clamp, const float* sums, int64_t hidden, void* out) {
  for (int64_t i = 0; i < hidden; i += kLanes) {
    float gates[kLanes] = {}, ups[kLanes] = {};
    for (int64_t n = 0; n < least(kLanes, hidden - i); ++n) {
      gates[n] = sums[2 * (i + n)];
      ups[n] = sums[2 * (i + n) + 1];
    }
    const F highest = all(clamp.limit), lowest = all(-clamp.limit);
    F gate = load<F>(gates), up = load<F>(ups);
    // Comparisons in this order keep a NaN.
    gate = select(gate > highest, highest, gate);
    up = select(up > highest, highest, up);
    up = select(up < lowest, lowest, up);
    const F y = gate / (exp(gate * -clamp.alpha) + 1.0f) * (up + 1.0f);
    T::write(out, i, y, hidden - i);
  }
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
