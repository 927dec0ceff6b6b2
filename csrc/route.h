// Choice of experts for each token, from the logits of a router.
//
// Not here: the router's multiplication (linear.h), the experts (experts.h), the meaning of the
// options (slipway/ops/routing.py).

#pragma once

#include "simd.h"

namespace slipway {
namespace SLIPWAY_ISA {

// Write scores[e] of one row of logits.
inline void router_scores(const Route& op, const float* logits, float* scores) {
  const int64_t E = op.experts;
  if (op.score == Score::kSigmoid) {
    for (int64_t e = 0; e < E; e += kLanes) {
      const F x = load_part<F>(logits + e, E - e);
      store_part(scores + e, 1.0f / (exp(F{} - x) + 1.0f), E - e);
    }
    return;
  }
  std::memcpy(scores, logits, 4 * E);
  if (op.score == Score::kSoftmaxOfChosen) return;
  float largest = logits[0];
  for (int64_t e = 1; e < E; ++e) largest = logits[e] > largest ? logits[e] : largest;
  F sums = {};
  for (int64_t e = 0; e < E; e += kLanes) {
    const F term = exp(load_part<F>(logits + e, E - e) - largest);
    store_part(scores + e, term, E - e);
    // Lanes after the end of the row count as zeros.
    sums = sums + load_part<F>(scores + e, E - e);
  }
  const float total = sum(sums);
  for (int64_t e = 0; e < E; ++e) scores[e] /= total;
}

// Write the indices of the `count` largest of `n` values, the largest first. Of equal values, the
// one with the lower index comes first.
inline void largest_of(const float* values, int64_t n, int64_t count, int32_t* indices) {
  int64_t held = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (held == count && !(values[i] > values[indices[count - 1]])) continue;
    int64_t at = held < count ? held++ : count - 1;
    for (; at > 0 && values[i] > values[indices[at - 1]]; --at) indices[at] = indices[at - 1];
    indices[at] = static_cast<int32_t>(i);
  }
}

// Set the values of experts outside the best groups to minus infinity. Scratch: op.groups floats,
// then op.groups integers.
inline void keep_best_groups(const Route& op, float* values, float* scratch) {
  const int64_t size = op.experts / op.groups;
  auto* best = reinterpret_cast<int32_t*>(scratch + op.groups);
  for (int64_t g = 0; g < op.groups; ++g) {
    int32_t two[2] = {};
    largest_of(values + g * size, size, op.two_of_group ? 2 : 1, two);
    scratch[g] = values[g * size + two[0]];
    if (op.two_of_group) scratch[g] += values[g * size + two[1]];
  }
  largest_of(scratch, op.groups, op.top_groups, best);
  for (int64_t g = 0; g < op.groups; ++g) {
    bool is_best = false;
    for (int64_t i = 0; i < op.top_groups; ++i) is_best |= best[i] == g;
    for (int64_t e = 0; e < size && !is_best; ++e) values[g * size + e] = -__builtin_inff();
  }
}

// Choose the experts of one token. Scratch: as `route` requests it.
inline void route_row(const Route& op, int64_t token, float* scratch) {
  const int64_t E = op.experts, K = op.chosen;
  float *scores = scratch, *values = scratch + E;
  int32_t* choice = op.choice + token * K;
  float* weights = op.weights + token * K;
  router_scores(op, op.logits + token * E, scores);
  for (int64_t e = 0; e < E; ++e) values[e] = op.bias ? scores[e] + op.bias[e] : scores[e];
  if (op.groups > 1) keep_best_groups(op, values, scratch + 2 * E);
  largest_of(values, E, K, choice);
  for (int64_t k = 0; k < K; ++k) weights[k] = scores[choice[k]];
  float total = 0.0f;
  if (op.score == Score::kSoftmaxOfChosen) {
    // The first one is the largest.
    const float largest = weights[0];
    for (int64_t k = 0; k < K; ++k) weights[k] = exp(all(weights[k] - largest))[0];
    for (int64_t k = 0; k < K; ++k) total += weights[k];
    for (int64_t k = 0; k < K; ++k) weights[k] /= total;
  }
  if (op.normalize) {
    total = 0.0f;
    for (int64_t k = 0; k < K; ++k) total += weights[k];
    for (int64_t k = 0; k < K; ++k) weights[k] /= total + op.epsilon;
  }
  for (int64_t k = 0; k < K; ++k) weights[k] *= op.scale;
}

inline void route(const Route& op, Team& team) {
  team.run(
      op.tokens, 16, 4 * (2 * op.experts + 2 * op.groups),
      [](const void* context, int64_t token, void* memory) {
        route_row(*static_cast<const Route*>(context), token, static_cast<float*>(memory));
      },
      &op);
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
