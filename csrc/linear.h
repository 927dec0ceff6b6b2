// Matrix multiplication of 16- and 32-bit weights by tokens, in vectors: the order of the work.
//
// Not here: the products of a panel (quartets.h, rows.h), bfloat16 tokens where the processor has
// AMX (tiled_linear.h), packed weights (quantized.h).
//
// Weights [out][in] stay as they are mapped from the file: rows of units along `in`, read in the
// order of memory. Each block of tokens passes a panel separately. The first block prefetches
// weights. The bits of a result do not depend on the other tokens of the batch.
//
// A kernel K has a type of numbers (`Number`), and takes tokens in bundles of `kTokens`: a block
// has at most `kMost` bundles, of `kWords` 32-bit words each in a step. A slice of a block has at
// most `kBlockBytes` bytes. `arrange` writes bundles in the order that `multiply` reads.
// `kFetchesTokens`: later blocks prefetch tokens.

#pragma once

#include "panels.h"
#include "quartets.h"
#include "rows.h"

namespace slipway {
namespace SLIPWAY_ISA {

// Blocks of bundles: at most K::kMost each, and of nearly equal size.
template <class K>
struct Blocks {
  int64_t bundles, count;  // bundles of all tokens; blocks

  explicit Blocks(int64_t tokens)
      : bundles((tokens + K::kTokens - 1) / K::kTokens),
        count((bundles + K::kMost - 1) / K::kMost) {}

  // Return the first bundle of a block.
  int64_t first(int64_t block) const { return block * bundles / count; }
};

// Arguments of one call for all of its items.
template <class K>
struct Call {
  Batch batch;
  int64_t steps;          // of kLanes units along `in`; the last one is padded with zeros
  const int64_t* firsts;  // first bundle of each matrix
  uint32_t* x;            // tokens in the order that the kernel reads

  int64_t row_bytes() const { return batch.ops->in * 4 / K::Number::kPerUnit; }

  // Arrange the tokens of one block of a matrix.
  void arrange(int64_t matrix, int64_t block) const {
    const Linear& op = batch.ops[matrix];
    const Blocks<K> blocks(op.tokens);
    const int64_t first = blocks.first(block), bundles = blocks.first(block + 1) - first;
    const TokenRows rows{static_cast<const uint8_t*>(op.x), op.tokens, row_bytes(), steps};
    K::arrange(rows, first, bundles, x + (firsts[matrix] + first) * steps * K::kWords);
  }
};

// Division of a panel into pieces of kPieceRows rows and `slice` steps. All rows of a slice come
// before the next slice.
struct Cut {
  int64_t slice, slices, pieces;
  int64_t fetched;  // distance of the prefetched piece

  // longest: steps of a slice that stay in the first-level cache.
  Cut(int64_t steps, int64_t longest) {
    slice = least(steps, longest);
    slices = (steps + slice - 1) / slice;
    pieces = slices * kGroups;
    fetched = (kPrefetchBytes + slice * kLine * kPieceRows - 1) / (slice * kLine * kPieceRows);
  }
};

// Scratch memory of a thread: floats of the parts of a block of tokens; bytes of parts and sums.
template <class K>
constexpr int64_t kPartsOf = K::kMost * kWidth * kLanes;
template <class K>
constexpr int64_t kScratchOf = 4 * (kPartsOf<K> + K::kTokens * K::kMost * kWidth);

// Multiply a panel by one block of tokens. first_bundle: of the panel's matrix.
template <class K>
void multiply_block(const Call<K>& call, int64_t first_bundle, const Panel& panel,
                    const Blocks<K>& blocks, int64_t block, float* parts, float* sums) {
  const Cut cut(call.steps, K::kBlockBytes / (4 * K::kWords * least(blocks.bundles, K::kMost)));
  const int64_t row_bytes = call.row_bytes();
  const int64_t bundles = blocks.first(block + 1) - blocks.first(block);
  for (int64_t i = 0; i < cut.pieces; ++i) {
    const int64_t group = i % kGroups, first = i / kGroups * cut.slice;
    const int64_t count = least(cut.slice, call.steps - first);
    const int64_t before = (first_bundle + blocks.first(block)) * call.steps + first * bundles;
    const uint32_t* x = call.x + before * K::kWords;
    Piece piece{panel.rows + group * kPieceRows, nullptr, 0, 0, first, count, row_bytes};
    if (block == 0) {
      // Prefetch weights: lines of whole rows in the order of memory, lines of slices in the order
      // in which they are read.
      const int64_t later = i + cut.fetched, at = later % cut.pieces / kGroups * cut.slice * kLine;
      piece.ahead =
          panel.rows[later % kGroups * kPieceRows] + at + (later < cut.pieces ? 0 : panel.next);
      piece.line = cut.slices == 1 ? kLine : row_bytes;
      piece.step = cut.slices == 1 ? kLine * kPieceRows : kLine;
    } else if (K::kFetchesTokens) {
      // Prefetch the tokens of the next slice, an equal share with each group of rows.
      piece.step = 4 * K::kWords * bundles / kGroups;
      piece.line = piece.step / kPieceRows;
      piece.ahead = reinterpret_cast<const uint8_t*>(x + count * bundles * K::kWords) +
                    group * piece.step * count;
    }
    const bool is_last = first + count == call.steps;
    K::multiply(bundles, piece, x,
                Sums{parts + group * K::kMost * kPieceRows * kLanes, first == 0,
                     is_last ? sums + group * kPieceRows : nullptr});
  }
}

// Compute the outputs of one panel for all tokens.
template <class K>
void multiply_panel(const Call<K>& call, int64_t item, float* scratch) {
  const int64_t matrix = call.batch.find(item);
  const Linear& op = call.batch.ops[matrix];
  const int64_t first = item * call.batch.outs;
  const Panel panel = panel_at(op, op.weight, op.up, first, call.batch.outs, call.row_bytes());
  const Blocks<K> blocks(op.tokens);
  float* sums = scratch + kPartsOf<K>;
  for (int64_t b = 0; b < blocks.count; ++b) {
    multiply_block(call, call.firsts[matrix], panel, blocks, b, scratch, sums);
    const int64_t begin = K::kTokens * blocks.first(b);
    for (int64_t t = begin; t < least(K::kTokens * blocks.first(b + 1), op.tokens); ++t)
      finish<typename K::Number>(op, first, sums + (t - begin) * kWidth, t);
  }
}

// Multiply by `matrices` matrices: arrange the tokens, then compute all panels.
template <class K>
void linear_of(const Linear* ops, int64_t matrices, Team& team) {
  const Linear& op = ops[0];
  const int64_t units = (op.in + K::Number::kPerUnit - 1) / K::Number::kPerUnit;
  const int64_t steps = (units + kLanes - 1) / kLanes;
  const auto bundles = [](const Linear& op) { return Blocks<K>(op.tokens).bundles; };
  int64_t all = 0;
  for (int64_t i = 0; i < matrices; ++i)
    if (!shares_tokens(ops, i)) all += bundles(ops[i]);
  const int64_t x_bytes = 4 * all * steps * K::kWords;
  auto* memory = static_cast<uint8_t*>(team.shared(x_bytes + 8 * matrices));
  const Batch batch(ops, matrices, op.up ? kHalf : kWidth);
  const Places places(batch, reinterpret_cast<int64_t*>(memory + x_bytes), bundles);
  const Call<K> call{batch, steps, places.firsts, reinterpret_cast<uint32_t*>(memory)};
  if (places.inputs == 1) {
    const auto one = [](const void* context, int64_t block, void*) {
      static_cast<const Call<K>*>(context)->arrange(0, block);
    };
    const int64_t blocks = Blocks<K>(op.tokens).count;
    if (blocks == 1)
      one(&call, 0, nullptr);
    else
      team.run(blocks, 1, 0, one, &call);
  } else {
    const auto one = [](const void* context, int64_t matrix, void*) {
      const Call<K>& call = *static_cast<const Call<K>*>(context);
      if (shares_tokens(call.batch.ops, matrix)) return;
      const int64_t blocks = Blocks<K>(call.batch.ops[matrix].tokens).count;
      for (int64_t block = 0; block < blocks; ++block) call.arrange(matrix, block);
    };
    team.run(matrices, kPanelsAtOnce, 0, one, &call);
  }
  team.run(
      call.batch.panels(), kPanelsAtOnce, kScratchOf<K>,
      [](const void* context, int64_t item, void* memory) {
        multiply_panel(*static_cast<const Call<K>*>(context), item, static_cast<float*>(memory));
      },
      &call);
}

#if defined(__AMX_BF16__)
void tiled_linear(const Linear* ops, int64_t matrices, Team& team);

// Call tiled_linear, which takes matrices with the same tokens only.
inline void tiled_by_tokens(const Linear* ops, int64_t matrices, Team& team) {
  for (int64_t first = 0, i = 1; i <= matrices; ++i)
    if (i == matrices || !shares_tokens(ops, i)) {
      tiled_linear(ops + first, i - first, team);
      first = i;
    }
}
#endif

inline void linear(const Linear* ops, int64_t count, Team& team) {
  if (ops->tokens == 0) return;
  if (ops->type == Type::kFloat) return linear_of<Singles<Float>>(ops, count, team);
#if defined(__AMX_BF16__)
  tiled_by_tokens(ops, count, team);
#elif defined(__AVX512BF16__)
  linear_of<Quartets<BFloat16>>(ops, count, team);
#else
  linear_of<Singles<BFloat16>>(ops, count, team);
#endif
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway
