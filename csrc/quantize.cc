// Quantization of weights to 4 or 8 bits: scales, and numbers packed into words.
//
// Not here: multiplication by packed weights (quantized.h), threads, the same in NumPy
// (slipway/checkpoint/quantize.py).
//
// 8 bits: the scale maps the largest magnitude to 127.
//
// 4 bits: the range -8 to 7 is longer on one side. Candidates map the largest magnitude to the end
// of either side, or near it. Each candidate gives integers; a scale is fitted to them by least
// squares, with weights sqrt(|x|) (docs/log.md). The scale with the least error is taken.
//
// A scale is rounded to its type before numbers are divided by it, so this rounding adds no error.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// Attribute of functions that are compiled for several instruction sets. One version is chosen when
// the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EVERY_SET __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_SET
#endif

namespace {

// Candidates of either sign: the largest magnitude becomes 6.5, 6.8, ..., 8.6.
constexpr int kCandidates = 8;
constexpr float kFirstEnd = 6.5f, kEndStep = 0.3f;

// Return `x`, rounded to bfloat16 if requested.
float rounded(float x, bool to_bfloat16) {
  if (!to_bfloat16) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x == x) bits += 0x7fff + ((bits >> 16) & 1);  // NaN stays NaN
  bits &= 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Weighted sums over a group of numbers x and their integers q.
struct Fit {
  float xq, qq, error;  // of x * q, of q * q, of the squared error
};

// Round `n` numbers to multiples of `scale`, from -8 to 7.
FOR_EVERY_SET Fit fit(const float* x, const float* weight, int64_t n, float scale) {
  const float inverse = 1.0f / scale;
  float xq = 0.0f, qq = 0.0f, error = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    float q = std::nearbyintf(x[i] * inverse);
    q = q < -8.0f ? -8.0f : q > 7.0f ? 7.0f : q;
    const float d = x[i] - scale * q;
    xq += weight[i] * x[i] * q;
    qq += weight[i] * q * q;
    error += weight[i] * d * d;
  }
  return {xq, qq, error};
}

// Round `n` numbers to multiples of `scale` and pack them into words (struct Linear in kernels.h).
FOR_EVERY_SET void pack(const float* x, int64_t n, float scale, int bits, uint32_t* words) {
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  const float least = static_cast<float>(-(1 << (bits - 1))), most = -least - 1.0f;
  const int64_t per_word = 32 / bits;
  for (int64_t w = 0; w < n / per_word; ++w) {
    uint32_t word = 0;
    for (int64_t i = 0; i < per_word; ++i) {
      float q = std::nearbyintf(x[w * per_word + i] * inverse);
      q = q > least ? q : least;  // NaN becomes `least`; its group has the scale NaN
      q = q < most ? q : most;
      word |= static_cast<uint32_t>(static_cast<int32_t>(q - least)) << (bits * i);
    }
    words[w] = word;
  }
}

// Return the number of largest magnitude, with its sign. If a number is not finite, return NaN or
// infinity.
FOR_EVERY_SET float largest(const float* x, int64_t n) {
  float low = 0.0f, high = 0.0f, all = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    all += x[i] * 0.0f;
  }
  return (high > -low ? high : low) + all;
}

// Return the scale of a group of `n` numbers. weight: memory for `n` numbers.
float scale_of(const float* x, int64_t n, int bits, bool to_bfloat16, float* weight) {
  const float peak = largest(x, n);
  if (peak == 0.0f || !(std::fabs(peak) <= 3.4028235e38f)) return peak;
  if (bits == 8) return rounded(std::fabs(peak) / 127.0f, to_bfloat16);
  for (int64_t i = 0; i < n; ++i) weight[i] = std::sqrt(std::fabs(x[i]));
  float best = 0.0f, least = INFINITY;
  for (int i = 0; i < 2 * kCandidates; ++i) {
    const float end = kFirstEnd + kEndStep * static_cast<float>(i / 2);
    const float tried = i % 2 ? peak / end : -peak / end;
    const Fit first = fit(x, weight, n, tried);
    const float scale = rounded(first.qq > 0.0f ? first.xq / first.qq : tried, to_bfloat16);
    const float error = scale == 0.0f ? INFINITY : fit(x, weight, n, scale).error;
    if (error < least) {
      best = scale;
      least = error;
    }
  }
  return best;
}

}  // namespace

// Quantize weights [out][in] to words [out][in * bits / 32] and scales [out][in / group]. Scales
// are floats, rounded to bfloat16 if to_bfloat16 is not 0. `group` divides `in`, and 32 / bits
// divides `group`.
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
