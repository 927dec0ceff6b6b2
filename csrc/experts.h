// Experts of a mixture-of-experts layer: gated layers of the tokens that chose them.
//
// Not here: the multiplications (linear.h, quantized.h, tiled_linear.h, transposed.h), the choice
// of experts (slipway/ops).
//
// A pair is a token and one of its experts on this device. SortedPairs are sorted by expert, and by
// token within an expert, so that each expert has one block of rows. Only the matrices of chosen
// experts are read. The results of a token are added in the order of the experts' numbers: the bits
// of its sum do not depend on the other tokens of the batch.

#pragma once

#include "quantized.h"
#include "transposed.h"

namespace slipway {
namespace SLIPWAY_ISA {

// Most experts that one call multiplies, and the pairs after which it takes no more.
constexpr int64_t kExpertsAtOnce = 64, kTokensAtOnce = 256;

// SortedPairs of a call, and the memory of their intermediate results.
struct SortedPairs {
  int64_t count = 0;
  int32_t* starts;      // [experts + 1]: first pair of each expert
  int32_t* tokens;      // [count]
  float* weights;       // [count]
  int32_t* places;      // [tokens][chosen]: pairs of each token, in the order of the experts
  int32_t* num_places;  // [tokens]
  uint8_t* x;           // [count][size], of the op's type
  uint8_t* hidden;      // [count][hidden], of the op's type
  float* out;           // [count][size]
  float* sums;          // [count][2 hidden], of matrices that lie transposed; else null
};

// Return the end of an array of `bytes` bytes at `memory`, on a 64-byte boundary.
inline uint8_t* after(uint8_t* memory, int64_t bytes) { return memory + (bytes + 63) / 64 * 64; }

// Sort the pairs of a call by expert. Memory: team.workspace.
inline SortedPairs sort_pairs(const Experts& op, Team& team) {
  const int64_t most = op.tokens * op.chosen, item = size_of(op.type);
  const int64_t small = 4 * (op.experts + 1 + 3 * most + op.tokens) + 6 * 64;
  const int64_t sums = op.up ? 0 : most * op.hidden * 8;
  const int64_t large = most * (op.size * (item + 4) + op.hidden * item) + sums + 4 * 64;
  auto* memory = static_cast<uint8_t*>(team.workspace(small + large));
  SortedPairs pairs;
  const auto take = [&](int64_t bytes) {
    uint8_t* held = memory;
    memory = after(memory, bytes);
    return held;
  };
  pairs.starts = reinterpret_cast<int32_t*>(take(4 * (op.experts + 1)));
  pairs.tokens = reinterpret_cast<int32_t*>(take(4 * most));
  pairs.weights = reinterpret_cast<float*>(take(4 * most));
  pairs.places = reinterpret_cast<int32_t*>(take(4 * most));
  pairs.num_places = reinterpret_cast<int32_t*>(take(4 * op.tokens));
  pairs.x = take(most * op.size * item);
  pairs.hidden = take(most * op.hidden * item);
  pairs.out = reinterpret_cast<float*>(take(most * op.size * 4));
  pairs.sums = op.up ? nullptr : reinterpret_cast<float*>(take(sums));

  std::memset(pairs.starts, 0, 4 * (op.experts + 1));
  std::memset(pairs.num_places, 0, 4 * op.tokens);
  const auto is_here = [&](int32_t expert) { return expert >= 0 && expert < op.experts; };
  for (int64_t i = 0; i < most; ++i)
    if (is_here(op.choice[i])) ++pairs.starts[op.choice[i] + 1];
  for (int64_t e = 0; e < op.experts; ++e) pairs.starts[e + 1] += pairs.starts[e];
  pairs.count = pairs.starts[op.experts];
  // Each start moves to the end of its expert, which is the start of the next one.
  for (int64_t i = 0; i < most; ++i) {
    if (!is_here(op.choice[i])) continue;
    const int32_t place = pairs.starts[op.choice[i]]++;
    pairs.tokens[place] = static_cast<int32_t>(i / op.chosen);
    pairs.weights[place] = op.weights[i];
  }
  for (int64_t e = op.experts; e > 0; --e) pairs.starts[e] = pairs.starts[e - 1];
  pairs.starts[0] = 0;
  for (int32_t place = 0; place < pairs.count; ++place) {
    const int32_t token = pairs.tokens[place];
    pairs.places[token * op.chosen + pairs.num_places[token]++] = place;
  }
  return pairs;
}

// Arguments of the items that copy and add rows.
struct ExpertRows {
  const Experts& op;
  const SortedPairs& pairs;
};

// Copy the row of x of one pair to its place.
inline void gather_row(const void* context, int64_t place, void*) {
  const auto& [op, pairs] = *static_cast<const ExpertRows*>(context);
  const int64_t bytes = op.size * size_of(op.type);
  std::memcpy(pairs.x + place * bytes,
              static_cast<const uint8_t*>(op.x) + pairs.tokens[place] * bytes, bytes);
}

// Compute the hidden numbers of one pair from the sums of gate and up.
inline void activate_row(const void* context, int64_t place, void*) {
  const auto& [op, pairs] = *static_cast<const ExpertRows*>(context);
  const Clamp clamp{op.alpha, op.limit};
  const float* sums = pairs.sums + place * 2 * op.hidden;
  void* hidden = pairs.hidden + place * op.hidden * size_of(op.type);
  op.type == Type::kFloat ? clamped<Float>(clamp, sums, op.hidden, hidden)
                          : clamped<BFloat16>(clamp, sums, op.hidden, hidden);
}

// Add the results of the experts of one token, times their weights.
inline void add_rows(const void* context, int64_t token, void*) {
  const auto& [op, pairs] = *static_cast<const ExpertRows*>(context);
  float* out = op.out + token * op.size;
  const int32_t* places = pairs.places + token * op.chosen;
  for (int64_t i = 0; i < op.size; i += kLanes) {
    F sum = {};
    for (int64_t n = 0; n < pairs.num_places[token]; ++n) {
      const F row = load_part<F>(pairs.out + places[n] * op.size + i, op.size - i);
      sum = sum + row * pairs.weights[places[n]];
    }
    store_part(out + i, sum, op.size - i);
  }
}

// Multiply the pairs by matrices with rows along `in`.
inline void multiply_experts(const Experts& op, const SortedPairs& pairs, Team& team) {
  const auto multiply = op.bits ? quantized_linear : linear;
  const int64_t item = size_of(op.type);
  Linear into{}, out{};
  into.type = out.type = into.out_type = op.type;
  out.out_type = Type::kFloat;
  into.in = out.out_size = op.size;
  into.out_size = out.in = op.hidden;
  into.bits = out.bits = op.bits;
  into.group = out.group = op.group;
  // Call `multiply` for several experts at once, so that threads wait for each other rarely.
  Linear together[kExpertsAtOnce];
  int64_t held = 0, tokens = 0;
  const auto flush = [&] {
    if (held) multiply(together, held, team);
    held = tokens = 0;
  };
  const auto add = [&](const Linear& each) {
    together[held++] = each;
    tokens += each.tokens;
    if (held == kExpertsAtOnce || tokens >= kTokensAtOnce) flush();
  };
  for (int64_t e = 0; e < op.experts; ++e) {
    const int64_t first = pairs.starts[e];
    into.tokens = pairs.starts[e + 1] - first;
    if (into.tokens == 0) continue;
    // A single token has the same x for all of its experts.
    into.x = op.tokens == 1 ? op.x : pairs.x + first * op.size * item;
    into.weight = op.gate[e];
    into.up = op.up[e];
    into.scale = op.bits ? op.gate_scale[e] : nullptr;
    into.up_scale = op.bits ? op.up_scale[e] : nullptr;
    into.out = pairs.hidden + first * op.hidden * item;
    add(into);
  }
  flush();
  for (int64_t e = 0; e < op.experts; ++e) {
    const int64_t first = pairs.starts[e];
    out.tokens = pairs.starts[e + 1] - first;
    if (out.tokens == 0) continue;
    out.x = pairs.hidden + first * op.hidden * item;
    out.weight = op.down[e];
    out.scale = op.bits ? op.down_scale[e] : nullptr;
    out.out = pairs.out + first * op.size;
    add(out);
  }
  flush();
}

// Multiply the pairs by matrices that lie transposed.
inline void multiply_transposed(const Experts& op, const SortedPairs& pairs, Team& team) {
  const int64_t item = size_of(op.type);
  Transposed together[kExpertsAtOnce];
  int64_t held = 0;
  const auto all_experts = [&](auto add) {
    for (int64_t e = 0; e < op.experts; ++e) {
      const int64_t first = pairs.starts[e], tokens = pairs.starts[e + 1] - first;
      if (tokens) together[held++] = add(e, first, tokens);
      if (held < kExpertsAtOnce && e + 1 < op.experts) continue;
      transposed_linear(op.type, together, held, team);
      held = 0;
    }
  };
  all_experts([&](int64_t e, int64_t first, int64_t tokens) {
    const void* x = pairs.x + first * op.size * item;
    float* out = pairs.sums + first * 2 * op.hidden;
    return Transposed{tokens, op.size, 2 * op.hidden, x, op.gate[e], op.gate_bias[e], 1.0f, out};
  });
  const ExpertRows rows{op, pairs};
  team.run(pairs.count, 8, 0, activate_row, &rows);
  all_experts([&](int64_t e, int64_t first, int64_t tokens) {
    const void* x = pairs.hidden + first * op.hidden * item;
    float* out = pairs.out + first * op.size;
    return Transposed{tokens,     op.hidden,       op.size,       x,
                      op.down[e], op.down_bias[e], op.bias_scale, out};
  });
}

inline void experts(const Experts& op, Team& team) {
  if (op.tokens == 0) return;
  const SortedPairs pairs = sort_pairs(op, team);
  const ExpertRows rows{op, pairs};
  const bool is_single = op.tokens == 1;
  if (!is_single || !op.up) team.run(pairs.count, 64, 0, gather_row, &rows);
  op.up ? multiply_experts(op, pairs, team) : multiply_transposed(op, pairs, team);
  if (is_single)
    add_rows(&rows, 0, nullptr);
  else
    team.run(op.tokens, 8, 0, add_rows, &rows);
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
