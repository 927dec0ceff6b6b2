// Packed weights of 4 or 8 bits times tokens: decides how bits become numbers and in which order they are summed.
//
// A row is 32-bit words of four bytes or eight nibbles, the lowest first, each less 128 or 8. Behind the exponent of 128 a
// nibble n is the number 128 + n, in float as in bfloat16, without a conversion: what the 136 too many add is known from the
// tokens alone, and the sum of every step starts with its negative. Bytes are converted; in bfloat16 they are exact, too.
//
// A vector holds kLanes neighbouring words of one row; a step multiplies all that they hold, scales the sum (or not: with one
// scale for the row it is applied at its end), and adds it to the total. No order depends on how many tokens there are. Where
// there is AMX, bfloat16 tokens meet most packed weights in tiles instead (tiled_linear.h).

#pragma once

#include "linear.h"

namespace slipway {
namespace SLIPWAY_ISA {

constexpr int kQuantRows = 4;          // side by side
constexpr int kQuantTokens = 32;       // that use the unpacked weights of a step
constexpr int64_t kQuantAhead = 8192;  // bytes between what is read and what is fetched

// What a word holds in units: kNumbers of them in kUnits units, of which `unit` gives the i-th; number j of the word lies in
// unit j % kUnits, and of two the lower comes first. `kExcess` is what each number has too much.
struct FloatNibbles : Float {
  static constexpr int kNumbers = 8, kUnits = 8, kExcess = 136;
  static ALWAYS void units(U words, U* unit) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      unit[i] = ((i < 4 ? words << (16 - 4 * i) : words >> (4 * i - 16)) & 0xf0000u) | 0x43000000u;
  }
};
struct BFloat16Nibbles : BFloat16 {
  static constexpr int kNumbers = 8, kUnits = 4, kExcess = 136;
  static ALWAYS void units(U words, U* unit) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) unit[i] = ((words >> (4 * i)) & 0x000f000fu) | 0x43004300u;
  }
};
ALWAYS U byte(U words, int i) {  // as a float: 2^23 + a number below 2^23 is its bits
  return as_units(as_floats(((words >> (8 * i)) & 0xffu) | 0x4b000000u) - 8388736.0f);
}
struct FloatBytes : Float {
  static constexpr int kNumbers = 4, kUnits = 4, kExcess = 0;
  static ALWAYS void units(U words, U* unit) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) unit[i] = byte(words, i);
  }
};
struct BFloat16Bytes : BFloat16 {
  static constexpr int kNumbers = 4, kUnits = 2, kExcess = 0;
  static ALWAYS void units(U words, U* unit) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) unit[i] = (byte(words, i) >> 16) | (byte(words, i + 2) & 0xffff0000u);
  }
};

struct Packed {
  int64_t words, steps;  // of a row; of kLanes words each
  int shift;             // 2^shift words share a scale; below 0: the row has one
  int64_t groups;        // scales of a row
  int64_t tokens;
  uint32_t* x;  // per block of kQuantTokens: [steps][tokens][1 + kUnits][kLanes], the first what a step's sum starts with
};

// Where a block of tokens begins, and how many it has.
template <class T>
ALWAYS uint32_t* block_at(const Packed& packed, int64_t first) {
  return packed.x + first * packed.steps * (1 + T::kUnits) * kLanes;
}
ALWAYS int64_t block_tokens(const Packed& packed, int64_t first) { return least(kQuantTokens, packed.tokens - first); }

// One token's numbers in the order of the weights that they meet.
template <class T>
void spread(const Packed& packed, const void* x, int64_t in, int64_t token) {
  constexpr int columns = T::kNumbers / T::kPerUnit;  // units of x that a word meets
  const auto* row = static_cast<const uint8_t*>(x) + token * in * 4 / T::kPerUnit;
  const int64_t place = token % kQuantTokens, count = block_tokens(packed, token - place);
  uint32_t* block = block_at<T>(packed, token - place) + place * (1 + T::kUnits) * kLanes;
  for (int64_t t = 0; t < packed.steps; ++t) {
    uint32_t held[columns * kLanes] = {}, turned[columns][kLanes];
    const int64_t left = (packed.words - t * kLanes) * columns;
    std::memcpy(held, row + 4 * t * kLanes * columns, 4 * least(left, kLanes * columns));
    for (int l = 0; l < kLanes; ++l)
      for (int c = 0; c < columns; ++c) turned[c][l] = held[l * columns + c];
    uint32_t* out = block + t * count * (1 + T::kUnits) * kLanes;
    F sum = {};
    for (int i = 0; i < T::kUnits; ++i) {
      U unit = load<U>(turned[i]);
      if constexpr (T::kPerUnit == 2) {  // numbers i and i + kUnits
        const U one = load<U>(turned[i / 2]), two = load<U>(turned[(i + T::kUnits) / 2]);
        unit = i % 2 ? (one >> 16) | (two & 0xffff0000u) : (one & 0xffffu) | (two << 16);
        sum = sum + (low(unit) + high(unit));
      } else {
        sum = sum + as_floats(unit);
      }
      store(out + (1 + i) * kLanes, unit);
    }
    store(out, sum * -static_cast<float>(T::kExcess));
  }
}

// The scale of each lane at a step, among the kLanes scales that hold it.
template <class T>
ALWAYS F lane_scales(const Packed& packed, const uint8_t* scales, int64_t step) {
  const int64_t first = (step * kLanes >> packed.shift) / kLanes * kLanes;
  U lanes = {};
  for (int l = 0; l < kLanes; ++l) lanes[l] = l;
  const U group = ((lanes + static_cast<uint32_t>(step * kLanes)) >> packed.shift) & (kLanes - 1u);
  return __builtin_shuffle(T::read(scales, first, packed.groups - first), reinterpret_cast<I>(group));
}

// Four rows' sums: quad onto quad, and then the lanes of the one that is left.
ALWAYS Q join_rows(const F (&totals)[kQuantRows]) {
  float lanes[4 * kQuantRows];
  add_quads(totals, lanes);
  return (load<Q>(lanes) + load<Q>(lanes + 4)) + (load<Q>(lanes + 8) + load<Q>(lanes + 12));
}

// kQuantRows rows times `kTokens` tokens (0: `count`, at most kQuantTokens); sums[token * distance + row].
template <class T, int kTokens, bool kGrouped>
ALWAYS void quantized_rows(const Packed& packed, int64_t token, int64_t count, const uint8_t* const* rows,
                           const uint8_t* const* scales, const uint8_t* next, float* sums, int64_t distance) {
  const int64_t tokens = kTokens ? kTokens : count;
  F totals[kTokens ? kTokens : kQuantTokens][kQuantRows];
#pragma GCC unroll 2
  for (int64_t i = 0; i < tokens; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < kQuantRows; ++r) totals[i][r] = F{};
  const uint32_t* x = block_at<T>(packed, token);
  for (int64_t t = 0; t < packed.steps; ++t) {
    U units[kQuantRows][T::kUnits];
    F scale[kQuantRows];
#pragma GCC unroll 4
    for (int r = 0; r < kQuantRows; ++r) {
      const U words = load_part<U>(rows[r] + 4 * kLanes * t, packed.words - kLanes * t);
      __builtin_prefetch(next, 0, 3);
      next += 4 * kLanes;
      T::units(words, units[r]);
      if constexpr (kGrouped) scale[r] = lane_scales<T>(packed, scales[r], t);
    }
#pragma GCC unroll 2
    for (int64_t i = 0; i < tokens; ++i) {
      F sum[kQuantRows];
#pragma GCC unroll 4
      for (int r = 0; r < kQuantRows; ++r) sum[r] = T::kExcess ? load<F>(x) : F{};
      x += kLanes;
#pragma GCC unroll 8
      for (int u = 0; u < T::kUnits; ++u, x += kLanes) {
        const U factors = load<U>(x);
#pragma GCC unroll 4
        for (int r = 0; r < kQuantRows; ++r) sum[r] = T::dot(sum[r], units[r][u], factors);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kQuantRows; ++r) totals[i][r] = totals[i][r] + (kGrouped ? sum[r] * scale[r] : sum[r]);
    }
  }
  Q whole = Q{} + 1.0f;  // the scales of the rows
  for (int r = 0; r < kQuantRows && !kGrouped; ++r) whole[r] = T::first(scales[r]);
#pragma GCC unroll 2
  for (int64_t i = 0; i < tokens; ++i)
    store(sums + i * distance, join_rows(totals[i]) * whole);
}

template <class T, int kTokens>
void quantized_rows(const Packed& packed, int64_t token, int64_t count, const uint8_t* const* rows,
                    const uint8_t* const* scales, const uint8_t* next, float* sums, int64_t distance) {
  if (packed.shift >= 0)
    quantized_rows<T, kTokens, true>(packed, token, count, rows, scales, next, sums, distance);
  else
    quantized_rows<T, kTokens, false>(packed, token, count, rows, scales, next, sums, distance);
}

template <class T>
struct QuantizedCall {
  Batch batch;
  Packed packed;
};

template <class T>
void quantized_panel(const QuantizedCall<T>& call, int64_t item, float* sums) {
  const Linear& op = call.batch.at(item);
  const Packed& packed = call.packed;
  const int64_t first = item * call.batch.outs, scale_bytes = packed.groups * 4 / T::kPerUnit;
  const Panel panel = panel_at(op, op.weight, op.up, first, call.batch.outs, 4 * packed.words);
  const Panel scales = panel_at(op, op.scale, op.up_scale, first, call.batch.outs, scale_bytes);
  const int64_t bytes = 4 * packed.words * kQuantRows, fetched = (kQuantAhead + bytes - 1) / bytes * kQuantRows;
  for (int64_t token = 0; token < op.tokens; token += kQuantTokens) {
    const int64_t count = least(kQuantTokens, op.tokens - token);
    for (int r = 0; r < kWidth; r += kQuantRows) {
      const int64_t later = r + fetched;
      const uint8_t* next = panel.rows[later % kWidth] + later / kWidth * panel.next;
      auto* rows = count == 1 ? quantized_rows<T, 1> : count == 2 ? quantized_rows<T, 2> : quantized_rows<T, 0>;
      rows(packed, token, count, panel.rows + r, scales.rows + r, next, sums + r, kWidth);
    }
    for (int64_t i = 0; i < count; ++i) finish<T>(op, first, sums + i * kWidth, token + i);
  }
}

template <class T>
void quantized_of(const Linear* ops, int64_t matrices, Team& team) {
  const Linear& op = ops[0];
  const int64_t words = op.in * op.bits / 32, steps = (words + kLanes - 1) / kLanes, step_bytes = 4 * kLanes;
  const int64_t group_words = op.group * op.bits / 32;
  int shift = -1;
  while (group_words >> (shift + 1)) ++shift;
  const int64_t groups = op.group ? op.in / op.group : 1;
  auto* memory = static_cast<uint32_t*>(team.shared(op.tokens * steps * (1 + T::kUnits) * step_bytes));
  const Packed packed{words, steps, shift, groups, op.tokens, memory};
  const QuantizedCall<T> call{{ops, matrices, op.up ? kHalf : kWidth}, packed};
  const auto one = [](const void* context, int64_t token, void*) {
    const auto& call = *static_cast<const QuantizedCall<T>*>(context);
    spread<T>(call.packed, call.batch.ops->x, call.batch.ops->in, token);
  };
  if (op.tokens == 1)
    one(&call, 0, nullptr);
  else
    team.run(op.tokens, kQuantTokens, 0, one, &call);
  team.run(call.batch.panels(), kTogether, 4 * kQuantTokens * kWidth,
           [](const void* context, int64_t item, void* memory) {
             quantized_panel(*static_cast<const QuantizedCall<T>*>(context), item, static_cast<float*>(memory));
           },
           &call);
}

inline void quantized_linear(const Linear* ops, int64_t count, Team& team) {
  if (ops->tokens == 0) return;
  const bool is_float = ops->type == Type::kFloat;
#if defined(__AMX_BF16__)  // groups of steps that fit a slice; others in vectors, for any number of tokens
  if (!is_float && ops->group % 32 == 0 && ops->group <= 256) return tiled_linear(ops, count, team);
#endif
  if (ops->bits == 4)
    is_float ? quantized_of<FloatNibbles>(ops, count, team) : quantized_of<BFloat16Nibbles>(ops, count, team);
  else
    is_float ? quantized_of<FloatBytes>(ops, count, team) : quantized_of<BFloat16Bytes>(ops, count, team);
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
