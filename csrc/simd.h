// Vectors of one instruction set: types, loads, arithmetic, and products of small matrices.
//
// Not here: products in AMX tiles (amx.h), large matrices (linear.h).
//
// isa.cc is compiled once for each instruction set, with all kernels in a namespace of their own.
// Do not use templates of std:: in these headers: of an instance that several sets compile, the
// linker keeps only one, perhaps with instructions that the processor does not have.
//
// A unit is 32 bits: one float, or two neighbouring bfloat16. `dot` multiplies units and adds in
// float, so that one matrix kernel serves both types.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernels.h"

// Attribute of functions in inner loops. A call that is not inlined passes its vectors through
// memory: 8 tokens then read weights at 25 GB/s instead of 37 (docs/log.md).
#define ALWAYS inline __attribute__((always_inline))

namespace slipway {
namespace SLIPWAY_ISA {

// kLanes: 32-bit lanes of a vector. kTileRows, kTileCols: shape of a tile of sums, in rows and
// vectors (`tile` below). kQuartets: quartets of tokens that linear.h multiplies together.
#if defined(__AVX512F__)
// Of 32 registers, a tile uses 24 for sums, 2 for weights and 1 for the broadcast operand. linear.h
// uses 16 for sums, 4 for rows, 4 for quartets and 1 for the shuffled row.
constexpr int kLanes = 16, kTileRows = 12, kTileCols = 2, kQuartets = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileRows = 4, kTileCols = 2, kQuartets = 2;
#else
constexpr int kLanes = 4, kTileRows = 4, kTileCols = 2, kQuartets = 2;
#endif

// Number of vector registers.
#if defined(__AVX512F__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));  // units
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef float Q __attribute__((vector_size(16)));  // four floats, with any instruction set
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));  // bfloat16, or other 16-bit numbers
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// Load and store a vector at any address.
template <class V>
ALWAYS V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
ALWAYS void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
// Load and store the first `n` lanes (at least 1), or all if `n` is larger. Other lanes are loaded
// as zeros, and not stored.
template <class V>
ALWAYS V load_part(const void* p, int64_t n) {
  if (n >= kLanes) return load<V>(p);
#if defined(__AVX512F__)
  const uint32_t lanes = (1u << n) - 1;
  if constexpr (sizeof(V) == 64)
    return reinterpret_cast<V>(_mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes), p));
  else if constexpr (sizeof(V) == 32)
    return reinterpret_cast<V>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), p));
  else
    return reinterpret_cast<V>(_mm_maskz_loadu_epi8(static_cast<__mmask16>(lanes), p));
#else
  V v = {};
  std::memcpy(&v, p, n * sizeof(V) / kLanes);
  return v;
#endif
}
template <class V>
ALWAYS void store_part(void* p, V v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  std::memcpy(p, &v, n * sizeof(V) / kLanes);
}

ALWAYS U as_units(F x) { return reinterpret_cast<U>(x); }
ALWAYS F as_floats(U x) { return reinterpret_cast<F>(x); }
ALWAYS F all(float x) { return F{} + x; }
ALWAYS U all(uint32_t x) { return U{} + x; }
ALWAYS F select(I mask, F yes, F no) { return mask ? yes : no; }
ALWAYS F max(F a, F b) {
#if defined(__AVX512F__)  // the expression below, in one instruction
  return _mm512_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Number of each lane.
constexpr I kLaneNumbers =
#if defined(__AVX512F__)
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
    {0, 1, 2, 3, 4, 5, 6, 7};
#else
    {0, 1, 2, 3};
#endif

// Return the sum, or the largest, of all lanes. The upper half is combined with the lower one until
// one lane is left, so the order of additions is fixed.
ALWAYS float sum(F x) {
#pragma GCC unroll 4
  for (int n = kLanes / 2; n > 0; n /= 2)
    x = x + __builtin_shuffle(x, (kLaneNumbers + n) & (kLanes - 1));
  return x[0];
}
ALWAYS float highest(F x) {
#pragma GCC unroll 4
  for (int n = kLanes / 2; n > 0; n /= 2)
    x = max(x, __builtin_shuffle(x, (kLaneNumbers + n) & (kLanes - 1)));
  return x[0];
}

// Return the first (`low`) or the second (`high`) bfloat16 of each unit as floats. The first one in
// memory is in the lower 16 bits.
ALWAYS F low(U pairs) { return as_floats(pairs << 16); }
ALWAYS F high(U pairs) { return as_floats(pairs & 0xffff0000u); }

// Return the first bfloat16 of a pair in the lower half of the lanes, and the second one in the
// upper half. All lanes of `pairs` hold the same pair.
ALWAYS F halves(U pairs) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  constexpr U bytes{0x01008080, 0x01008080, 0x01008080, 0x01008080,
                    0x03028080, 0x03028080, 0x03028080, 0x03028080};
  return _mm256_castsi256_ps(
      _mm256_shuffle_epi8(reinterpret_cast<__m256i>(pairs), reinterpret_cast<__m256i>(bytes)));
#else
  return as_floats(kLaneNumbers < kLanes / 2 ? pairs << 16 : pairs & 0xffff0000u);
#endif
}

// Shift both 16-bit halves of each unit to the right, filling with zeros.
template <int kBits>
ALWAYS U shift_halves(U pairs) {
  typedef uint16_t Halves __attribute__((vector_size(4 * kLanes)));
  return reinterpret_cast<U>(reinterpret_cast<Halves>(pairs) >> kBits);
}

// Multiply pairs of signed 16-bit integers: return a.first * b.first + a.second * b.second.
ALWAYS I multiply_pairs(U a, U b) {
#if defined(__AVX512BW__)
  return reinterpret_cast<I>(
      _mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<I>(
      _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<I>(
      _mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  const I first = reinterpret_cast<I>(a), second = reinterpret_cast<I>(b);
  return (first << 16 >> 16) * (second << 16 >> 16) + (first >> 16) * (second >> 16);
#endif
}

// Round to bfloat16, to nearest with ties to even. NaN stays NaN.
ALWAYS H to_bfloat16(F x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<H>(_mm512_cvtneps_pbh(x));
#else
  const U bits = as_units(x), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return __builtin_convertvector(((x == x) ? rounded : bits | 0x400000u) >> 16, H);
#endif
}
ALWAYS F from_bfloat16(H x) {
// Intrinsics, because GCC 12 converts two halves and joins them in the portable form.
#if defined(__AVX512F__)
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)), 16));
#elif defined(__AVX2__)
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)), 16));
#else
  return as_floats(__builtin_convertvector(x, U) << 16);
#endif
}

// Number types. kPerUnit: numbers of a unit. dot: sum + products of the numbers of two units.
// widen: the first number of each unit, then the second, as floats. read and write: convert `n`
// numbers from index `i` on to and from floats. first: one number. round: round to the type.
struct Float {
  static constexpr int kPerUnit = 1;
  static ALWAYS F dot(F sum, U a, U b) { return sum + as_floats(a) * as_floats(b); }
  static ALWAYS void widen(U units, F (&numbers)[1]) { numbers[0] = as_floats(units); }
  static ALWAYS F read(const void* p, int64_t i, int64_t n) {
    return load_part<F>(static_cast<const float*>(p) + i, n);
  }
  static ALWAYS void write(void* p, int64_t i, F x, int64_t n) {
    store_part(static_cast<float*>(p) + i, x, n);
  }
  static ALWAYS float first(const void* p) { return load<float>(p); }
  static ALWAYS F round(F x) { return x; }
};
struct BFloat16 {
  static constexpr int kPerUnit = 2;
  static ALWAYS void widen(U units, F (&numbers)[2]) {
    numbers[0] = low(units);
    numbers[1] = high(units);
  }
  static ALWAYS F dot(F sum, U a, U b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    sum = sum + low(a) * low(b);
    return sum + high(a) * high(b);
#endif
  }
  static ALWAYS F read(const void* p, int64_t i, int64_t n) {
    return from_bfloat16(load_part<H>(static_cast<const uint16_t*>(p) + i, n));
  }
  static ALWAYS void write(void* p, int64_t i, F x, int64_t n) {
    store_part(static_cast<uint16_t*>(p) + i, to_bfloat16(x), n);
  }
  static ALWAYS float first(const void* p) {
    const uint32_t bits = static_cast<uint32_t>(load<uint16_t>(p)) << 16;
    return load<float>(&bits);
  }
  static ALWAYS F round(F x) { return from_bfloat16(to_bfloat16(x)); }
};

// Exponential function (expf of Cephes): exp(x) = 2^n * exp(r) with |r| <= ln(2) / 2, and a
// polynomial of degree 6 for exp(r). The relative error is below 2e-7. `x` is clamped to [-87, 88].
ALWAYS F exp(F x) {
#if defined(__AVX512F__)
  x = max(_mm512_min_ps(x, all(88.0f)), all(-87.0f));
  const F whole = _mm512_roundscale_ps(x * 1.44269504f, 0);
#else
  x = max(x < 88.0f ? x : all(88.0f), all(-87.0f));
  const F turns = x * 1.44269504f;
  const I n = __builtin_convertvector(turns + (turns < 0.0f ? all(-0.5f) : all(0.5f)), I);
  const F whole = __builtin_convertvector(n, F);
#endif
  const F r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, whole);
#else
  return p * reinterpret_cast<F>((n + 127) << 23);
#endif
}

// A vector consists of kQuads quads: runs of four lanes. The tables are indices of shuffles.
constexpr int kQuads = kLanes / 4;
#if defined(__AVX512F__)
constexpr U kLow{0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
constexpr U kHigh{2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
constexpr U kLowPair{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
constexpr U kHighPair{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
constexpr U kFirstOfQuad{0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
constexpr U kEvenQuads{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
constexpr U kOddQuads{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
#elif defined(__AVX2__)
constexpr U kLow{0, 8, 1, 9, 4, 12, 5, 13}, kHigh{2, 10, 3, 11, 6, 14, 7, 15};
constexpr U kLowPair{0, 1, 8, 9, 4, 5, 12, 13}, kHighPair{2, 3, 10, 11, 6, 7, 14, 15};
constexpr U kFirstOfQuad{0, 0, 0, 0, 4, 4, 4, 4};
#else
constexpr U kLow{0, 4, 1, 5}, kHigh{2, 6, 3, 7};
constexpr U kLowPair{0, 1, 4, 5}, kHighPair{2, 3, 6, 7};
constexpr U kFirstOfQuad{0, 0, 0, 0};
#endif
// Transpose each quad of four rows: lane 4 q + i of w[c] gets the value of lane 4 q + c of w[i].
ALWAYS void quads(U* w) {
  const U a = __builtin_shuffle(w[0], w[1], kLow), b = __builtin_shuffle(w[0], w[1], kHigh);
  const U c = __builtin_shuffle(w[2], w[3], kLow), d = __builtin_shuffle(w[2], w[3], kHigh);
  w[0] = __builtin_shuffle(a, c, kLowPair);
  w[1] = __builtin_shuffle(a, c, kHighPair);
  w[2] = __builtin_shuffle(b, d, kLowPair);
  w[3] = __builtin_shuffle(b, d, kHighPair);
}

#if defined(__AVX512F__)
// Transpose kLanes rows of kLanes units: first within quads, then whole quads across the rows.
ALWAYS void transpose(U (&w)[kLanes]) {
  constexpr U even = kEvenQuads, odd = kOddQuads;
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) quads(w + i);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const U a = __builtin_shuffle(w[c], w[4 + c], even);
    const U b = __builtin_shuffle(w[8 + c], w[12 + c], even);
    const U d = __builtin_shuffle(w[c], w[4 + c], odd);
    const U e = __builtin_shuffle(w[8 + c], w[12 + c], odd);
    w[c] = __builtin_shuffle(a, b, even);
    w[8 + c] = __builtin_shuffle(a, b, odd);
    w[4 + c] = __builtin_shuffle(d, e, even);
    w[12 + c] = __builtin_shuffle(d, e, odd);
  }
}
#endif

// Add the quads of each of four vectors, in pairs: out[4 i + r] is the sum of lanes i of all quads
// of vector r.
ALWAYS void add_quads(const F (&rows)[4], float* out) {
#if defined(__AVX512F__)
  constexpr U even = kEvenQuads, odd = kOddQuads;
  const F a = __builtin_shuffle(rows[0], rows[1], even) + __builtin_shuffle(rows[0], rows[1], odd);
  const F b = __builtin_shuffle(rows[2], rows[3], even) + __builtin_shuffle(rows[2], rows[3], odd);
  const F sums = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);  // lane 4 r + i
  store(out, __builtin_shuffle(sums, U{0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15}));
#else
  for (int r = 0; r < 4; ++r) {
    float lanes[kLanes];
    store(lanes, rows[r]);
    for (int i = 0; i < 4; ++i)
      out[4 * i + r] = kQuads == 2 ? lanes[i] + lanes[kLanes - 4 + i] : lanes[i];
  }
#endif
}

// Add the lanes of each of four vectors, in pairs: out[r] is the sum of vector r.
ALWAYS void add_lanes(const F (&rows)[4], float* out) {
  const F a =
      __builtin_shuffle(rows[0], rows[1], kLow) + __builtin_shuffle(rows[0], rows[1], kHigh);
  const F b =
      __builtin_shuffle(rows[2], rows[3], kLow) + __builtin_shuffle(rows[2], rows[3], kHigh);
  // Lane 4 q + r is the sum of quad q of vector r.
  float quads[kLanes];
  store(quads, __builtin_shuffle(a, b, kLowPair) + __builtin_shuffle(a, b, kHighPair));
  for (int r = 0; r < 4; ++r) {
    float sum = quads[r];
    for (int q = 1; q < kQuads; ++q) sum += quads[4 * q + r];
    out[r] = sum;
  }
}

// Second operand of a product: rows of kLanes units for each column. Row k of column j lies at
// at[k / segment * cols + j] + k % segment * step. So rows may lie in several places, as the pages
// of a cache do.
//
// While a product reads a row, it prefetches the row of the same number behind `next`: the operand
// of the product that follows.
struct Operand {
  const uint32_t *const *at, *const *next;
  int64_t rows, segment, step;  // rows in all; rows of one place; units between rows
};

// Multiply: c[i][j * kLanes + lane] += sum over k of a[i][k] . b[k][j][lane].
//
// kRows, kCols: rows of `a`, and columns of `b` in vectors. lda, ldc: units between rows of `a` and
// of `c`. fresh: write `c` instead of adding to it. Products are added in the order of k, so a
// result does not depend on the number of rows that are computed together.
template <class T, int kRows, int kCols>
inline void tile(const uint32_t* a, int64_t lda, const Operand& b, float* c, int64_t ldc,
                 bool fresh) {
  F sums[kRows][kCols];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) sums[i][j] = fresh ? F{} : load<F>(c + i * ldc + j * kLanes);
  const int64_t step = b.step;
  for (int64_t first = 0, s = 0; first < b.rows; first += b.segment, s += kCols) {
    const uint32_t* at[kCols];
    intptr_t next[kCols];  // distance from at[j] to the row to prefetch, in bytes
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) {
      at[j] = b.at[s + j];
      next[j] = reinterpret_cast<intptr_t>(b.next[s + j]) - reinterpret_cast<intptr_t>(at[j]);
    }
    const int64_t n = b.rows - first < b.segment ? b.rows - first : b.segment;
    // Pointers to every third row. The two rows after it are addressed with an index, so that the
    // pointers fit in registers.
    const uint32_t* third[(kRows + 2) / 3];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; i += 3) third[i / 3] = a + first + i * lda;
    for (int64_t k = 0; k < n; ++k) {
      U weights[kCols];
#pragma GCC unroll 4
      for (int j = 0; j < kCols; ++j) {
        weights[j] = load<U>(at[j]);
        __builtin_prefetch(
            reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(at[j]) + next[j]));
        at[j] += step;
      }
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const U x = all(third[i / 3][i % 3 * lda]);
#pragma GCC unroll 4
        for (int j = 0; j < kCols; ++j) sums[i][j] = T::dot(sums[i][j], weights[j], x);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; i += 3) third[i / 3] += 1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) store(c + i * ldc + j * kLanes, sums[i][j]);
}

// Rows of a tile with kCols columns: as many as registers hold sums.
template <int kCols>
constexpr int kRowsOf = kCols > kTileCols ? (kTileRows* kTileCols) / kCols : kTileRows;

// Columns of a tile with few rows. With fewer columns, additions would wait for each other.
constexpr int kWideCols = 2 * kTileCols;

// Call `tile` with a number of rows that is known at run time, from 1 to kRows.
template <class T, int kCols, int kRows = kRowsOf<kCols>>
inline void tile_of(int rows, const uint32_t* a, int64_t lda, const Operand& b, float* c,
                    int64_t ldc, bool fresh) {
  if (rows == kRows)
    tile<T, kRows, kCols>(a, lda, b, c, ldc, fresh);
  else if constexpr (kRows > 1)
    tile_of<T, kCols, kRows - 1>(rows, a, lda, b, c, ldc, fresh);
}

// Multiply any number of rows, in tiles of nearly equal size.
template <class T, int kCols>
inline void tiles(int64_t rows, const uint32_t* a, int64_t lda, const Operand& b, float* c,
                  int64_t ldc, bool fresh) {
  const int64_t turns = (rows + kRowsOf<kCols> - 1) / kRowsOf<kCols>;
  for (int64_t turn = 0, first = 0; turn < turns; ++turn) {
    const int64_t count = (rows - first) / (turns - turn) + ((rows - first) % (turns - turn) != 0);
    tile_of<T, kCols>(static_cast<int>(count), a + first * lda, lda, b, c + first * ldc, ldc,
                      fresh);
    first += count;
  }
}

// Return how many of the `left` columns to multiply together for a number of rows: 1, kTileCols or
// kWideCols.
inline int columns_for(int64_t rows, int64_t left) {
  if (rows <= kRowsOf<kWideCols> && left >= kWideCols) return kWideCols;
  return left >= kTileCols ? kTileCols : 1;
}

// Multiply with a number of columns that `columns_for` returned.
template <class T>
inline void tiles(int cols, int64_t rows, const uint32_t* a, int64_t lda, const Operand& b,
                  float* c, int64_t ldc, bool fresh) {
  if (cols == kWideCols)
    tiles<T, kWideCols>(rows, a, lda, b, c, ldc, fresh);
  else if (cols == kTileCols)
    tiles<T, kTileCols>(rows, a, lda, b, c, ldc, fresh);
  else
    tiles<T, 1>(rows, a, lda, b, c, ldc, fresh);
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
