// bf16 weights (out, in) times tokens in tiles of AMX: decides slices, what stays in which cache, and what is fetched.
//
// Weights are the first operand: 16 outputs, of each 32 numbers along `in`, a step. Tokens are the second, in columns of 16,
// put into its order once a call. A panel is two tiles of outputs; two columns pass it at a time. Few tokens read it where it
// is mapped. For many a slice of `in` of each panel is packed into the first cache and all columns pass; their sums wait in
// the second until the group's panels have seen the last slice. A sum runs along `in` in order, however many tokens there are.

#pragma once

#include "amx.h"
#include "linear.h"

#if defined(__AMX_BF16__)

namespace slipway {
namespace SLIPWAY_ISA {

constexpr int64_t kFewColumns = 12;   // 128 tokens: 74 ms for all matrices of a 0.6B shape, packed 92; 224: 124 and 116
constexpr int64_t kSlice = 8;         // steps: 16 kB of a panel
constexpr int64_t kGroupPanels = 8;   // that meet a slice's tokens
constexpr int64_t kColumns = 32;      // at once: 256 kB of a slice, 512 kB for the sums of a group
constexpr int64_t kBegin = 2;         // steps of the next panel that are fetched before sums of few columns are written
constexpr int64_t kSums = 2 * kTile;  // of a panel and a column

struct Tiled {
  Batch batch;
  const Linear& op;
  uint32_t* x;             // [column][step][unit][token], zeros past the last token and unit
  int64_t steps, columns;  // of 16 units; of 16 tokens
  int64_t slice, together;  // steps of a slice; panels of a group
  bool few() const { return columns <= kFewColumns; }
  int64_t row_bytes() const { return op.in * 2; }
  int64_t groups() const { return (batch.panels() + together - 1) / together; }
};

inline void tile_column(const Tiled& call, int64_t column) {
  const int64_t row_bytes = call.row_bytes(), first = column * kSide, count = least(kSide, call.op.tokens - first);
  const auto* row = static_cast<const uint8_t*>(call.op.x) + first * row_bytes;
  uint32_t* out = call.x + column * call.steps * kTile;
  for (int64_t t = 0; t < call.steps; ++t, out += kTile) {
    U x[kSide] = {};
    for (int64_t i = 0; i < count; ++i) x[i] = load_step(row + i * row_bytes, t, row_bytes);
    transpose(x);
    for (int i = 0; i < kSide; ++i) store(out + i * kSide, x[i]);
  }
}

// Neighbouring panels, of one matrix or of two.
struct Group {
  int64_t count = 0;
  struct Member {
    const Linear* op;
    int64_t out;  // its first
    bool whole;   // no row lies past the last
  } members[kGroupPanels];
  Panel panels[kGroupPanels];
};

inline void find_group(const Tiled& call, int64_t number, Group& group) {
  const int64_t first = number * call.together, outs = call.batch.outs;
  group.count = least(call.together, call.batch.panels() - first);
  for (int64_t i = 0; i < group.count; ++i) {
    int64_t panel = first + i;
    const Linear& op = call.batch.at(panel);
    group.members[i] = {&op, panel * outs, (panel + 1) * outs <= op.out_size};
    group.panels[i] = panel_at(op, panel * outs, outs, call.row_bytes());
  }
}

// Lines that are wanted soon: `lines` of each row of a group, from `offset` bytes on, `together` with each step after `wait`.
struct Fetch {
  const Group& group;
  int64_t offset, lines, wait, together, panel = 0, row = 0, line = 0;

  ALWAYS void step() {
    if (--wait >= 0) return;
    for (int64_t i = 0; i < together && panel < group.count; ++i) {
      __builtin_prefetch(group.panels[panel].rows[row] + offset + line * kLine, 0, 2);
      if (++line < lines) continue;
      line = 0;
      if (++row == kWidth) row = 0, ++panel;
    }
  }
};

// Where tiles of weights lie: those of step t at low + t * step and high + t * step.
struct Weights {
  const uint8_t *low, *high;
  int64_t apart, step;  // bytes between rows, and steps
};

// `count` steps of weights times one or two columns, `distance` units apart, onto `sums`, [column][tile][16][16], or `fresh`
// ones.
template <int kCols>
void tile_pass(const Weights& w, int64_t count, const uint32_t* x, int64_t distance, float* sums, bool fresh, Fetch& fetch) {
  each<2 * kCols>([&](auto i) { fresh ? tile_zero<i.value>() : tile_load<i.value>(sums + i.value * kTile, kLine); });
  const uint8_t *low = w.low, *high = w.high;
  for (int64_t t = 0; t < count; ++t, x += kTile, low += w.step, high += w.step) {
    tile_load<4>(low, w.apart), tile_load<6>(x, kLine), tile_dot<0, 4, 6>();
    tile_load<5>(high, w.apart), tile_dot<1, 5, 6>();
    if constexpr (kCols == 2) tile_load<7>(x + distance, kLine), tile_dot<2, 4, 7>(), tile_dot<3, 5, 7>();
    fetch.step();
  }
  each<2 * kCols>([&](auto i) { tile_store<i.value>(sums + i.value * kTile, kLine); });
}

// Steps of a panel as the tiles that they are; zeros past the end of a row.
inline void pack(const Panel& panel, int64_t row_bytes, int64_t first, int64_t count, uint8_t* out) {
  for (int64_t t = first; t < first + count; ++t, out += kWidth * kLine)
    for (int i = 0; i < kWidth; ++i) store(out + i * kLine, load_step(panel.rows[i], t, row_bytes));
}

// A column's sums of a panel, to where they belong.
inline void finish_column(const Group::Member& member, int64_t column, const float* sums) {
  float rows[kSide][kWidth];
  for (int half = 0; half < 2; ++half) {
    U tile[kSide];
    for (int i = 0; i < kSide; ++i) tile[i] = load<U>(sums + half * kTile + i * kSide);
    transpose(tile);
    for (int i = 0; i < kSide; ++i) store(rows[i] + half * kSide, tile[i]);
  }
  const Linear op = *member.op;  // a copy: nothing that is written can change it
  const int64_t token = column * kSide;
  for (int64_t i = 0; i < least(kSide, op.tokens - token); ++i) finish<BFloat16>(op, member.out, rows[i], token + i);
}

// Steps of a group's member times the columns from `begin` on; the weights are packed unless they are read but once.
inline void member_of(const Tiled& call, const Group& group, int64_t i, int64_t begin, int64_t first, int64_t count,
                      float* sums, Fetch& fetch, uint8_t* packed) {
  const Panel& panel = group.panels[i];
  const int64_t row_bytes = call.row_bytes(), columns = least(kColumns, call.columns - begin);
  Weights w{packed, packed + kHalf * kLine, kLine, kWidth * kLine};
  if (!call.few() || !group.members[i].whole || row_bytes % kLine)
    pack(panel, row_bytes, first, count, packed);
  else
    w = {panel.rows[0] + first * kLine, panel.rows[kHalf] + first * kLine, row_bytes, kLine};
  for (int64_t c = 0; c < columns; c += 2) {
    const uint32_t* x = call.x + ((begin + c) * call.steps + first) * kTile;
    const auto pass = c + 1 < columns ? tile_pass<2> : tile_pass<1>;
    pass(w, count, x, call.steps * kTile, sums + c * kSums, first == 0, fetch);
  }
}

// A group times the columns from `begin` on, up to kColumns; `next` is what this thread probably multiplies then.
inline void group_of(const Tiled& call, const Group& group, const Group& next, int64_t begin, float* sums, uint8_t* packed) {
  const int64_t columns = least(kColumns, call.columns - begin);
  const bool few = call.few();
  for (int64_t first = 0; first < call.steps; first += call.slice) {
    const int64_t count = least(call.slice, call.steps - first), then = first + count == call.steps ? 0 : first + count;
    const int64_t turns = (columns + 1) / 2 * group.count * count, fetched = least(few ? kBegin : kSlice, call.steps - then);
    const int64_t wait = few ? turns - fetched : 0, lines = fetched * kWidth * call.together;
    Fetch fetch{then ? group : next, then * kLine, fetched, wait, (lines + turns - wait - 1) / (turns - wait)};
    for (int64_t i = 0; i < group.count; ++i)
      member_of(call, group, i, begin, first, count, sums + i * columns * kSums, fetch, packed);
  }
  for (int64_t c = 0; c < columns; ++c)  // a token's outputs of all panels lie side by side
    for (int64_t i = 0; i < group.count; ++i) finish_column(group.members[i], begin + c, sums + (i * columns + c) * kSums);
}

inline void tiled_linear(const Linear* ops, int64_t matrices, Team& team) {
  const Linear& op = ops[0];
  const int64_t steps = (op.in + 2 * kSide - 1) / (2 * kSide), columns = (op.tokens + kSide - 1) / kSide;
  Tiled call{{ops, matrices, op.up ? kHalf : kWidth}, op, nullptr, steps, columns, kSlice, kGroupPanels};
  if (call.few()) call.slice = steps, call.together = 1;
  call.x = static_cast<uint32_t*>(team.shared(4 * columns * steps * kTile));
  const auto one = [](const void* context, int64_t column, void*) {
    tile_column(*static_cast<const Tiled*>(context), column);
  };
  if (columns == 1)
    one(&call, 0, nullptr);
  else
    team.run(columns, 4, 0, one, &call);
  const int64_t sums = call.together * least(columns, kColumns) * kSums;
  team.run(call.groups(), kTogether, 4 * sums + call.slice * kWidth * kLine,
           [](const void* context, int64_t item, void* memory) {
             const Tiled& call = *static_cast<const Tiled*>(context);
             const Tiles held(kSide, kSide);
             Group group, next;
             find_group(call, item, group);
             find_group(call, item + 1, next);
             auto* packed = static_cast<uint8_t*>(memory);
             auto* sums = reinterpret_cast<float*>(packed + call.slice * kWidth * kLine);
             for (int64_t begin = 0; begin < call.columns; begin += kColumns)
               group_of(call, group, begin + kColumns < call.columns ? group : next, begin, sums, packed);
           },
           &call);
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway

#endif
