// Unpacking of weights into rows of AMX tiles: from 16, 8 or 4 bits to bfloat16.
//
// Not here: scales, which are applied to sums (tiled_linear.h).
//
// A step is 32 numbers along `in`: one row of a tile. Bytes and nibbles are exact in bfloat16.

#pragma once

#include "amx.h"

#if defined(__AMX_BF16__)

namespace slipway {
namespace SLIPWAY_ISA {

// All 16-bit lanes of a vector, and their numbers.
typedef uint16_t U16 __attribute__((vector_size(4 * kLanes)));
constexpr U16 kLaneNumbers16{0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                             16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

// Part of a row of weights.
struct WeightRow {
  const uint8_t* at;
  int64_t bytes;  // from `at` to the end of the row
};

// The next structs define how weights of kBits bits become rows of tiles.
//
// step<kWhole>(row, t): step t of a row. With kWhole, the row does not end within the step.
// Otherwise, numbers after its end are zeros, or they meet zeros of the tokens.
//
// arranged(x): a step of a token in the order of the numbers of a step of weights.
//
// kFewColumns: largest number of columns of 16 tokens for which weights are read in place, or
// unpacked while they are read. For more columns, they are laid out as tiles first.
struct From16Bits {
  static constexpr int kBits = 16;
  // Measured with all matrices of the Qwen3-0.6B shape: 128 tokens take 74 ms in place and 92 laid
  // out, 224 tokens take 124 and 116.
  static constexpr int64_t kFewColumns = 12;
  template <bool kWhole>
  static ALWAYS U step(const WeightRow& row, int64_t t) {
    const uint8_t* at = row.at + kLine * t;
    return kWhole ? load<U>(at) : load_part<U>(at, (row.bytes - kLine * t) / 4);
  }
  static ALWAYS U arranged(U x) { return x; }
};

struct From8Bits {
  static constexpr int kBits = 8;
  static constexpr int64_t kFewColumns = 2;
  // Convert 16 bytes from byte `at` on. The upper half of a float is the number in bfloat16.
  template <bool kWhole>
  static ALWAYS U16 numbers(const WeightRow& row, int64_t at) {
    const int64_t left = kWhole ? kLanes : row.bytes - at;
    if (left <= 0) return U16{};
    const auto stored = reinterpret_cast<__m128i>(load_part<Bytes>(row.at + at, left));
    return reinterpret_cast<U16>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(stored)) - 128.0f);
  }
  template <bool kWhole>
  static ALWAYS U step(const WeightRow& row, int64_t t) {
    const U16 first = numbers<kWhole>(row, 2 * kLanes * t);
    const U16 second = numbers<kWhole>(row, 2 * kLanes * t + kLanes);
    return reinterpret_cast<U>(__builtin_shuffle(first, second, 2 * kLaneNumbers16 + 1));
  }
  static ALWAYS U arranged(U x) { return x; }
};

// Unit 4 i + w of a step contains nibbles i and i + 4 of word w.
struct From4Bits {
  static constexpr int kBits = 4;
  static constexpr int64_t kFewColumns = 2;
  // The numbers -8 to 7 in bfloat16, twice: five bits choose an entry, and the highest of them
  // belongs to another nibble.
  static constexpr U16 kValues{0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                               0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                               0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                               0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  template <bool kWhole>
  static ALWAYS U step(const WeightRow& row, int64_t t) {
    const Bytes stored =
        load_part<Bytes>(row.at + kLanes * t, kWhole ? kLanes : row.bytes - kLanes * t);
    const U words = reinterpret_cast<U>(_mm512_broadcast_i32x4(reinterpret_cast<__m128i>(stored)));
    constexpr U shift{0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
    const auto nibbles = reinterpret_cast<__m512i>(words >> shift);
    return reinterpret_cast<U>(
        _mm512_permutexvar_epi16(nibbles, reinterpret_cast<__m512i>(kValues)));
  }
  static ALWAYS U arranged(U x) {
    const U16 word = kLaneNumbers16 / 2 % 4, half = kLaneNumbers16 % 2, nibble = kLaneNumbers16 / 8;
    return reinterpret_cast<U>(
        __builtin_shuffle(reinterpret_cast<U16>(x), 8 * word + nibble + 4 * half));
  }
};

}  // namespace SLIPWAY_ISA
}  // namespace slipway

#endif
