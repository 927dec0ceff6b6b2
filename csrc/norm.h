// RMS norm of tokens, and rotary embedding of heads with an optional norm before it.
//
// Not here: cosines and sines of the angles (slipway/nn/rope.py).

#pragma once

#include "simd.h"

namespace slipway {
namespace SLIPWAY_ISA {

// Return 1 / sqrt(mean(x^2) + eps) of the `n` numbers from index `at` on (Zhang and Sennrich,
// 2019).
template <class T>
float normalizer(const void* x, int64_t at, int64_t n, float eps) {
  F squares = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const F v = T::read(x, at + i, n - i);
    squares = squares + v * v;
  }
  return 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + eps);
}

// Normalize one token.
template <class T>
void norm_row(const Norm& op, int64_t token) {
  const int64_t at = token * op.size;
  const float factor = normalizer<T>(op.x, at, op.size, op.eps);
  for (int64_t i = 0; i < op.size; i += kLanes) {
    const int64_t n = op.size - i;
    T::write(op.out, at + i, T::round(T::read(op.x, at + i, n) * factor) * T::read(op.weight, i, n),
             n);
  }
}

// Rotate one head: normalize it if there is a weight, then turn each pair (i, i + rotated / 2) by
// angle i of the token. Dimensions from `rotated` on are not turned.
template <class T>
void rotate_row(const Rotate& op, int64_t token, int64_t head) {
  const int64_t half = op.rotated / 2;
  const int64_t at = (token * op.heads + head) * op.head_dim, angle = token * half;
  const float factor = op.weight ? normalizer<T>(op.x, at, op.head_dim, op.eps) : 1.0f;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    F a = T::read(op.x, at + i, n), b = T::read(op.x, at + half + i, n);
    if (op.weight) {
      a = T::round(T::round(a * factor) * T::read(op.weight, i, n));
      b = T::round(T::round(b * factor) * T::read(op.weight, half + i, n));
    }
    const F cos = Float::read(op.cos, angle + i, n), sin = Float::read(op.sin, angle + i, n);
    T::write(op.out, at + i, a * cos - b * sin, n);
    T::write(op.out, at + half + i, b * cos + a * sin, n);
  }
  for (int64_t i = op.rotated; i < op.head_dim; i += kLanes) {
    const int64_t n = op.head_dim - i;
    const F a = T::read(op.x, at + i, n);
    const F normed = op.weight ? T::round(a * factor) * T::read(op.weight, i, n) : a;
    T::write(op.out, at + i, normed, n);
  }
}

template <class T>
void norm_of(const Norm& op, Team& team) {
  team.run(
      op.tokens, 16, 0,
      [](const void* context, int64_t t, void*) {
        norm_row<T>(*static_cast<const Norm*>(context), t);
      },
      &op);
}

template <class T>
void rotate_of(const Rotate& op, Team& team) {
  team.run(
      op.tokens, 16, 0,
      [](const void* context, int64_t t, void*) {
        const Rotate& op = *static_cast<const Rotate*>(context);
        for (int64_t head = 0; head < op.heads; ++head) rotate_row<T>(op, t, head);
      },
      &op);
}

inline void norm(const Norm& op, Team& team) {
  op.type == Type::kFloat ? norm_of<Float>(op, team) : norm_of<BFloat16>(op, team);
}
inline void rotate(const Rotate& op, Team& team) {
  op.type == Type::kFloat ? rotate_of<Float>(op, team) : rotate_of<BFloat16>(op, team);
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
