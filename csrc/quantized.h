// Matrix multiplication of packed weights of 4 or 8 bits by tokens, in vectors.
//
// Not here: packing (quantize.cc), bfloat16 tokens where the processor has AMX (tiled_linear.h).
//
// A row of weights consists of 32-bit words with eight nibbles or four bytes each, the first in the
// lowest bits. The value of a stored nibble is 8 less, that of a stored byte 128 less, times a
// scale. With the exponent of 128, the bits of a nibble n are the number 128 + n in bfloat16,
// without a conversion. This is 136 too large. What the surplus adds to a sum depends only on the
// tokens, so the sum of each step starts with its negative. Bytes are converted, and are exact in
// bfloat16.
//
// A vector holds kLanes neighbouring words of one row. A step multiplies all numbers of these
// words, multiplies the sum by the scales, and adds it to the total. If a row has one scale, the
// total is multiplied instead. The order of additions does not depend on the number of tokens.

#pragma once

#include "linear.h"

namespace slipway {
namespace SLIPWAY_ISA {

constexpr int kQuantRows = 4;     // rows that are read side by side
constexpr int kQuantTokens = 32;  // tokens of a block, which share the unpacked weights of a step
constexpr int64_t kQuantPrefetchBytes = 8192;  // distance of prefetched weights in bytes
// Steps of a row in one cache line of 64 bytes.
constexpr int kFetchedSteps = 4 * kLanes < 64 ? 64 / (4 * kLanes) : 1;

// The next templates define how packed weights of kBits bits meet tokens of one type.
//
// kNumbers: numbers of a word of weights. kUnits: units that they are unpacked to. unit: unit i of
// each word. Number j of a word is in unit j % kUnits; of the two numbers of a unit, the one with
// the smaller j is in the lower half. kExcess: difference between unpacked number and value.
//
// spread: writes kVectors vectors of one token for each step. The last kUnits of them are the
// factors of the units; the vectors before them are read by `begin` and `end`. begin: value with
// which a sum starts. end: completed sum as floats.

// Float tokens. A number stays at its place in the word, kBits * i bits up, and is converted there.
// The token is divided by that power of two instead, so that each product is exact.
template <int kBits>
struct Floats : Float {
  using Sum = F;
  static constexpr int kNumbers = 32 / kBits, kUnits = kNumbers, kVectors = 1 + kUnits;
  static constexpr int kExcess = 1 << (kBits - 1);
  static ALWAYS U unit(U words, int i) {
    const uint32_t mask = (1u << kBits) - 1;
    // The sign bit is clear in both cases.
    const U number = i == kUnits - 1 ? words >> (32 - kBits) : words & (mask << (kBits * i));
    return as_units(__builtin_convertvector(reinterpret_cast<I>(number), F));
  }
  static ALWAYS Sum begin(const uint32_t* x) { return load<F>(x); }
  static ALWAYS F end(Sum sum, const uint32_t*) { return sum; }

  static ALWAYS void spread(const F (&number)[kNumbers], uint32_t* out) {
    F sum = {};
    for (int i = 0; i < kNumbers; ++i) {
      sum = sum + number[i];
      const float shrink = i == kUnits - 1 ? 1.0f : 1.0f / static_cast<float>(1u << (kBits * i));
      store(out + (1 + i) * kLanes, number[i] * shrink);
    }
    store(out, sum * -static_cast<float>(kExcess));
  }
};

#if defined(__AVX512BF16__)
// bfloat16 tokens with products of bfloat16. Unpacked nibbles are the numbers 128 + n.
template <int kBits>
struct Pairs : BFloat16 {
  using Sum = F;
  static constexpr int kNumbers = 32 / kBits, kUnits = kNumbers / 2, kVectors = 1 + kUnits;
  static constexpr int kExcess = kBits == 4 ? 136 : 0;
  // Return byte i of each word, less 128, as the bits of a float. The bits of 2^23 + n are those of
  // 2^23 plus n, for n below 2^23.
  static ALWAYS U byte(U words, int i) {
    return as_units(as_floats(((words >> (8 * i)) & 0xffu) | 0x4b000000u) - 8388736.0f);
  }
  static ALWAYS U unit(U words, int i) {
    if constexpr (kBits == 4) return ((words >> (4 * i)) & 0x000f000fu) | 0x43004300u;
    return (byte(words, i) >> 16) | (byte(words, i + 2) & 0xffff0000u);
  }
  static ALWAYS Sum begin(const uint32_t* x) { return kExcess ? load<F>(x) : F{}; }
  static ALWAYS F end(Sum sum, const uint32_t*) { return sum; }

  static ALWAYS void spread(const F (&number)[kNumbers], uint32_t* out) {
    F sum = {};
    for (int i = 0; i < kUnits; ++i) {
      sum = sum + (number[i] + number[i + kUnits]);
      store(out + (1 + i) * kLanes, (as_units(number[i]) >> 16) | as_units(number[i + kUnits]));
    }
    store(out, sum * -static_cast<float>(kExcess));
  }
};
#else
// bfloat16 tokens with exact products of 16-bit integers.
//
// The four or eight numbers of a token that meet one word of weights become integers times a power
// of two, so that the largest magnitude is between 2^14 and 2^15. Numbers of at least 1/256 of the
// largest are exact. Smaller ones are rounded by at most 2^-15 of the largest. Infinity becomes
// NaN.
template <int kBits>
struct Pairs : BFloat16 {
  using Sum = I;
  static constexpr int kNumbers = 32 / kBits, kUnits = kNumbers / 2, kVectors = 2 + kUnits;
  static constexpr int kExcess = 1 << (kBits - 1);
  static ALWAYS U unit(U words, int i) {
    if (i == kUnits - 1) return shift_halves<16 - kBits>(words);
    return (words >> (kBits * i)) & (kBits == 4 ? 0x000f000fu : 0x00ff00ffu);
  }
  static ALWAYS Sum begin(const uint32_t* x) { return load<I>(x); }
  static ALWAYS F end(Sum sum, const uint32_t* x) {
    return __builtin_convertvector(sum, F) * load<F>(x + kLanes);
  }
  static ALWAYS Sum dot(Sum sum, U a, U b) { return sum + multiply_pairs(a, b); }

  static ALWAYS void spread(const F (&number)[kNumbers], uint32_t* out) {
    I peak = {};  // bits of non-negative floats are ordered as the floats are
    for (int i = 0; i < kNumbers; ++i) {
      const I size = reinterpret_cast<I>(as_units(number[i]) & 0x7fffffffu);
      peak = size > peak ? size : peak;
    }
    const I least_power = I{} + (15 << 23), power = peak & 0x7f800000;
    const I kept = power > least_power ? power : least_power;
    const F scale = as_floats(reinterpret_cast<U>(kept - (14 << 23)));
    const F inverse = as_floats((268u << 23) - reinterpret_cast<U>(kept));
    I whole[kNumbers], sum = {};
    // The bits of 1.5 * 2^23 + n are those of 1.5 * 2^23, plus n.
    for (int i = 0; i < kNumbers; ++i) {
      whole[i] = reinterpret_cast<I>(as_units(number[i] * inverse + 12582912.0f)) - 0x4b400000;
      sum = sum + whole[i];
    }
    store(out, sum * -kExcess);
    store(out + kLanes, select(power == 0x7f800000, all(__builtin_nanf("")), scale));
    for (int i = 0; i < kUnits; ++i)
      store(out + (2 + i) * kLanes, (reinterpret_cast<U>(whole[i]) & 0xffffu) |
                                        (reinterpret_cast<U>(whole[i + kUnits]) << 16));
  }
};
#endif

// Shape of packed weights, and the tokens in the order of these weights.
struct Packed {
  int64_t words, steps;  // words of a row; steps of a row, kLanes words each
  int shift;             // 2^shift words share a scale; negative: one scale for a row
  int64_t groups;        // scales of a row
  int64_t tokens;
  uint32_t* x;  // for each block of kQuantTokens tokens: [steps][tokens][kVectors][kLanes]
};

// Return the memory of the block of tokens with first token `first`, or the number of its tokens.
template <class T>
ALWAYS uint32_t* block_at(const Packed& packed, int64_t first) {
  return packed.x + first * packed.steps * T::kVectors * kLanes;
}
ALWAYS int64_t block_tokens(const Packed& packed, int64_t first) {
  return least(kQuantTokens, packed.tokens - first);
}

// Write one token in the order of the weights that it meets, with zeros after the end.
template <class T>
void spread(const Packed& packed, const void* x, int64_t in, int64_t token) {
  constexpr int64_t kStep = kLanes * T::kNumbers;
  const int64_t place = token % kQuantTokens, count = block_tokens(packed, token - place);
  uint32_t* out = block_at<T>(packed, token - place) + place * T::kVectors * kLanes;
  for (int64_t first = 0; first < in; first += kStep, out += count * T::kVectors * kLanes) {
    float held[kStep] = {};
    for (int64_t i = 0; i < least(kStep, in - first); i += kLanes)
      store(held + i, T::read(x, token * in + first + i, in - first - i));
    float turned[kStep];
    for (int i = 0; i < T::kNumbers; ++i)
      for (int l = 0; l < kLanes; ++l) turned[i * kLanes + l] = held[l * T::kNumbers + i];
    F number[T::kNumbers];
    for (int i = 0; i < T::kNumbers; ++i) number[i] = load<F>(turned + i * kLanes);
    T::spread(number, out);
  }
}

// Return the scale of each lane in a step. All of them lie among kLanes neighbouring scales.
template <class T>
ALWAYS F lane_scales(const Packed& packed, const uint8_t* scales, int64_t step) {
  const int64_t first = (step * kLanes >> packed.shift) / kLanes * kLanes;
  const U lanes = reinterpret_cast<U>(kLaneNumbers);
  const U group = ((lanes + static_cast<uint32_t>(step * kLanes)) >> packed.shift) & (kLanes - 1u);
  return __builtin_shuffle(T::read(scales, first, packed.groups - first),
                           reinterpret_cast<I>(group));
}

// Scales of a step: none (the row has one scale), one for all lanes, one for each half of the
// lanes, or any number.
enum class Scales { kNone, kOne, kHalves, kAny };
template <class T>
ALWAYS Scales scales_of(const Packed& packed) {
  if (packed.shift < 0) return Scales::kNone;
  if (kLanes >> packed.shift <= 1) return Scales::kOne;
  return kLanes >> packed.shift == 2 && T::kPerUnit == 2 ? Scales::kHalves : Scales::kAny;
}

// Return the scales of a step as a vector.
template <class T, Scales kScales>
ALWAYS F step_scales(const Packed& packed, const uint8_t* scales, int64_t step) {
  if constexpr (kScales == Scales::kOne)
    return all(T::first(scales + (step * kLanes >> packed.shift) * 4 / T::kPerUnit));
  if constexpr (kScales == Scales::kHalves) return halves(all(load<uint32_t>(scales + 4 * step)));
  return lane_scales<T>(packed, scales, step);
}

// Return the sums of the lanes of four vectors: first over quads, then over the lanes of a quad.
ALWAYS Q join_rows(const F (&totals)[kQuantRows]) {
  float lanes[4 * kQuantRows];
  add_quads(totals, lanes);
  return (load<Q>(lanes) + load<Q>(lanes + 4)) + (load<Q>(lanes + 8) + load<Q>(lanes + 12));
}

// Multiply one token by kRows rows of one step, scale the sums, and add them to the totals of the
// rows. unit(r, u) returns unit u of row r.
template <class T, int kRows, bool kGrouped, class Unit>
ALWAYS void step_of(Unit unit, const F* scale, const uint32_t* x, F* totals) {
  constexpr int64_t kFirst = (T::kVectors - T::kUnits) * kLanes;
  typename T::Sum sum[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r] = T::begin(x);
#pragma GCC unroll 8
  for (int u = 0; u < T::kUnits; ++u) {
    const U factors = load<U>(x + kFirst + u * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r] = T::dot(sum[r], unit(r, u), factors);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const F found = T::end(sum[r], x);
    totals[r] = totals[r] + (kGrouped ? found * scale[r] : found);
  }
}

// Rows of which all units fit in half of the registers, while tokens are multiplied by them.
template <class T>
constexpr int kRowsHeld =
    kRegisters / 2 / T::kUnits < kQuantRows ? kRegisters / 2 / T::kUnits : kQuantRows;

// Multiply kQuantRows rows by the tokens from `token` on, and write sums[i * distance + row].
//
// kTokens: number of tokens; if 0, `count` tokens, at most kQuantTokens. next: weights to prefetch.
template <class T, int kTokens, Scales kScales>
void quantized_rows(const Packed& packed, int64_t token, int64_t count, const uint8_t* const* rows,
                    const uint8_t* const* scales, const uint8_t* next, float* sums,
                    int64_t distance) {
  constexpr int64_t kDistance = T::kVectors * kLanes;
  constexpr int kHeld = kRowsHeld<T>;
  constexpr bool kGrouped = kScales != Scales::kNone;
  // Measured on a Zen 4: with the second level, AVX-512 reads experts of 4 bits 1.3 and weights of
  // 8 bits 1.1 times as fast with one token; AVX2 and more tokens lose up to 14%.
  constexpr int kInto = kTokens == 1 && kRegisters == 32 ? kIntoSecondLevel : kIntoFirstLevel;
  const int64_t tokens = kTokens ? kTokens : count, whole = packed.words / kLanes;
  F totals[kTokens ? kTokens : kQuantTokens][kQuantRows];
#pragma GCC unroll 2
  for (int64_t i = 0; i < tokens; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < kQuantRows; ++r) totals[i][r] = F{};
  const uint8_t *at[kQuantRows], *scales_at[kQuantRows];  // copies, so that they stay in registers
#pragma GCC unroll 4
  for (int r = 0; r < kQuantRows; ++r) {
    at[r] = rows[r];
    scales_at[r] = scales[r];
  }

  const uint32_t* x = block_at<T>(packed, token);
  const auto step = [&](const U(&words)[kQuantRows],
                        const F(&scale)[kQuantRows]) __attribute__((always_inline)) {
    if constexpr (kTokens == 1 && kRegisters < 32) {
      // Row by row: 16 registers hold the units of one row, but not those of all rows.
#pragma GCC unroll 4
      for (int r = 0; r < kQuantRows; ++r) {
        const auto unit = [&](int, int u)
                              __attribute__((always_inline)) { return T::unit(words[r], u); };
        step_of<T, 1, kGrouped>(unit, scale + r, x, totals[0] + r);
      }
    } else if constexpr (kTokens == 1) {
      const auto unit = [&](int r, int u)
                            __attribute__((always_inline)) { return T::unit(words[r], u); };
      step_of<T, kQuantRows, kGrouped>(unit, scale, x, totals[0]);
    } else {
#pragma GCC unroll 4
      for (int first = 0; first < kQuantRows; first += kHeld) {
        U units[kHeld][T::kUnits];
#pragma GCC unroll 4
        for (int r = 0; r < kHeld; ++r)
#pragma GCC unroll 8
          for (int u = 0; u < T::kUnits; ++u) units[r][u] = T::unit(words[first + r], u);
        const auto unit = [&](int r, int u) __attribute__((always_inline)) { return units[r][u]; };
#pragma GCC unroll 2
        for (int64_t i = 0; i < tokens; ++i)
          step_of<T, kHeld, kGrouped>(unit, scale + first, x + i * kDistance, totals[i] + first);
      }
    }
    x += tokens * kDistance;
  };
  U words[kQuantRows];
  F scale[kQuantRows];
  for (int64_t t = 0; t < whole; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < kQuantRows; ++r) {
      words[r] = load<U>(at[r] + 4 * kLanes * t);
      if constexpr (kGrouped) scale[r] = step_scales<T, kScales>(packed, scales_at[r], t);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kQuantRows; i += kFetchedSteps)
      __builtin_prefetch(next + 4 * kLanes * i, 0, kInto);
    next += 4 * kLanes * kQuantRows;
    step(words, scale);
  }
  if (whole < packed.steps) {
#pragma GCC unroll 4
    for (int r = 0; r < kQuantRows; ++r) {
      words[r] = load_part<U>(at[r] + 4 * kLanes * whole, packed.words - kLanes * whole);
      if constexpr (kGrouped) scale[r] = lane_scales<T>(packed, scales_at[r], whole);
    }
    step(words, scale);
  }
  Q factors = Q{} + 1.0f;  // scales of the rows, if a row has one
  for (int r = 0; r < kQuantRows && !kGrouped; ++r) factors[r] = T::first(scales[r]);
#pragma GCC unroll 2
  for (int64_t i = 0; i < tokens; ++i) store(sums + i * distance, join_rows(totals[i]) * factors);
}

// Return quantized_rows for scales that are known at run time.
template <class T, int kTokens>
auto* rows_kernel(Scales scales) {
  switch (scales) {
    case Scales::kNone: return quantized_rows<T, kTokens, Scales::kNone>;
    case Scales::kOne: return quantized_rows<T, kTokens, Scales::kOne>;
    case Scales::kHalves: return quantized_rows<T, kTokens, Scales::kHalves>;
    default: return quantized_rows<T, kTokens, Scales::kAny>;
  }
}

// Arguments of one call for all of its items.
template <class T>
struct QuantizedCall {
  Batch batch;
  Packed packed;          // of the first matrix
  const int64_t* firsts;  // first token of each matrix in packed.x

  Packed of(int64_t matrix) const {
    Packed own = packed;
    own.tokens = batch.ops[matrix].tokens;
    own.x = block_at<T>(packed, firsts[matrix]);
    return own;
  }
};

// Compute the outputs of one panel for all tokens.
template <class T>
void quantized_panel(const QuantizedCall<T>& call, int64_t item, float* sums) {
  const int64_t matrix = call.batch.find(item);
  const Linear& op = call.batch.ops[matrix];
  const Packed packed = call.of(matrix);
  const Scales kind = scales_of<T>(packed);
  const int64_t first = item * call.batch.outs, scale_bytes = packed.groups * 4 / T::kPerUnit;
  const Panel panel = panel_at(op, op.weight, op.up, first, call.batch.outs, 4 * packed.words);
  const Panel scales = panel_at(op, op.scale, op.up_scale, first, call.batch.outs, scale_bytes);
  const int64_t bytes = 4 * packed.words * kQuantRows;
  const int64_t fetched = (kQuantPrefetchBytes + bytes - 1) / bytes * kQuantRows;
  for (int64_t token = 0; token < op.tokens; token += kQuantTokens) {
    const int64_t count = least(kQuantTokens, op.tokens - token);
    for (int r = 0; r < kWidth; r += kQuantRows) {
      const int64_t later = r + fetched;
      const uint8_t* next = panel.rows[later % kWidth] + later / kWidth * panel.next;
      auto* rows = count == 1   ? rows_kernel<T, 1>(kind)
                   : count == 2 ? rows_kernel<T, 2>(kind)
                                : rows_kernel<T, 0>(kind);
      rows(packed, token, count, panel.rows + r, scales.rows + r, next, sums + r, kWidth);
    }
    for (int64_t i = 0; i < count; ++i) finish<T>(op, first, sums + i * kWidth, token + i);
  }
}

// Multiply by `matrices` matrices: spread the tokens, then compute all panels.
template <class T>
void quantized_of(const Linear* ops, int64_t matrices, Team& team) {
  const Linear& op = ops[0];
  const int64_t words = op.in * op.bits / 32, steps = (words + kLanes - 1) / kLanes;
  const int64_t step_bytes = 4 * kLanes;
  const int64_t group_words = op.group * op.bits / 32;
  int shift = -1;
  while (group_words >> (shift + 1)) ++shift;
  const int64_t groups = op.group ? op.in / op.group : 1;
  int64_t all = 0;
  for (int64_t i = 0; i < matrices; ++i)
    if (!shares_tokens(ops, i)) all += ops[i].tokens;
  const int64_t x_bytes = all * steps * T::kVectors * step_bytes;
  auto* memory = static_cast<uint8_t*>(team.shared(x_bytes + 8 * matrices));
  const Batch batch(ops, matrices, op.up ? kHalf : kWidth);
  const Places places(batch, reinterpret_cast<int64_t*>(memory + x_bytes),
                      [](const Linear& op) { return op.tokens; });
  const Packed packed{words, steps, shift, groups, op.tokens, reinterpret_cast<uint32_t*>(memory)};
  const QuantizedCall<T> call{batch, packed, places.firsts};
  if (places.inputs == 1) {
    const auto one = [](const void* context, int64_t token, void*) {
      const auto& call = *static_cast<const QuantizedCall<T>*>(context);
      spread<T>(call.packed, call.batch.ops->x, call.batch.ops->in, token);
    };
    if (op.tokens == 1)
      one(&call, 0, nullptr);
    else
      team.run(op.tokens, kQuantTokens, 0, one, &call);
  } else {
    const auto one = [](const void* context, int64_t matrix, void*) {
      const auto& call = *static_cast<const QuantizedCall<T>*>(context);
      const Linear& op = call.batch.ops[matrix];
      if (shares_tokens(call.batch.ops, matrix)) return;
      const Packed packed = call.of(matrix);
      for (int64_t token = 0; token < op.tokens; ++token) spread<T>(packed, op.x, op.in, token);
    };
    team.run(matrices, kPanelsAtOnce, 0, one, &call);
  }
  team.run(
      call.batch.panels(), kPanelsAtOnce, 4 * kQuantTokens * kWidth,
      [](const void* context, int64_t item, void* memory) {
        quantized_panel(*static_cast<const QuantizedCall<T>*>(context), item,
                        static_cast<float*>(memory));
      },
      &call);
}

inline void quantized_linear(const Linear* ops, int64_t count, Team& team) {
  if (ops->tokens == 0) return;
  const bool is_float = ops->type == Type::kFloat;
#if defined(__AMX_BF16__)
  // Tiles need one scale for a row, or groups of whole steps that fit in a slice (kSlice).
  if (!is_float && ops->group % 32 == 0 && ops->group <= 256)
    return tiled_by_tokens(ops, count, team);
#endif
  if (is_float)
    ops->bits == 4 ? quantized_of<Floats<4>>(ops, count, team)
                   : quantized_of<Floats<8>>(ops, count, team);
  else
    ops->bits == 4 ? quantized_of<Pairs<4>>(ops, count, team)
                   : quantized_of<Pairs<8>>(ops, count, team);
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
