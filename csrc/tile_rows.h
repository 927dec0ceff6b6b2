// Rows of weights as rows of tiles: decides how 32 numbers along `in`, a step, come from 16 bits
// each, or from 8 or 4.
//
// Bytes and nibbles are exact in bfloat16; scales are for the sums.

#pragma once

#include "amx.h"

#if defined(__AMX_BF16__)

namespace slipway {
namespace SLIPWAY_ISA {

typedef uint16_t Wide __attribute__((vector_size(4 * kLanes)));
constexpr Wide kWide{0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                     16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

struct WeightRow {
  const uint8_t* at;
  int64_t bytes;  // from there to its end
};

// step<kWhole>(row, t): kWhole if the row does not end within it, else zeros past its end, or what
// zeros will meet. arranged(x): a step of a token in the order of these numbers. kFewColumns: of
// tokens, up to which a panel is read as it lies, or as it is unpacked.
struct From16Bits {
  static constexpr int kBits = 16;
  static constexpr int64_t kFewColumns =
      12;  // 128 tokens, all matrices of a 0.6B shape: 74 ms, laid out 92; 224: 124, 116
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
  template <bool kWhole>
  static ALWAYS Wide numbers(const WeightRow& row, int64_t at) {
    const int64_t left = kWhole ? kLanes : row.bytes - at;
    if (left <= 0) return Wide{};
    const auto stored = reinterpret_cast<__m128i>(load_part<Bytes>(row.at + at, left));
    return reinterpret_cast<Wide>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(stored)) - 128.0f);
  }
  template <bool kWhole>
  static ALWAYS U step(const WeightRow& row, int64_t t) {
    const Wide first = numbers<kWhole>(row, 2 * kLanes * t),
               second = numbers<kWhole>(row, 2 * kLanes * t + kLanes);
    return reinterpret_cast<U>(
        __builtin_shuffle(first, second, 2 * kWide + 1));  // a float's upper half is its bfloat16
  }
  static ALWAYS U arranged(U x) { return x; }
};

// Unit 4 i + w of a step has nibbles i and i + 4 of word w.
struct From4Bits {
  static constexpr int kBits = 4;
  static constexpr int64_t kFewColumns = 2;
  // -8 to 7 in bfloat16, twice: of the five bits that choose among them the highest is another
  // nibble's.
  static constexpr Wide kMeanings{0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
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
        _mm512_permutexvar_epi16(nibbles, reinterpret_cast<__m512i>(kMeanings)));
  }
  static ALWAYS U arranged(U x) {
    const Wide word = kWide / 2 % 4, half = kWide % 2, nibble = kWide / 8;
    return reinterpret_cast<U>(
        __builtin_shuffle(reinterpret_cast<Wide>(x), 8 * word + nibble + 4 * half));
  }
};

}  // namespace SLIPWAY_ISA
}  // namespace slipway

#endif
