// Matrix multiplication of weights by bfloat16 tokens, in tiles of AMX.
//
// Not here: tile registers (amx.h), unpacking of weights (tile_rows.h), the same op in vectors
// (linear.h, quantized.h).
//
// Weights are the first operand of a product: 16 outputs by a step of 32 numbers along `in`. Tokens
// are the second operand, in columns of 16, and are brought into its order once a call. The column
// of a single token has only one token. A panel is two tiles of outputs, and passes two columns at
// a time.
//
// Few columns: each panel is read in place, or unpacked while it is read. Many columns: a band of
// neighbouring panels is cut along `in` into slices. A slice of a panel is laid out as tiles in the
// first-level cache, and all columns pass it. Their sums stay in the second-level cache until the
// last slice of the band.
//
// A sum is added in order along `in`, for any number of tokens. If a row has several scales, each
// group is summed separately.

#pragma once

#include "amx.h"
#include "linear.h"
#include "tile_rows.h"

#if defined(__AMX_BF16__)

namespace slipway {
namespace SLIPWAY_ISA {

constexpr int64_t kSlice = 8;       // steps of a slice: 16 kB of a panel
constexpr int64_t kBandPanels = 8;  // panels of a band
// Columns that pass at once: 256 kB of tokens of a slice, 512 kB of sums of a band.
constexpr int64_t kColumns = 32;
// Steps of the next panel that are prefetched before the sums of few columns are written.
constexpr int64_t kPrefetchedSteps = 2;
constexpr int64_t kChunk = 4;  // steps of a row that are unpacked together
// Groups that are summed before their sums are scaled. Measured with 512 tokens of int4: 390-412
// ms, 435 with 1 group, 487 with 8.
constexpr int64_t kHeldGroups = 4;
constexpr int64_t kSums = 2 * kTile;                // sums of a panel and a column
constexpr int64_t kTiles = kWidth * kLine;          // bytes of the two tiles of a step of a panel
constexpr int64_t kHeld = kHeldGroups * 2 * kSums;  // sums of kHeldGroups groups and two columns

// Arguments of one call for all of its items.
struct Tiled {
  Batch batch;
  const Linear& op;        // the first matrix; `x`, `tokens` and `in` are those of all matrices
  int64_t steps, columns;  // steps of a row; columns of tokens
  int64_t width;           // tokens of a column: 16, or 1 for a single token
  int shift;               // 2^shift steps share a scale, if a row has several
  bool few;                // few columns: a slice is a whole panel, and a band is one panel
  uint32_t* x = nullptr;   // tokens: [column][step][16 units][width], padded with zeros

  int64_t slice() const { return few ? steps : kSlice; }
  int64_t together() const { return few ? 1 : kBandPanels; }  // panels of a band
  int64_t bands() const { return (batch.panels() + together() - 1) / together(); }
  int64_t scales() const { return (slice() >> shift) * kWidth; }
  int64_t sums() const { return together() * least(columns, kColumns) * kSums; }
};

// Scratch memory of a thread.
struct Scratch {
  uint8_t* tiles;  // tiles of one slice of a panel, or of two chunks
  float* held;     // sums of groups that are not yet scaled: [group][column][tile][16][width]
  float* scales;   // [group][row]
  float* sums;     // [panel][column][tile][16][width]

  Scratch(const Tiled& call, void* memory) : tiles(static_cast<uint8_t*>(memory)) {
    held = reinterpret_cast<float*>(tiles + kSlice * kTiles);
    scales = held + kHeld;
    sums = scales + call.scales();
  }
  static int64_t bytes(const Tiled& call) {
    return kSlice * kTiles + 4 * (kHeld + call.scales() + call.sums());
  }
};

// Write one column of tokens to call.x in the order of a second operand.
template <class From>
void tile_column(const Tiled& call, int64_t column) {
  const int64_t row_bytes = 2 * call.op.in, first = column * kSide;
  const int64_t count = least(kSide, call.op.tokens - first);
  const auto* row = static_cast<const uint8_t*>(call.op.x) + first * row_bytes;
  uint32_t* out = call.x + column * call.steps * kTile;
  for (int64_t t = 0; t < call.steps; ++t, out += kSide * call.width) {
    U x[kSide] = {};
    for (int64_t i = 0; i < count; ++i)
      x[i] = From::arranged(load_step(row + i * row_bytes, t, row_bytes));
    if (call.width == 1) {
      store(out, x[0]);
      continue;
    }
    transpose(x);
    for (int i = 0; i < kSide; ++i) store(out + i * kSide, x[i]);
  }
}

// Neighbouring panels, of one matrix or of several.
struct Band {
  int64_t count = 0;
  struct Member {
    const Linear* op;
    int64_t out;  // first output of the panel
    int64_t row_bytes;
    bool whole;             // all rows of the panel exist
    Panel weights, scales;  // scales: only if a row has several
  } members[kBandPanels];
};

// Fill in band `number` of the call.
template <class From, bool kGrouped>
void find_band(const Tiled& call, int64_t number, Band& band) {
  const int64_t first = number * call.together(), outs = call.batch.outs;
  band.count = least(call.together(), call.batch.panels() - first);
  for (int64_t i = 0; i < band.count; ++i) {
    int64_t panel = first + i;
    const Linear& op = call.batch.ops[call.batch.find(panel)];
    Band::Member& member = band.members[i];
    member.op = &op;
    member.out = panel * outs;
    member.row_bytes = op.in * From::kBits / 8;
    member.whole = (panel + 1) * outs <= op.out_size;
    member.weights = panel_at(op, op.weight, op.up, member.out, outs, member.row_bytes);
    if (kGrouped)
      member.scales = panel_at(op, op.scale, op.up_scale, member.out, outs, op.in / op.group * 2);
  }
}

// Prefetch of weights, a little with each step of a pass.
struct Fetch {
  const Band& band;
  int64_t ahead;                          // 0: lines of this band; 1: of the next one
  int64_t offset;                         // bytes from the start of a row to its first line
  int64_t lines;                          // lines of each row
  int64_t wait;                           // steps before the first line
  int64_t together;                       // lines for each step
  int64_t member = 0, row = 0, line = 0;  // next line

  ALWAYS void step() {
    if (--wait >= 0) return;
    for (int64_t i = 0; i < together && member < band.count; ++i) {
      const Panel& panel = band.members[member].weights;
      __builtin_prefetch(panel.rows[row] + ahead * band.count * panel.next + offset + line * kLine,
                         0, 2);
      if (++line < lines) continue;
      line = 0;
      if (++row == kWidth) {
        row = 0;
        ++member;
      }
    }
  }
};

// Product of `count` steps of a panel and of one or two columns.
struct Pass {
  const uint8_t *low, *high;  // first and last 16 rows of the panel
  int64_t apart;              // bytes between rows of a tile
  int64_t step;               // bytes between steps
  int64_t ring;               // mask of the number of a step: steps in memory less 1, or -1 for all
  int64_t count;              // steps
  const uint32_t* x;
  int64_t width, distance;  // tokens of a column; units between columns
  float* sums;              // [column][tile][16][width]
  bool fresh;               // write the sums instead of adding to them
  float* held;              // as in Scratch
  const float* scales;      // as in Scratch
  int shift;                // as in Tiled
};

// Multiply the sums of `count` groups (at most kHeldGroups) by the scales of their rows, and add
// them to the sums of earlier groups. first: number of the first group.
template <int kCols>
ALWAYS void add_groups(const Pass& p, int64_t first, int64_t count) {
  const float* scales = p.scales + first * kWidth;
  const bool fresh = p.fresh && first == 0;
  const auto add = [=](int64_t at, auto scale) {
    F sum = fresh ? F{} : load<F>(p.sums + at);
    for (int64_t g = 0; g < count; ++g)
      sum = _mm512_fmadd_ps(load<F>(p.held + g * 2 * kSums + at), scale(scales + g * kWidth), sum);
    store(p.sums + at, sum);
  };
  for (int64_t i = 0; i < 2 * kCols; ++i)
    if (p.width == 1)
      add(i * kTile, [i](const float* scales) { return load<F>(scales + i % 2 * kSide); });
    else
#pragma GCC unroll 4
      for (int64_t r = 0; r < kSide; ++r)
        add(i * kTile + r * kSide,
            [i, r](const float* scales) { return all(scales[i % 2 * kSide + r]); });
}

// Multiply. before(t) is called before step t.
template <bool kGrouped, int kCols, class Before>
void tile_pass(const Pass& pass, Before before) {
  const Pass p = pass;
  const int64_t row = 4 * p.width, last = (1 << p.shift) - 1;
  const uint32_t* x = p.x;
  each<2 * kCols>([&](auto i) {
    kGrouped || p.fresh ? tile_zero<i.value>() : tile_load<i.value>(p.sums + i.value * kTile, row);
  });
  for (int64_t t = 0; t < p.count; ++t, x += kSide * p.width) {
    before(t);
    const int64_t at = (t & p.ring) * p.step;
    tile_load<4>(p.low + at, p.apart);
    tile_load<6>(x, row);
    tile_dot<0, 4, 6>();
    tile_load<5>(p.high + at, p.apart);
    tile_dot<1, 5, 6>();
    if constexpr (kCols == 2) {
      tile_load<7>(x + p.distance, row);
      tile_dot<2, 4, 7>();
      tile_dot<3, 5, 7>();
    }
    if (!kGrouped || (t & last) != last) continue;
    const int64_t place = (t >> p.shift) % kHeldGroups;
    float* held = p.held + place * 2 * kSums;
    each<2 * kCols>([&](auto i) {
      tile_store<i.value>(held + i.value * kTile, row);
      tile_zero<i.value>();
    });
    if (place == kHeldGroups - 1) add_groups<kCols>(p, (t >> p.shift) - place, kHeldGroups);
  }
  if (!kGrouped)
    each<2 * kCols>([&](auto i) { tile_store<i.value>(p.sums + i.value * kTile, row); });
  else if (const int64_t left = (p.count >> p.shift) % kHeldGroups)
    add_groups<kCols>(p, (p.count >> p.shift) - left, left);
}

// Unpack up to kChunk steps from `first` on, of `rows` rows of a panel from `row` on, to rows of
// tiles. kFetching: prefetch the next steps of these rows, and the same steps of the next panel.
template <class From, bool kFetching>
ALWAYS void unpack(const Band::Member& member, int64_t row, int64_t rows, int64_t first,
                   int64_t count, uint8_t* out) {
  constexpr int64_t step = kLine * From::kBits / 16;
  const int64_t bytes = member.row_bytes, next = member.weights.next;
  const bool whole = count == kChunk && (first + count) * step <= bytes;
  for (int64_t i = row; i < row + rows; ++i) {
    const WeightRow held{member.weights.rows[i] + first * step, bytes - first * step};
    uint8_t* line = out + i * kLine;
    // Measured with int8 and one token: 32 ms with both prefetches, 36 with one of them.
    for (int64_t at = 0; kFetching && at < kChunk * step; at += kLine) {
      __builtin_prefetch(held.at + kChunk * step + at, 0, 3);
      __builtin_prefetch(held.at + next + at, 0, 2);
    }
    if (whole) {
#pragma GCC unroll 4
      for (int64_t t = 0; t < kChunk; ++t)
        store(line + t * kTiles, From::template step<true>(held, t));
    } else {
      for (int64_t t = 0; t < count; ++t)
        store(line + t * kTiles, From::template step<false>(held, t));
    }
  }
}

// Read the scales of the groups of `count` steps from `first` on: [group][row].
inline void read_scales(const Tiled& call, const Band::Member& member, int64_t first, int64_t count,
                        float* out) {
  const int64_t groups = call.steps >> call.shift;
  const int64_t from = first >> call.shift, to = (first + count) >> call.shift;
  for (int64_t g = from; g < to; g += kLanes)
    for (int half = 0; half < kWidth; half += kHalf) {
      U scales[kLanes];
      for (int i = 0; i < kHalf; ++i)
        scales[i] = as_units(BFloat16::read(member.scales.rows[half + i], g, groups - g));
      transpose(scales);
      for (int64_t i = 0; i < least(kLanes, to - g); ++i)
        store(out + (g - from + i) * kWidth + half, scales[i]);
    }
}

// Complete the outputs of one column and panel from its sums. kScaled: a row has one scale.
template <bool kScaled>
void finish_column(const Tiled& call, const Band::Member& member, int64_t column,
                   const float* sums) {
  const Linear op = *member.op;  // a copy, which the writes below cannot change
  const int64_t token = column * kSide, tokens = least(kSide, op.tokens - token);
  const int64_t vectors = call.width == 1 ? 1 : kSide;
  float rows[kSide][kWidth];
  for (int half = 0; half < 2; ++half) {
    U tile[kSide];
    for (int64_t i = 0; i < vectors; ++i) tile[i] = load<U>(sums + half * kTile + i * kSide);
    if (vectors > 1) transpose(tile);
    F scale = all(1.0f);
    const int64_t out = member.out + (op.up ? 0 : half * kSide);
    if (kScaled && out < op.out_size)
      scale = BFloat16::read(op.up && half ? op.up_scale : op.scale, out, op.out_size - out);
    for (int64_t i = 0; i < tokens; ++i)
      store(rows[i] + half * kSide, kScaled ? as_units(as_floats(tile[i]) * scale) : tile[i]);
  }
  for (int64_t i = 0; i < tokens; ++i) finish<BFloat16>(op, member.out, rows[i], token + i);
}

// Multiply `count` steps of a panel, from step `first` on, by the columns from `begin` on.
//
// Many columns: the steps are laid out as tiles first. Few columns: the panel is read in place,
// or the next chunk is unpacked into a ring, a part of it with each step.
template <class From, bool kGrouped>
void multiply_member(const Tiled& call, const Band::Member& member, int64_t begin, int64_t first,
                     int64_t count, const Scratch& scratch, float* sums, Fetch& fetch) {
  const int64_t columns = least(kColumns, call.columns - begin);
  const int64_t distance = call.steps * kSide * call.width;
  const uint32_t* x = call.x + begin * distance + first * kSide * call.width;
  Pass p{
      /*low=*/scratch.tiles,
      /*high=*/scratch.tiles + kTiles / 2,
      /*apart=*/kLine,
      /*step=*/kTiles,
      /*ring=*/-1,
      count,
      x,
      call.width,
      distance,
      sums,
      /*fresh=*/first == 0,
      scratch.held,
      scratch.scales,
      call.shift,
  };
  if (kGrouped) read_scales(call, member, first, count, scratch.scales);
  const auto pass = [&](auto before, auto begun) {
    for (int64_t c = 0; c < columns; c += 2, p.x += 2 * distance, p.sums += 2 * kSums) {
      begun();
      c + 1 < columns ? tile_pass<kGrouped, 2>(p, before) : tile_pass<kGrouped, 1>(p, before);
    }
  };
  const auto fetching = [&](int64_t) { fetch.step(); };
  if (!call.few) {
    for (int64_t t = 0; t < count; t += kChunk)
      unpack<From, false>(member, 0, kWidth, first + t, least(kChunk, count - t),
                          scratch.tiles + t * kTiles);
    pass(fetching, [] {});
  } else if (From::kBits == 16 && member.whole && member.row_bytes % kLine == 0) {
    p.low = member.weights.rows[0];
    p.high = member.weights.rows[kHalf];
    p.apart = member.row_bytes;
    p.step = kLine;
    pass(fetching, [] {});
  } else {
    constexpr int64_t ring = 2 * kChunk, part = kWidth / kChunk;
    const auto unpacked = [&](int64_t row, int64_t rows, int64_t t) {
      if (t < count)
        unpack<From, true>(member, row, rows, t, least(kChunk, count - t),
                           scratch.tiles + t % ring * kTiles);
    };
    p.ring = ring - 1;
    const auto part_of_next = [&](int64_t t) {
      unpacked(t % kChunk * part, part, t / kChunk * kChunk + kChunk);
    };
    pass(part_of_next, [&] { unpacked(0, kWidth, 0); });
  }
}

// Multiply a band by the columns from `begin` on, at most kColumns, and complete their outputs.
template <class From, bool kGrouped>
void multiply_band(const Tiled& call, const Band& band, int64_t begin, const Scratch& scratch) {
  constexpr bool kScaled = From::kBits < 16 && !kGrouped;
  const int64_t columns = least(kColumns, call.columns - begin), slice = call.slice();
  for (int64_t first = 0; first < call.steps; first += slice) {
    const int64_t count = least(slice, call.steps - first);
    const int64_t then = first + count == call.steps ? 0 : first + count;  // next slice
    const int64_t turns = (columns + 1) / 2 * band.count * count, step = kLine * From::kBits / 16;
    const int64_t fetched = least(call.few ? kPrefetchedSteps : slice, call.steps - then);
    const int64_t wait = call.few ? turns - fetched : 0;
    const int64_t lines = (fetched * step + kLine - 1) / kLine, all = lines * kWidth * band.count;
    // After the last slice, this thread probably takes the next band.
    const int64_t ahead = then == 0 && begin + columns == call.columns;
    Fetch fetch{band, ahead, then * step, lines, wait, (all + turns - wait - 1) / (turns - wait)};
    for (int64_t i = 0; i < band.count; ++i)
      multiply_member<From, kGrouped>(call, band.members[i], begin, first, count, scratch,
                                      scratch.sums + i * columns * kSums, fetch);
  }
  // All outputs of a token are written together: they lie side by side.
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t i = 0; i < band.count; ++i)
      finish_column<kScaled>(call, band.members[i], begin + c,
                             scratch.sums + (i * columns + c) * kSums);
}

// Multiply tokens by `matrices` matrices: arrange the tokens in columns, then compute all bands.
template <class From, bool kGrouped>
void tiled_linear_of(const Linear* ops, int64_t matrices, Team& team) {
  const Linear& op = ops[0];
  const int64_t steps = (op.in + 2 * kSide - 1) / (2 * kSide);
  const int64_t columns = (op.tokens + kSide - 1) / kSide;
  int shift = 0;
  while (2 * kSide << shift < op.group) ++shift;
  const Batch batch(ops, matrices, op.up ? kHalf : kWidth);
  Tiled call{
      batch, op, steps, columns, op.tokens == 1 ? 1 : kSide, shift, columns <= From::kFewColumns};
  call.x = static_cast<uint32_t*>(team.shared(4 * columns * steps * kSide * call.width));
  const auto one = [](const void* context, int64_t column, void*) {
    tile_column<From>(*static_cast<const Tiled*>(context), column);
  };
  if (columns == 1)
    one(&call, 0, nullptr);
  else
    team.run(columns, 4, 0, one, &call);
  team.run(
      call.bands(), kPanelsAtOnce, Scratch::bytes(call),
      [](const void* context, int64_t item, void* memory) {
        const Tiled& call = *static_cast<const Tiled*>(context);
        const Tiles registers(kSide, kSide, call.width);
        const Scratch scratch(call, memory);
        Band band;
        find_band<From, kGrouped>(call, item, band);
        for (int64_t begin = 0; begin < call.columns; begin += kColumns)
          multiply_band<From, kGrouped>(call, band, begin, scratch);
      },
      &call);
}

// Packed weights have to have one scale for a row, or groups of whole steps that fit in a slice.
inline void tiled_linear(const Linear* ops, int64_t matrices, Team& team) {
  const bool grouped = ops->group > 0;
  const auto of =
      ops->bits == 0 ? tiled_linear_of<From16Bits, false>
      : ops->bits == 8
          ? (grouped ? tiled_linear_of<From8Bits, true> : tiled_linear_of<From8Bits, false>)
          : (grouped ? tiled_linear_of<From4Bits, true> : tiled_linear_of<From4Bits, false>);
  of(ops, matrices, team);
}

}  // namespace SLIPWAY_ISA
}  // namespace slipway

#endif
