// Lookup of rows of an embedding table.
//
// Not here: packing of a table into bytes (slipway/checkpoint/quantize.py).

#pragma once

#include "simd.h"

namespace slipway {
namespace SLIPWAY_ISA {

// Copy the row of one token, or convert its bytes and multiply them by the scale of the row.
template <class T>
void embed_row(const Embed& op, int64_t token) {
  const int64_t id = op.ids[token], row_bytes = op.size * size_of(op.type);
  char* out = static_cast<char*>(op.out) + token * row_bytes;
  if (id < 0 || id >= op.rows) {
    std::memset(out, 0, row_bytes);
  } else if (!op.scale) {
    std::memcpy(out, static_cast<const char*>(op.table) + id * row_bytes, row_bytes);
  } else {
    const uint8_t* row = static_cast<const uint8_t*>(op.table) + id * op.size;
    const F scale = all(T::read(op.scale, id, 1)[0]);
    for (int64_t i = 0; i < op.size; i += kLanes) {
      const F stored = __builtin_convertvector(load_part<Bytes>(row + i, op.size - i), F);
      T::write(out, i, (stored - 128.0f) * scale, op.size - i);
    }
  }
}

inline void embed(const Embed& op, Team& team) {
  team.run(
      op.tokens, 16, 0,
      [](const void* context, int64_t token, void*) {
        const Embed& op = *static_cast<const Embed*>(context);
        op.type == Type::kFloat ? embed_row<Float>(op, token) : embed_row<BFloat16>(op, token);
      },
      &op);
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
