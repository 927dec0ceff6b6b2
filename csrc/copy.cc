// Copies between strided arrays of one shape, streaming copies, and counts of large items.
//
// Not here: Python's side of these functions (slipway/checkpoint/copying.py), threads.
//
// Functions take the size of an item in bytes, not a dtype.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

// One axis of source and target.
struct Dim {
  int64_t size, dst, src;  // items; strides of target and source in bytes
};

// Items on a side of a block. Two blocks of 2-byte items, 8 kB each, stay in the first-level cache.
constexpr int64_t kBlock = 64;

#if defined(__SSE2__)
// Transpose 8 x 8 items of 2 bytes: row i of the source becomes column i of the target. Steps are
// bytes between rows.
inline void transpose_tile(const char* src, int64_t src_step, char* dst, int64_t dst_step,
                           uint16_t) {
  __m128i r[8], t[8];
  for (int i = 0; i < 8; ++i)
    r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i * src_step));
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm_unpacklo_epi32(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm_unpackhi_epi32(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm_unpacklo_epi32(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm_unpackhi_epi32(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + 2 * i * dst_step),
                     _mm_unpacklo_epi64(r[i], r[4 + i]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + (2 * i + 1) * dst_step),
                     _mm_unpackhi_epi64(r[i], r[4 + i]));
  }
}

// Transpose 4 x 4 items of 4 bytes.
inline void transpose_tile(const char* src, int64_t src_step, char* dst, int64_t dst_step,
                           uint32_t) {
  __m128i r[4], t[4];
  for (int i = 0; i < 4; ++i)
    r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i * src_step));
  for (int i = 0; i < 2; ++i) {
    t[2 * i] = _mm_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + 2 * i * dst_step),
                     _mm_unpacklo_epi64(t[i], t[2 + i]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + (2 * i + 1) * dst_step),
                     _mm_unpackhi_epi64(t[i], t[2 + i]));
  }
}

// Items on a side of a block that transpose_tile transposes.
template <class T>
constexpr int64_t kTile = 1;
template <>
constexpr int64_t kTile<uint16_t> = 8;
template <>
constexpr int64_t kTile<uint32_t> = 4;
template <class T>
inline void transpose_tile(const char* src, int64_t, char* dst, int64_t, T) {
  std::memcpy(dst, src, sizeof(T));
}
#else
template <class T>
constexpr int64_t kTile = 1;
template <class T>
inline void transpose_tile(const char* src, int64_t, char* dst, int64_t, T) {
  std::memcpy(dst, src, sizeof(T));
}
#endif

// Transpose one block: `rows` rows of `cols` neighbouring items in the source, src_step bytes
// apart, become `cols` rows of `rows` items in the target, dst_step bytes apart.
template <class T>
void transpose_block(const char* src, int64_t src_step, char* dst, int64_t dst_step, int64_t rows,
                     int64_t cols) {
  constexpr int64_t tile = kTile<T>;
  const int64_t full_rows = rows / tile * tile, full_cols = cols / tile * tile, size = sizeof(T);
  for (int64_t r = 0; r < full_rows; r += tile)
    for (int64_t c = 0; c < full_cols; c += tile)
      transpose_tile(src + r * src_step + c * size, src_step, dst + c * dst_step + r * size,
                     dst_step, T{});
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < full_rows ? full_cols : 0; c < cols; ++c)
      std::memcpy(dst + c * dst_step + r * size, src + r * src_step + c * size, size);
}

// Prefetch a block of the source while the one before it is transposed. The processor does not
// prefetch it, because its rows are too far apart.
template <class T>
inline void prefetch(const char* src, int64_t src_step, int64_t rows) {
#if defined(__GNUC__)
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t at = 0; at < kBlock * int64_t{sizeof(T)}; at += 64)
      __builtin_prefetch(src + r * src_step + at);
#endif
}

// Copy a plane. `a` is the axis of neighbouring items in the source, `b` that in the target.
//
// Each block is transposed into a buffer, and copied from there in whole lines. Without the buffer,
// rows of the target that lie a power of two apart would share a set of the first-level cache, and
// a line would leave the cache before it is complete.
template <class T>
void transpose(const char* src, char* dst, const Dim& a, const Dim& b) {
  alignas(64) T block[kBlock * kBlock];
  for (int64_t i = 0; i < b.size; i += kBlock) {
    const int64_t rows = std::min(kBlock, b.size - i);
    for (int64_t j = 0; j < a.size; j += kBlock) {
      const int64_t cols = std::min(kBlock, a.size - j);
      const char* from = src + i * b.src + j * a.src;
      prefetch<T>(from + kBlock * a.src, b.src, rows);
      transpose_block<T>(from, b.src, reinterpret_cast<char*>(block), kBlock * sizeof(T), rows,
                         cols);
      for (int64_t c = 0; c < cols; ++c)
        std::memcpy(dst + (j + c) * a.dst + i * b.dst, block + c * kBlock, rows * sizeof(T));
    }
  }
}

// Copy one row of items.
template <class T>
void copy_rows(const char* src, char* dst, const Dim& row) {
  if (row.src == sizeof(T) && row.dst == sizeof(T)) {
    std::memcpy(dst, src, row.size * sizeof(T));
  } else {
    for (int64_t i = 0; i < row.size; ++i)
      std::memcpy(dst + i * row.dst, src + i * row.src, sizeof(T));
  }
}

// Copy an array. If the last axis is contiguous in the target and another one in the source, planes
// of these two axes are transposed; otherwise rows of the last axis are copied.
template <class T>
void copy(char* dst, const char* src, std::vector<Dim> dims) {
  const int64_t size = sizeof(T);
  const Dim fastest = dims.back();
  dims.pop_back();
  int across = -1;  // contiguous axis of the source, if it is not the last one
  if (fastest.dst == size && fastest.src != size)
    for (size_t i = 0; i < dims.size(); ++i)
      if (dims[i].src == size) across = static_cast<int>(i);
  Dim other{};
  if (across >= 0) {
    other = dims[across];
    dims.erase(dims.begin() + across);
  }
  std::vector<int64_t> at(dims.size(), 0);
  for (;;) {
    if (across >= 0)
      transpose<T>(src, dst, other, fastest);
    else
      copy_rows<T>(src, dst, fastest);
    int d = static_cast<int>(dims.size()) - 1;
    for (; d >= 0; --d) {
      src += dims[d].src;
      dst += dims[d].dst;
      if (++at[d] < dims[d].size) break;
      src -= dims[d].src * dims[d].size;
      dst -= dims[d].dst * dims[d].size;
      at[d] = 0;
    }
    if (d < 0) return;
  }
}

// Attribute of functions that are compiled for several widths of registers. One version is chosen
// when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define SLIPWAY_WIDE __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define SLIPWAY_WIDE
#endif

// Count the items with a magnitude above `limit`. Partial counts have the type of the items, so a
// whole register of items takes one comparison and one subtraction. A part ends before such a count
// overflows.
template <class T>
inline __attribute__((always_inline)) int64_t count_above(const T* items, int64_t n,
                                                          uint64_t limit) {
  constexpr T magnitude = static_cast<T>(~T{0}) >> 1;
  constexpr int64_t most = std::min<uint64_t>(magnitude, 1 << 14);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += most) {
    T part = 0;
    for (int64_t j = i; j < std::min(n, i + most); ++j)
      part += static_cast<T>((items[j] & magnitude) > static_cast<T>(limit));
    count += part;
  }
  return count;
}

SLIPWAY_WIDE int64_t count_above_2(const uint16_t* items, int64_t n, uint64_t limit) {
  return count_above(items, n, limit);
}
SLIPWAY_WIDE int64_t count_above_4(const uint32_t* items, int64_t n, uint64_t limit) {
  return count_above(items, n, limit);
}
SLIPWAY_WIDE int64_t count_above_8(const uint64_t* items, int64_t n, uint64_t limit) {
  return count_above(items, n, limit);
}

}  // namespace

// Copy `n` bytes past the cache, to a target that is not read soon. An ordinary copy also fetches
// each line of the target before it is overwritten: a third of all bytes that it moves.
extern "C" void slipway_stream(char* dst, const char* src, int64_t n) {
#if defined(__SSE2__)
  const int64_t head = std::min<int64_t>(n, -reinterpret_cast<uintptr_t>(dst) & 63);
  std::memcpy(dst, src, head);
  int64_t at = head;
  for (; at + 64 <= n; at += 64) {
    const __m128i* from = reinterpret_cast<const __m128i*>(src + at);
    __m128i* to = reinterpret_cast<__m128i*>(dst + at);
    _mm_prefetch(src + at + 1024, _MM_HINT_NTA);
    const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
  }
  _mm_sfence();
  std::memcpy(dst + at, src + at, n - at);
#else
  std::memcpy(dst, src, n);
#endif
}

// Return how many of `n` items exceed `limit`, with their highest bit cleared. Of floats, these
// have a larger magnitude than the float with the bits of `limit`. Return -1 if items do not have
// 2, 4 or 8 bytes.
extern "C" int64_t slipway_count_above(const void* items, int64_t n, int64_t itemsize,
                                       uint64_t limit) {
  switch (itemsize) {
    case 2: return count_above_2(static_cast<const uint16_t*>(items), n, limit);
    case 4: return count_above_4(static_cast<const uint32_t*>(items), n, limit);
    case 8: return count_above_8(static_cast<const uint64_t*>(items), n, limit);
    default: return -1;
  }
}

// Copy an array of items of 1, 2, 4 or 8 bytes. Strides are in bytes and may be negative; a stride
// of 0 in the source repeats its items. Return 0, or 1 for another item size.
extern "C" int slipway_copy(char* dst, const char* src, int64_t ndim, const int64_t* shape,
                            const int64_t* dst_strides, const int64_t* src_strides,
                            int64_t itemsize) {
  std::vector<Dim> dims;
  for (int64_t i = 0; i < ndim; ++i) {
    if (shape[i] == 0) return 0;
    if (shape[i] == 1) continue;
    const Dim next{shape[i], dst_strides[i], src_strides[i]};
    if (!dims.empty() && dims.back().dst == next.dst * next.size &&
        dims.back().src == next.src * next.size)
      dims.back() = {dims.back().size * next.size, next.dst, next.src};
    else
      dims.push_back(next);
  }
  if (dims.empty()) dims.push_back({1, itemsize, itemsize});
  switch (itemsize) {
    case 1: copy<uint8_t>(dst, src, dims); return 0;
    case 2: copy<uint16_t>(dst, src, dims); return 0;
    case 4: copy<uint32_t>(dst, src, dims); return 0;
    case 8: copy<uint64_t>(dst, src, dims); return 0;
    default: return 1;
  }
}

// Bytes of a piece, which stays in the second-level cache. Each piece costs one memory fence.
constexpr int64_t kPiece = 1 << 17;

// Copy `n` items past the cache, and return how many exceed `limit`. Each piece is counted in the
// source, and then copied from the cache.
extern "C" int64_t slipway_stream_counted(char* dst, const char* src, int64_t n, int64_t itemsize,
                                          uint64_t limit) {
  int64_t count = 0;
  for (int64_t at = 0; at < n * itemsize; at += kPiece) {
    const int64_t size = std::min(kPiece, n * itemsize - at);
    count += slipway_count_above(src + at, size / itemsize, itemsize, limit);
    slipway_stream(dst + at, src + at, size);
  }
  return count;
}

// Read `n` bytes of a file from `offset` on, to `dst` unless it is null, and return how many items
// exceed `limit`. Return -1 if reading fails or the file is too short.
extern "C" int64_t slipway_read_counted(int file, int64_t offset, char* dst, int64_t n,
                                        int64_t itemsize, uint64_t limit) {
#if defined(__unix__) || defined(__APPLE__)
  std::vector<char> own(dst == nullptr ? kPiece : 0);
  int64_t count = 0;
  for (int64_t at = 0; at < n; at += kPiece) {
    char* to = dst == nullptr ? own.data() : dst + at;
    const int64_t size = std::min(kPiece, n - at);
    for (int64_t held = 0; held < size;) {
      const ssize_t more = pread(file, to + held, size - held, offset + at + held);
      if (more <= 0) return -1;
      held += more;
    }
    count += slipway_count_above(to, size / itemsize, itemsize, limit);
  }
  return count;
#else
  return -1;
#endif
}
