// Rounds weights to 4 or 8 bits: decides scales, and how numbers lie in words. Starts no threads.
//
// 8 bits: the largest magnitude becomes 127. 4 bits: -8 to 7 reach further on one side; candidates put the largest number
// on either, or a little beyond, and the scale of the least squared error is taken. A scale is rounded to its own type
// before numbers are divided by it, so that its rounding adds no error.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EVERY_SET __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_SET
#endif

namespace {

constexpr int kCandidates = 12;

float rounded(float x, bool to_bfloat16) {
  if (!to_bfloat16) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x == x) bits += 0x7fff + ((bits >> 16) & 1);  // NaN stays NaN
  bits &= 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The squared error of n numbers rounded to whole multiples of `scale` from `least` to `most`.
FOR_EVERY_SET float error_of(const float* x, int64_t n, float scale, float least, float most) {
  const float inverse = 1.0f / scale;
  float sum = 0.0f;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    float q = std::nearbyintf(x[i] * inverse);
    q = q < least ? least : q > most ? most : q;
    const float d = x[i] - scale * q;
    sum += d * d;
  }
  return sum;
}

FOR_EVERY_SET void pack(const float* x, int64_t n, float scale, int bits, uint32_t* words) {
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  const float least = static_cast<float>(-(1 << (bits - 1))), most = -least - 1.0f;
  const int64_t per_word = 32 / bits;
  for (int64_t w = 0; w < n / per_word; ++w) {
    uint32_t word = 0;
    for (int64_t i = 0; i < per_word; ++i) {
      float q = std::nearbyintf(x[w * per_word + i] * inverse);
      q = q > least ? q : least;  // NaN, too: its scale tells
      q = q < most ? q : most;
      word |= static_cast<uint32_t>(static_cast<int32_t>(q - least)) << (bits * i);
    }
    words[w] = word;
  }
}

FOR_EVERY_SET float largest(const float* x, int64_t n) {  // by magnitude, with its sign; NaN or infinity if there is one
  float low = 0.0f, high = 0.0f, all = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    all += x[i] * 0.0f;
  }
  return (high > -low ? high : low) + all;
}

float scale_of(const float* x, int64_t n, int bits, bool to_bfloat16) {
  const float peak = largest(x, n);
  if (peak == 0.0f || !(std::fabs(peak) <= 3.4028235e38f)) return peak;
  if (bits == 8) return rounded(std::fabs(peak) / 127.0f, to_bfloat16);
  float best = 0.0f, least_error = INFINITY;
  for (int i = 0; i < kCandidates; ++i) {
    const float scale = rounded(-peak / (6.5f + 0.2f * i), to_bfloat16);  // peak becomes -6.5 to -8.7
    for (const float signed_scale : {scale, -scale}) {
      const float error = error_of(x, n, signed_scale, -8.0f, 7.0f);
      if (error < least_error) best = signed_scale, least_error = error;
    }
  }
  return best;
}

}  // namespace

// weights [out][in], floats -> words [out][in * bits / 32], scales [out][in / group], floats, rounded to bfloat16 if asked.
// `group` divides `in`, and 32 / bits divides `group`.
extern "C" void slipway_quantize(const float* weights, int64_t out, int64_t in, int64_t bits, int64_t group,
                                 int64_t to_bfloat16, uint32_t* words, float* scales) {
  for (int64_t g = 0; g < out * (in / group); ++g) {
    const float* x = weights + g * group;
    scales[g] = scale_of(x, group, static_cast<int>(bits), to_bfloat16 != 0);
    pack(x, group, scales[g], static_cast<int>(bits), words + g * group * bits / 32);
  }
}
