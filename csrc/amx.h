// Tile registers of AMX, and products of any number of rows in tiles or vectors.
//
// Not here: choice of AMX for this process (dispatch.cc), large matrices (tiled_linear.h),
// attention (attention.h).
//
// A product of tiles adds to c[i][j], 16 x 16 floats, the sum over up to 16 units k of
// a[i][k] . b[k][j], in the order of k. The bits of a result do not depend on other rows or
// columns. Instruction sets without AMX get a function `products` that uses vectors only.

#pragma once

#include "simd.h"

#if defined(__AMX_BF16__)

namespace slipway {
namespace SLIPWAY_ISA {

constexpr int kSide = 16;                 // rows of a tile, and its columns in units
constexpr int64_t kTile = kSide * kSide;  // units of a tile

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer does not see loads and stores of tiles. So ordinary instructions touch the same
// bytes: for each row of a register, touch(address, bytes).
inline thread_local int64_t tile_rows[8], tile_row_bytes[8];  // shape of each register
template <class Touch>
void for_each_row(int number, const void* place, int64_t distance, Touch touch) {
  for (int64_t i = 0; i < tile_rows[number]; ++i)
    touch(static_cast<char*>(const_cast<void*>(place)) + i * distance, tile_row_bytes[number]);
}
#endif

// Configuration of the tile registers of this thread, released when the object is destroyed.
//
// Registers 0 to 3 hold sums, 4 and 5 first operands, 6 and 7 second operands. Sums and first
// operands have `rows` rows (at most 16); sums and second operands have `columns` columns.
// Registers 4 and 6 hold 16 units of the inner dimension, registers 5 and 7 hold `units` units.
// Other users of tiles in this process configure their own shapes.
class Tiles {
 public:
  Tiles(int64_t rows, int64_t units, int64_t columns = kSide) {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    const int64_t height[] = {rows, rows, rows, rows, rows, rows, kSide, units};
    const int64_t width[] = {columns, columns, columns, columns, kSide, units, columns, columns};
    for (int i = 0; i < 8; ++i) {
      shape.rows[i] = static_cast<uint8_t>(least(height[i], kSide));
      shape.row_bytes[i] = static_cast<uint16_t>(4 * width[i]);
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
#if defined(__SANITIZE_ADDRESS__)
    for (int i = 0; i < 8; ++i) {
      tile_rows[i] = shape.rows[i];
      tile_row_bytes[i] = shape.row_bytes[i];
    }
#endif
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
};

template <int kRegister>
ALWAYS void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kRegister));
}

// Load or store a register. Its rows lie `distance` bytes apart in memory.
template <int kRegister>
ALWAYS void tile_load(const void* from, int64_t distance) {
#if defined(__SANITIZE_ADDRESS__)
  for_each_row(kRegister, from, distance, [](const char* row, int64_t bytes) {
    char held[4 * kSide];
    std::memcpy(held, row, bytes);
    asm volatile("" ::"m"(held));
  });
#endif
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(distance), "i"(kRegister)
               : "memory");
}
template <int kRegister>
ALWAYS void tile_store(void* to, int64_t distance) {
#if defined(__SANITIZE_ADDRESS__)
  for_each_row(kRegister, to, distance,
               [](char* row, int64_t bytes) { std::memset(row, 0, bytes); });
#endif
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(distance), "i"(kRegister)
               : "memory");
}

// Add the product of registers kA and kB to register kSum.
template <int kSum, int kA, int kB>
ALWAYS void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

template <int kNumber>
struct Number {
  static constexpr int value = kNumber;
};

// Call body(Number<i>) for each i in [0, kCount). Numbers of registers have to be known when the
// code is compiled.
template <int kCount, class Body>
ALWAYS void each(Body body) {
  if constexpr (kCount > 1) each<kCount - 1>(body);
  body(Number<kCount - 1>{});
}

// Rows that `products` computes together. Scratch memory has to hold a multiple of them.
constexpr int64_t kRowsAtOnce = kSide;
// Units of the inner dimension that one product adds. A page of 16 tokens has 8 units in a column
// of bfloat16 values.
constexpr int64_t kUnitsAtOnce = 8;

// Multiply with tiles: kRows tiles of rows of `a` by kCols of the `cols` columns of `b`, from
// column `col` on. Each product of tiles adds kUnits units. Other parameters: `tile` in simd.h.
template <int kRows, int kCols, int kUnits>
void tile_products(const uint32_t* a, int64_t lda, const Operand& b, int cols, int col, float* c,
                   int64_t ldc, bool fresh) {
  constexpr int kA = kUnits == kSide ? 4 : 5, kB = kA + 2;
  each<kRows * kCols>([&](auto i) {
    float* sums = c + i.value / kCols * kSide * ldc + (col + i.value % kCols) * kSide;
    fresh ? tile_zero<i.value>() : tile_load<i.value>(sums, 4 * ldc);
  });
  int64_t k = 0;
  for (int64_t s = col; k < b.rows; s += cols)
    for (int64_t at = 0, n = least(b.segment, b.rows - k) * b.step; at < n;
         at += kUnits * b.step, k += kUnits)
      each<kCols>([&](auto j) {
        tile_load<kB>(b.at[s + j.value] + at, 4 * b.step);
        for (int64_t i = 0; i < kUnits; ++i)
          __builtin_prefetch(b.next[s + j.value] + at + i * b.step);
        each<kRows>([&](auto r) {
          if (kRows > 1 || j.value == 0) tile_load<kA>(a + r.value * kSide * lda + k, 4 * lda);
          tile_dot<r.value * kCols + j.value, kA, kB>();
        });
      });
  each<kRows * kCols>([&](auto i) {
    tile_store<i.value>(c + i.value / kCols * kSide * ldc + (col + i.value % kCols) * kSide,
                        4 * ldc);
  });
}

// Compute the results of tile_products, with the same bits, in vectors. kRows counts rows, not
// tiles.
//
// A product of tiles adds one sum over the lower halves of the units and one over the upper halves,
// and so does this function. Attention of one token, with two rows, reads the cache from memory at
// 28 GB/s in vectors, and at 23 GB/s in tiles, which are mostly empty then.
template <int kRows, int kCols, int kUnits>
void vector_products(const uint32_t* a, int64_t lda, const Operand& b, int cols, int col, float* c,
                     int64_t ldc, bool fresh) {
  F sums[kRows][kCols];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j)
      sums[r][j] = fresh ? F{} : load<F>(c + r * ldc + (col + j) * kLanes);
  int64_t k = 0;
  for (int64_t s = col; k < b.rows; s += cols)
    for (int64_t at = 0, n = least(b.segment, b.rows - k) * b.step; at < n;
         at += kUnits * b.step, k += kUnits) {
      F lower[kRows][kCols] = {}, upper[kRows][kCols] = {};
      for (int64_t i = 0; i < kUnits; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kCols; ++j) {
          const U w = load<U>(b.at[s + j] + at + i * b.step);
          __builtin_prefetch(b.next[s + j] + at + i * b.step);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const U x = all(a[r * lda + k + i]);
            lower[r][j] = lower[r][j] + low(w) * low(x);
            upper[r][j] = upper[r][j] + high(w) * high(x);
          }
        }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < kCols; ++j) sums[r][j] = sums[r][j] + (lower[r][j] + upper[r][j]);
    }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) store(c + r * ldc + (col + j) * kLanes, sums[r][j]);
}

constexpr int64_t kFewRows = 4;  // up to this number of rows, vectors are as fast as tiles

// Compute the results of `tiles` (simd.h), kUnits units of the inner dimension at a time.
//
// Up to kFewRows rows are computed in vectors. More rows are computed in tiles of 16 rows, so `a`
// is read and `c` is written up to the next multiple of 16 rows.
template <class T, int kUnits>
void products(int cols, int64_t rows, const uint32_t* a, int64_t lda, const Operand& b, float* c,
              int64_t ldc, bool fresh) {
  if (T::kPerUnit == 1 || b.segment % kUnits || b.rows % kUnits)
    return tiles<T>(cols, rows, a, lda, b, c, ldc, fresh);
  const auto run = [&](auto wide, auto narrow, int together) {
    if (cols % together) {
      together = 1;
      wide = narrow;
    }
    for (int col = 0; col < cols; col += together) wide(a, lda, b, cols, col, c, ldc, fresh);
  };
  const auto in_vectors = [&](auto r) {
    constexpr int kRows = r.value, kWide = kRows > 2 ? 2 : 4;
    run(vector_products<kRows, kWide, kUnits>, vector_products<kRows, 1, kUnits>, kWide);
  };
  const auto in_tiles = [&](auto r) {
    constexpr int kRows = r.value, kWide = 4 / kRows;
    run(tile_products<kRows, kWide, kUnits>, tile_products<kRows, 1, kUnits>, kWide);
  };
  if (rows <= kFewRows)
    return each<kFewRows>([&](auto i) {
      if (rows == i.value + 1) in_vectors(Number<i.value + 1>{});
    });
  for (; rows > 0; rows -= 4 * kSide, a += 4 * kSide * lda, c += 4 * kSide * ldc) {
    const int64_t held = least((rows + kSide - 1) / kSide, 4);
    each<4>([&](auto i) {
      if (held == i.value + 1) in_tiles(Number<i.value + 1>{});
    });
  }
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway

#else  // no AMX

namespace slipway {
namespace SLIPWAY_ISA {

constexpr int64_t kRowsAtOnce = 1, kUnitsAtOnce = 1;

struct Tiles {
  Tiles(int64_t, int64_t) {}
};

template <class T, int kUnits>
void products(int cols, int64_t rows, const uint32_t* a, int64_t lda, const Operand& b, float* c,
              int64_t ldc, bool fresh) {
  tiles<T>(cols, rows, a, lda, b, c, ldc, fresh);
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway

#endif
