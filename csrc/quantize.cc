// Rounds weights to 4 or 8 bits: decides scales, and how numbers lie in words. Starts no threads.
//
// 8 bits: the largest magnitude becomes 127. 4 bits: -8 to 7 reach further on one side; candidates
// put the largest number on either, or a little beyond, each is fitted to the whole numbers that it
// gives by least squares, and the one of the least squared error is taken. Errors weigh sqrt(|x|)
// (docs/log.md). A scale is rounded to its own type before numbers are divided by it, so that its
// rounding adds no error.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EVERY_SET __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_SET
#endif

namespace {

constexpr int kCandidates = 8;  // where the largest number comes to lie: 6.5 to 8.6
constexpr float kNearest = 6.5f, kStep = 0.3f;

float rounded(float x, bool to_bfloat16) {
  if (!to_bfloat16) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x == x) bits += 0x7fff + ((bits >> 16) & 1);  // NaN stays NaN
  bits &= 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Fit {
  float xq, qq, error;  // weighted sums of x q, q q and the squared error
};

// n numbers rounded to whole multiples of `scale` from -8 to 7.
FOR_EVERY_SET Fit fit(const float* x, const float* weight, int64_t n, float scale) {
  const float inverse = 1.0f / scale;
  float xq = 0.0f, qq = 0.0f, error = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    float q = std::nearbyintf(x[i] * inverse);
    q = q < -8.0f ? -8.0f : q > 7.0f ? 7.0f : q;
    const float d = x[i] - scale * q;
    xq += weight[i] * x[i] * q, qq += weight[i] * q * q, error += weight[i] * d * d;
  }
  return {xq, qq, error};
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

FOR_EVERY_SET float largest(
    const float* x, int64_t n) {  // by magnitude, with its sign; NaN or infinity if there is one
  float low = 0.0f, high = 0.0f, all = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    all += x[i] * 0.0f;
  }
  return (high > -low ? high : low) + all;
}

float scale_of(const float* x, int64_t n, int bits, bool to_bfloat16, float* weight) {
  const float peak = largest(x, n);
  if (peak == 0.0f || !(std::fabs(peak) <= 3.4028235e38f)) return peak;
  if (bits == 8) return rounded(std::fabs(peak) / 127.0f, to_bfloat16);
  for (int64_t i = 0; i < n; ++i) weight[i] = std::sqrt(std::fabs(x[i]));
  float best = 0.0f, least = INFINITY;
  for (int i = 0; i < 2 * kCandidates; ++i) {
    const float end = kNearest + kStep * static_cast<float>(i / 2),
                tried = i % 2 ? peak / end : -peak / end;
    const Fit first = fit(x, weight, n, tried);
    const float scale = rounded(first.qq > 0.0f ? first.xq / first.qq : tried, to_bfloat16);
    const float error = scale == 0.0f ? INFINITY : fit(x, weight, n, scale).error;
    if (error < least) best = scale, least = error;
  }
  return best;
}

}  // namespace

// weights [out][in], floats -> words [out][in * bits / 32], scales [out][in / group], floats,
// rounded to bfloat16 if asked. `group` divides `in`, and 32 / bits divides `group`.
extern "C" void slipway_quantize(const float* weights, int64_t out, int64_t in, int64_t bits,
                                 int64_t group, int64_t to_bfloat16, uint32_t* words,
                                 float* scales) {
  std::vector<float> weight(group);
  for (int64_t g = 0; g < out * (in / group); ++g) {
    const float* x = weights + g * group;
    scales[g] = scale_of(x, group, static_cast<int>(bits), to_bfloat16 != 0, weight.data());
    pack(x, group, scales[g], static_cast<int>(bits), words + g * group * bits / 32);
  }
}
