// Sampling of a token for each row of logits, and normalizer of log probabilities.
//
// Not here: penalties and bans of tokens (slipway/engine/sample.py).
//
// Nothing is sorted. With s = (logit - largest) / temperature <= 0, the key of a token is the bits
// of |s|: these order the tokens as integers. So the k likeliest tokens, and the fewest tokens with
// a probability of at least p, are those up to a threshold of the key. Histograms find it digit by
// digit. Tokens with equal logits are all kept or all dropped. A draw returns the first token, in
// the order of ids, up to which the sum of kept probabilities exceeds `uniform` times the total.

#pragma once

#include "simd.h"

namespace slipway {
namespace SLIPWAY_ISA {

constexpr int kDigits[] = {11, 11, 10};  // bits of each digit, from the highest
constexpr int64_t kRun = 1024;           // tokens of a partial sum

// One row with temperature above 0.
struct Row {
  int64_t size;
  uint32_t* keys;  // [size]: bits of |s|
  float* probs;    // [size]: exp(s), 0 for dropped tokens
};

// Return the first of the largest logits.
inline int64_t argmax(const float* logits, int64_t size) {
  F best = all(logits[0]);
  for (int64_t i = 0; i + kLanes <= size; i += kLanes) best = max(load<F>(logits + i), best);
  float largest = highest(best);
  for (int64_t i = size / kLanes * kLanes; i < size; ++i)
    largest = logits[i] > largest ? logits[i] : largest;
  for (int64_t i = 0; i < size; ++i)
    if (logits[i] == largest) return i;
  return 0;
}

// Threshold that keeps all tokens.
constexpr uint32_t kNoLimit = 0xffffffffu;

// Return the smallest key such that the kept tokens up to it have the weight `wanted`, or kNoLimit
// if all together have less. The weight of a token is 1 with kCounts, otherwise its probability.
template <bool kCounts>
uint32_t threshold(const Row& row, double wanted) {
  double histogram[1 << 11], reached = 0;
  uint32_t prefix = 0;
  int shift = 32;
  for (int digit : kDigits) {
    const uint32_t above = shift == 32 ? 0 : kNoLimit << shift;
    shift -= digit;
    const uint32_t mask = (1u << digit) - 1;
    for (uint32_t i = 0; i <= mask; ++i) histogram[i] = 0;
    for (int64_t i = 0; i < row.size; ++i)
      if ((row.keys[i] & above) == prefix && row.probs[i] > 0)
        histogram[row.keys[i] >> shift & mask] += kCounts ? 1.0 : static_cast<double>(row.probs[i]);
    uint32_t bin = 0;
    while (bin <= mask && reached + histogram[bin] < wanted) reached += histogram[bin++];
    if (bin > mask) return kNoLimit;
    prefix |= bin << shift;
  }
  return prefix;
}

// Drop the tokens with a larger key than `limit`.
inline void drop_beyond(const Row& row, uint32_t limit) {
  if (limit == kNoLimit) return;
  for (int64_t i = 0; i < row.size; ++i) row.probs[i] = row.keys[i] <= limit ? row.probs[i] : 0.0f;
}

// Return the sum of `n` probabilities.
inline double total(const float* probs, int64_t n) {
  double whole = 0;
  for (int64_t i = 0; i < n; i += kLanes)
    whole += static_cast<double>(sum(load_part<F>(probs + i, n - i)));
  return whole;
}

// Draw a token: sum runs of tokens, then search the run that contains it.
inline int64_t draw(const Row& row, float uniform) {
  double before = 0;
  const double target = static_cast<double>(uniform) * total(row.probs, row.size);
  int64_t last = 0;
  for (int64_t first = 0; first < row.size; first += kRun) {
    const int64_t n = row.size - first < kRun ? row.size - first : kRun;
    const double here = total(row.probs + first, n);
    if (before + here > target) {
      for (int64_t i = first; i < first + n; ++i) {
        if (row.probs[i] > 0) last = i;
        before += static_cast<double>(row.probs[i]);
        if (before > target) return i;
      }
      return last;  // the run summed token by token differs in the last bit
    }
    before += here;
  }
  return last;
}

// Choose the token of row `b`. memory: keys, then probabilities.
inline void sample_row(const Sample& op, int64_t b, void* memory) {
  const float* logits = op.logits + b * op.vocab;
  const int64_t best = argmax(logits, op.vocab), V = op.vocab;
  const float temperature = op.temperature[b];
  op.token[b] = static_cast<int32_t>(best);
  if (!(temperature > 0)) return;
  const Row row{V, static_cast<uint32_t*>(memory),
                static_cast<float*>(memory) + (V + 15) / 16 * 16};
  const float least_kept = op.min_p[b] > 0 ? __builtin_logf(op.min_p[b]) : -__builtin_inff();
  for (int64_t i = 0; i < V; i += kLanes) {
    const int64_t n = V - i;
    const F s = (load_part<F>(logits + i, n) - logits[best]) / temperature;
    store_part(row.keys + i, as_units(s) & 0x7fffffffu, n);
    store_part(row.probs + i, select(s >= least_kept, select(s > -87.0f, exp(s), F{}), F{}), n);
  }
  if (op.top_k[b] > 0 && op.top_k[b] < V) drop_beyond(row, threshold<true>(row, op.top_k[b]));
  if (op.top_p[b] < 1) drop_beyond(row, threshold<false>(row, op.top_p[b] * total(row.probs, V)));
  op.token[b] = static_cast<int32_t>(draw(row, op.uniform[b]));
}

inline void sample(const Sample& op, Team& team) {
  team.run(
      op.rows, 1, 8 * (op.vocab + 32),
      [](const void* context, int64_t b, void* memory) {
        sample_row(*static_cast<const Sample*>(context), b, memory);
      },
      &op);
}

// Compute the normalizer of row `b`. Runs of kRun logits are summed in floats, lane by lane, and
// the runs in order in doubles, so a sum does not depend on the number of rows.
inline void log_normalizer_row(const LogNormalizer& op, int64_t b) {
  const float* logits = op.logits + b * op.vocab;
  const float largest = logits[argmax(logits, op.vocab)];
  double whole = 0;
  for (int64_t first = 0; first < op.vocab; first += kRun) {
    const int64_t end = least(first + kRun, op.vocab);
    F run = {};
    for (int64_t i = first; i < end; i += kLanes) {
      const F s = load_part<F>(logits + i, end - i) - largest;
      // exp(s) is 0 below -87. NaN stays NaN.
      const F term = select(s > -87.0f, exp(s), s == s ? F{} : s);
      run =
          run + (end - i < kLanes ? select(kLaneNumbers < static_cast<int32_t>(end - i), term, F{})
                                  : term);
    }
    whole += static_cast<double>(sum(run));
  }
  op.largest[b] = largest;
  op.log_sum[b] = static_cast<float>(__builtin_log(whole));
}

inline void log_normalizer(const LogNormalizer& op, Team& team) {
  team.run(
      op.rows, 1, 0,
      [](const void* context, int64_t b, void*) {
        log_normalizer_row(*static_cast<const LogNormalizer*>(context), b);
      },
      &op);
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
