// Vectors of one instruction set: what a lane, a load and a product are. Included once per set, in a namespace of its own.
//
// A *unit* is 32 bits: one float, or two bfloat16 neighbours. `dot` multiplies units and sums in float, so one matrix
// kernel serves both types. Nothing here may come from a std:: template: the linker would keep one copy for all sets.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace slipway {
namespace SLIPWAY_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 12, kTileCols = 2;  // 24 sums, 2 weights, 1 broadcast of 32 registers
constexpr int kFewRows = 8;  // rows whose sums fit the registers beside a transposed block
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileRows = 4, kTileCols = 2, kFewRows = 4;
#else
constexpr int kLanes = 4, kTileRows = 4, kTileCols = 2, kFewRows = 4;
#endif

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
inline U as_units(F x) { return reinterpret_cast<U>(x); }
inline F as_floats(U x) { return reinterpret_cast<F>(x); }
inline F all(float x) { return F{} + x; }
inline U all(uint32_t x) { return U{} + x; }
inline F select(I mask, F yes, F no) { return mask ? yes : no; }
inline F max(F a, F b) { return a > b ? a : b; }

inline float sum(F x) {  // in a fixed order: halves onto each other
  float lanes[kLanes];
  store(lanes, x);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}
inline float highest(F x) {
  float lanes[kLanes], best;
  store(lanes, x);
  best = lanes[0];
  for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// Two bfloat16 in a unit: the first in memory is the lower half.
inline F low(U pairs) { return as_floats(pairs << 16); }
inline F high(U pairs) { return as_floats(pairs & 0xffff0000u); }

struct Float {
  static constexpr int kPerUnit = 1;
  static inline F dot(F sum, U a, U b) { return sum + as_floats(a) * as_floats(b); }
};
struct BFloat16 {
  static constexpr int kPerUnit = 2;
  static inline F dot(F sum, U a, U b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    sum = sum + low(a) * low(b);
    return sum + high(a) * high(b);
#endif
  }
};

// Round to nearest, ties to even; NaN stays NaN.
inline H to_bfloat16(F x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<H>(_mm512_cvtneps_pbh(x));
#else
  const U bits = as_units(x), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return __builtin_convertvector(((x == x) ? rounded : bits | 0x400000u) >> 16, H);
#endif
}
inline F from_bfloat16(H x) { return as_floats(__builtin_convertvector(x, U) << 16); }

// Cephes' expf: exp(x) = 2^n * exp(r) with |r| <= ln(2) / 2 and a polynomial of degree 6; relative error below 2e-7.
inline F exp(F x) {
  x = max(x < 88.0f ? x : all(88.0f), all(-87.0f));
  const F turns = x * 1.44269504f;
  const I n = __builtin_convertvector(turns + (turns < 0.0f ? all(-0.5f) : all(0.5f)), I);
  const F whole = __builtin_convertvector(n, F);
  const F r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * reinterpret_cast<F>((n + 127) << 23);
}

// rows[i] lane j -> rows[j] lane i: rounds of pairwise interleaving, first within 128 bits and then of them.
inline void transpose(U (&rows)[kLanes]) {
  U turned[kLanes];
#if defined(__AVX512F__)
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    turned[i] = __builtin_shuffle(rows[i], rows[i + 1], U{0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29});
    turned[i + 1] = __builtin_shuffle(rows[i], rows[i + 1], U{2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31});
  }
  constexpr U lows{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  constexpr U highs{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // rows[i + c]: column c of each 128 bits, of rows i to i + 3
    rows[i] = __builtin_shuffle(turned[i], turned[i + 2], lows);
    rows[i + 1] = __builtin_shuffle(turned[i], turned[i + 2], highs);
    rows[i + 2] = __builtin_shuffle(turned[i + 1], turned[i + 3], lows);
    rows[i + 3] = __builtin_shuffle(turned[i + 1], turned[i + 3], highs);
  }
  constexpr U even{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  constexpr U odd{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    turned[c] = __builtin_shuffle(rows[c], rows[c + 4], even);
    turned[c + 4] = __builtin_shuffle(rows[c], rows[c + 4], odd);
    turned[c + 8] = __builtin_shuffle(rows[c + 8], rows[c + 12], even);
    turned[c + 12] = __builtin_shuffle(rows[c + 8], rows[c + 12], odd);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    rows[c] = __builtin_shuffle(turned[c], turned[c + 8], even);
    rows[c + 4] = __builtin_shuffle(turned[c + 4], turned[c + 12], even);
    rows[c + 8] = __builtin_shuffle(turned[c], turned[c + 8], odd);
    rows[c + 12] = __builtin_shuffle(turned[c + 4], turned[c + 12], odd);
  }
#else
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < kLanes / 2; ++i) {
      const U a = rows[i], b = rows[i + kLanes / 2];
#if defined(__AVX2__)
      turned[2 * i] = __builtin_shuffle(a, b, U{0, 8, 1, 9, 2, 10, 3, 11});
      turned[2 * i + 1] = __builtin_shuffle(a, b, U{4, 12, 5, 13, 6, 14, 7, 15});
#else
      turned[2 * i] = __builtin_shuffle(a, b, U{0, 4, 1, 5});
      turned[2 * i + 1] = __builtin_shuffle(a, b, U{2, 6, 3, 7});
#endif
    }
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; ++i) rows[i] = turned[i];
  }
#endif
}

// c[i][j * kLanes + lane] += sum over k < n of a[i][k] . b[j][k * ldb + lane]; k in order, so that the result does not
// depend on how many rows are computed together. `fresh`: c is written, not added to. Distances in units. `ahead`: n
// cache lines to fetch meanwhile, or null.
template <class T, int kRows, int kCols>
inline void tile(const uint32_t* a, int64_t lda, const uint32_t* const* b, int64_t ldb, int64_t n, float* c,
                 int64_t ldc, bool fresh, const uint8_t* ahead = nullptr) {
  F sums[kRows][kCols];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) sums[i][j] = fresh ? F{} : load<F>(c + i * ldc + j * kLanes);
  const uint32_t* at[kCols];
#pragma GCC unroll 4
  for (int j = 0; j < kCols; ++j) at[j] = b[j];
  for (int64_t k = 0; k < n; ++k) {
    U weights[kCols];
    if (ahead) __builtin_prefetch(ahead + 64 * k, 0, 2);
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) weights[j] = load<U>(at[j] + k * ldb);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const U x = all(a[i * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kCols; ++j) sums[i][j] = T::dot(sums[i][j], weights[j], x);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) store(c + i * ldc + j * kLanes, sums[i][j]);
}

template <class T, int kCols, int kRows = kTileRows>
inline void tile_of(int rows, const uint32_t* a, int64_t lda, const uint32_t* const* b, int64_t ldb, int64_t n,
                    float* c, int64_t ldc, bool fresh, const uint8_t* ahead = nullptr) {
  if (rows == kRows)
    tile<T, kRows, kCols>(a, lda, b, ldb, n, c, ldc, fresh, ahead);
  else if constexpr (kRows > 1)
    tile_of<T, kCols, kRows - 1>(rows, a, lda, b, ldb, n, c, ldc, fresh, ahead);
}

// The same for any number of rows, in tiles as equal as they can be; the first kFetchTurns of them fetch n lines each,
// as many as the second operand has.
constexpr int64_t kFetchTurns = 4 * kTileCols * kLanes / 64;

template <class T, int kCols>
inline void tiles(int64_t rows, const uint32_t* a, int64_t lda, const uint32_t* const* b, int64_t ldb, int64_t n,
                  float* c, int64_t ldc, bool fresh, const uint8_t* ahead = nullptr) {
  const int64_t full = (rows + kTileRows - 1) / kTileRows, turns = ahead && full < kFetchTurns ? kFetchTurns : full;
  for (int64_t turn = 0, first = 0; turn < turns; ++turn) {
    const int64_t count = (rows - first) / (turns - turn) + ((rows - first) % (turns - turn) != 0);
    tile_of<T, kCols>(static_cast<int>(count), a + first * lda, lda, b, ldb, n, c + first * ldc, ldc, fresh, ahead && turn < kFetchTurns ? ahead + turn * 64 * n : nullptr);
    first += count;
  }
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
