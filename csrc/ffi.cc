// XLA's foreign function interface: unpacks buffers of XLA and calls the kernels.
//
// Not here: checks of dtypes and shapes (slipway/ops/cpu.py), declarations of the kernels
// (kernels.h), threads (pool_team.cc).

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "pool_team.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using slipway::PoolTeam;
using slipway::Type;

// Work below which the caller runs all items: it ends before another thread has started. Bytes of
// weights or keys, or numbers of x.
constexpr int64_t kOneThreadBytes = 1 << 17, kOneThreadNumbers = 1 << 14;

Type type_of(ffi::DataType type) {
  return type == ffi::DataType::F32 ? Type::kFloat : Type::kBFloat16;
}

// Return how many of `rows` rows are not padding; the number is a value of the program.
int64_t live_rows(ffi::Buffer<ffi::S32> tokens, int64_t rows) {
  return std::min<int64_t>(tokens.typed_data()[0], rows);
}

// Return the data of one layer from one of `groups` groups of arrays. Each group has one array for
// each layer. The layer is a value of the program; an index outside is clamped, as XLA does.
const void* array_of_layer(const ffi::RemainingArgs& arrays, size_t groups, size_t group,
                           int32_t layer) {
  const int64_t layers = arrays.size() / groups, at = std::clamp<int64_t>(layer, 0, layers - 1);
  return arrays.get<ffi::AnyBuffer>(group * layers + at)->untyped_data();
}

// Call of slipway::Linear, with 1 to 4 matrices. `arrays` has these groups for each result:
// weights, scales if packed, biases if biased. A gated layer has one result, and the groups of
// `gate` are followed by those of `up`.
ffi::Error Linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> tokens,
                  ffi::Buffer<ffi::S32> layer, ffi::RemainingArgs arrays, ffi::RemainingRets outs,
                  bool gated, bool biased, int64_t bits, int64_t group) {
  constexpr size_t kMost = 4;
  if (outs.size() > kMost) return ffi::Error::InvalidArgument("linear: more than 4 results");
  const size_t each = 1 + (bits > 0) + biased, groups = (outs.size() + gated) * each;
  const int32_t at = layer.typed_data()[0];
  slipway::Linear ops[kMost] = {};
  int64_t bytes = 0;
  for (size_t i = 0; i < outs.size(); ++i) {
    slipway::Linear& op = ops[i];
    auto out = outs.get<ffi::AnyBuffer>(i).value();
    const size_t first = i * each;
    op.weight = array_of_layer(arrays, groups, first, at);
    if (bits) op.scale = array_of_layer(arrays, groups, first + 1, at);
    if (biased) op.bias = array_of_layer(arrays, groups, first + each - 1, at);
    if (gated) op.up = array_of_layer(arrays, groups, each, at);
    if (gated && bits) op.up_scale = array_of_layer(arrays, groups, each + 1, at);
    if (gated && biased) op.up_bias = array_of_layer(arrays, groups, 2 * each - 1, at);
    op.type = type_of(x.element_type());
    op.out_type = type_of(out->element_type());
    op.tokens = live_rows(tokens, x.dimensions()[0]);
    op.in = x.dimensions()[1];
    op.out_size = out->dimensions()[1];
    op.x = x.untyped_data();
    op.out = out->untyped_data();
    op.bits = static_cast<int32_t>(bits);
    op.group = group;
    bytes += op.in * op.out_size * (bits ? bits : 8 * size_of(op.type)) / 8;
  }
  PoolTeam team(pool, bytes < kOneThreadBytes);
  (bits ? slipway::kernels()->quantized_linear : slipway::kernels()->linear)(ops, outs.size(),
                                                                             team);
  return ffi::Error::Success();
}

// Each of the next functions fills in the parameters of one op and calls its kernel.

// Call of slipway::Route. `bias` has one array or none.
ffi::Error Route(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::S32> tokens,
                 ffi::RemainingArgs bias, ffi::Result<ffi::Buffer<ffi::S32>> choice,
                 ffi::Result<ffi::Buffer<ffi::F32>> weights, int64_t score, int64_t groups,
                 int64_t top_groups, bool two_of_group, bool normalize, float epsilon,
                 float scale) {
  slipway::Route op{};
  op.tokens = live_rows(tokens, logits.dimensions()[0]);
  op.experts = logits.dimensions()[1];
  op.chosen = choice->dimensions()[1];
  op.logits = logits.typed_data();
  if (bias.size() == 1)
    op.bias = static_cast<const float*>(bias.get<ffi::AnyBuffer>(0)->untyped_data());
  op.score = static_cast<slipway::Score>(score);
  op.groups = groups;
  op.top_groups = top_groups;
  op.two_of_group = two_of_group;
  op.normalize = normalize;
  op.epsilon = epsilon;
  op.scale = scale;
  op.choice = choice->typed_data();
  op.weights = weights->typed_data();
  PoolTeam team(pool, op.tokens * op.experts < kOneThreadNumbers);
  slipway::kernels()->route(op, team);
  return ffi::Error::Success();
}

// Call of slipway::Experts. `tables` has one table of addresses for each layer in each of these
// groups: gate, up and down, followed by their scales if they are packed; or, if they lie
// transposed, one matrix for gate and up, then down, and their biases.
ffi::Error Experts(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> tokens,
                   ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> choice,
                   ffi::Buffer<ffi::F32> weights, ffi::RemainingArgs tables,
                   ffi::Result<ffi::Buffer<ffi::F32>> out, int64_t hidden, int64_t bits,
                   int64_t group, bool transposed, float bias_scale, float alpha, float limit) {
  slipway::Experts op{};
  const size_t groups = transposed ? 4 : bits ? 6 : 3;
  const int32_t at = layer.typed_data()[0];
  const auto table = [&](size_t number) {
    return static_cast<const void* const*>(array_of_layer(tables, groups, number, at));
  };
  op.type = type_of(x.element_type());
  op.tokens = live_rows(tokens, x.dimensions()[0]);
  op.chosen = choice.dimensions()[1];
  op.experts = tables.get<ffi::AnyBuffer>(0)->dimensions()[0];
  op.size = x.dimensions()[1];
  op.hidden = hidden;
  op.x = x.untyped_data();
  op.choice = choice.typed_data();
  op.weights = weights.typed_data();
  op.gate = table(0);
  op.bits = static_cast<int32_t>(bits);
  op.group = group;
  if (transposed) {
    op.down = table(1);
    op.gate_bias = table(2);
    op.down_bias = table(3);
    op.bias_scale = bias_scale;
    op.alpha = alpha;
    op.limit = limit;
  } else {
    op.up = table(1);
    op.down = table(2);
  }
  if (bits) {
    op.gate_scale = table(3);
    op.up_scale = table(4);
    op.down_scale = table(5);
  }
  op.out = out->typed_data();
  const int64_t bytes = op.size * hidden * (bits ? bits : 8 * size_of(op.type)) / 8;
  PoolTeam team(pool, op.tokens * op.chosen * bytes < kOneThreadBytes);
  slipway::kernels()->experts(op, team);
  return ffi::Error::Success();
}

ffi::Error Embed(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> ids, ffi::Buffer<ffi::S32> tokens,
                 ffi::AnyBuffer table, ffi::RemainingArgs scale, ffi::Result<ffi::AnyBuffer> out) {
  slipway::Embed op{};
  op.type = type_of(out->element_type());
  op.tokens = live_rows(tokens, ids.element_count());
  op.rows = table.dimensions()[0];
  op.size = out->dimensions()[1];
  op.ids = ids.typed_data();
  op.table = table.untyped_data();
  op.out = out->untyped_data();
  if (scale.size()) op.scale = scale.get<ffi::AnyBuffer>(0)->untyped_data();
  PoolTeam team(pool, op.tokens * op.size < kOneThreadNumbers);
  slipway::kernels()->embed(op, team);
  return ffi::Error::Success();
}

ffi::Error Norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> tokens,
                ffi::Buffer<ffi::S32> layer, ffi::RemainingArgs weights,
                ffi::Result<ffi::AnyBuffer> out, float eps) {
  slipway::Norm op{};
  op.type = type_of(x.element_type());
  op.tokens = live_rows(tokens, x.dimensions()[0]);
  op.size = x.dimensions()[1];
  op.x = x.untyped_data();
  op.weight = array_of_layer(weights, 1, 0, layer.typed_data()[0]);
  op.eps = eps;
  op.out = out->untyped_data();
  PoolTeam team(pool, op.tokens * op.size < kOneThreadNumbers);
  slipway::kernels()->norm(op, team);
  return ffi::Error::Success();
}

ffi::Error Rotate(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> cos,
                  ffi::Buffer<ffi::F32> sin, ffi::Buffer<ffi::S32> tokens,
                  ffi::Buffer<ffi::S32> layer, ffi::RemainingArgs weights,
                  ffi::Result<ffi::AnyBuffer> out, float eps) {
  slipway::Rotate op{};
  op.type = type_of(x.element_type());
  op.tokens = live_rows(tokens, x.dimensions()[0]);
  op.heads = x.dimensions()[1];
  op.head_dim = x.dimensions()[2];
  op.rotated = 2 * cos.dimensions()[1];
  op.x = x.untyped_data();
  op.weight = weights.size() ? array_of_layer(weights, 1, 0, layer.typed_data()[0]) : nullptr;
  op.cos = cos.typed_data();
  op.sin = sin.typed_data();
  op.eps = eps;
  op.out = out->untyped_data();
  PoolTeam team(pool, op.tokens * op.heads * op.head_dim < kOneThreadNumbers);
  slipway::kernels()->rotate(op, team);
  return ffi::Error::Success();
}

ffi::Error Sample(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::S32> rows,
                  ffi::Buffer<ffi::F32> temperature, ffi::Buffer<ffi::S32> top_k,
                  ffi::Buffer<ffi::F32> top_p, ffi::Buffer<ffi::F32> min_p,
                  ffi::Buffer<ffi::F32> uniform, ffi::Result<ffi::Buffer<ffi::S32>> token) {
  slipway::Sample op{};
  op.rows = live_rows(rows, logits.dimensions()[0]);
  op.vocab = logits.dimensions()[1];
  op.logits = logits.typed_data();
  op.temperature = temperature.typed_data();
  op.top_k = top_k.typed_data();
  op.top_p = top_p.typed_data();
  op.min_p = min_p.typed_data();
  op.uniform = uniform.typed_data();
  op.token = token->typed_data();
  PoolTeam team(pool, op.rows * op.vocab < kOneThreadNumbers);
  slipway::kernels()->sample(op, team);
  return ffi::Error::Success();
}

ffi::Error LogNormalizer(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits,
                         ffi::Buffer<ffi::S32> rows, ffi::Result<ffi::Buffer<ffi::F32>> largest,
                         ffi::Result<ffi::Buffer<ffi::F32>> log_sum) {
  slipway::LogNormalizer op{};
  op.rows = live_rows(rows, logits.dimensions()[0]);
  op.vocab = logits.dimensions()[1];
  op.logits = logits.typed_data();
  op.largest = largest->typed_data();
  op.log_sum = log_sum->typed_data();
  PoolTeam team(pool, op.rows * op.vocab < kOneThreadNumbers);
  slipway::kernels()->log_normalizer(op, team);
  return ffi::Error::Success();
}

// Fill an array with zeros that take no memory: its whole pages are given back to the system, which
// provides empty pages at the first access.
ffi::Error Zeros(ffi::Result<ffi::AnyBuffer> out) {
  char *data = static_cast<char*>(out->untyped_data()), *end = data + out->size_bytes();
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  char* first =
      reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(data) + page - 1) / page * page);
  char* last = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(end) / page * page);
  if (first < last) {
    *first = 1;  // to test whether pages of this memory come back empty
    if (madvise(first, last - first, MADV_DONTNEED) || *first) first = last = end;
  } else {
    first = last = end;
  }
  std::memset(data, 0, first - data);
  std::memset(last, 0, end - last);
  return ffi::Error::Success();
}

// Return the cache of one layer, of `kv` with shape [L, P, K, 2, S, H] (docs/dimensions.md).
slipway::Cache cache_of(ffi::AnyBuffer kv, void* data, int32_t layer) {
  const auto d = kv.dimensions();
  const int64_t layer_bytes =
      d[1] * d[2] * d[3] * d[4] * d[5] * static_cast<int64_t>(ffi::ByteWidth(kv.element_type()));
  const Type type = kv.element_type() == ffi::DataType::F32 ? Type::kFloat : Type::kBFloat16;
  return {type, d[1], d[2], d[4], d[5], static_cast<char*>(data) + layer * layer_bytes};
}

ffi::Error WriteKv(ffi::ThreadPool pool, ffi::AnyBuffer kv, ffi::Buffer<ffi::S32> layer,
                   ffi::AnyBuffer keys, ffi::AnyBuffer values, ffi::Buffer<ffi::S32> tokens,
                   ffi::Buffer<ffi::S32> slots, ffi::Result<ffi::AnyBuffer> out) {
  if (out->untyped_data() != kv.untyped_data())
    return ffi::Error::Internal("write_kv: the cache was copied, not updated in place");
  slipway::WriteKv op{};
  op.cache = cache_of(kv, out->untyped_data(), layer.typed_data()[0]);
  op.ragged.tokens = live_rows(tokens, slots.element_count());
  op.ragged.slots = slots.typed_data();
  op.keys = keys.untyped_data();
  op.values = values.untyped_data();
  PoolTeam team(pool, op.ragged.tokens * static_cast<int64_t>(keys.size_bytes()) < kOneThreadBytes);
  slipway::kernels()->write_kv(op, team);
  return ffi::Error::Success();
}

ffi::Error Attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer kv,
                     ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> positions,
                     ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> counts,
                     ffi::Buffer<ffi::S32> page_table, ffi::RemainingArgs sinks,
                     ffi::Result<ffi::AnyBuffer> out, float scale, int64_t window, float soft_cap) {
  slipway::Attention op{};
  op.cache = cache_of(kv, kv.untyped_data(), layer.typed_data()[0]);
  op.ragged.rows = counts.element_count();
  op.ragged.table_width = page_table.dimensions()[1];
  op.ragged.positions = positions.typed_data();
  op.ragged.starts = starts.typed_data();
  op.ragged.counts = counts.typed_data();
  op.ragged.page_table = page_table.typed_data();
  op.heads = q.dimensions()[1];
  op.scale = scale;
  op.soft_cap = soft_cap;
  op.window = window;
  if (sinks.size() == 1) {
    auto held = sinks.get<ffi::Buffer<ffi::F32>>(0);
    if (held.has_error()) return held.error();
    op.sinks = held->typed_data();
  }
  op.q = q.untyped_data();
  op.out = out->untyped_data();
  int64_t keys = 0;
  for (int64_t row = 0; row < op.ragged.rows; ++row)
    if (op.ragged.counts[row] > 0)
      keys += op.ragged.counts[row] *
              (1 + op.ragged.positions[op.ragged.starts[row] + op.ragged.counts[row] - 1]);
  PoolTeam team(pool, keys * op.heads * op.cache.head_dim < kOneThreadBytes);
  slipway::kernels()->attention(op, team);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_linear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("gated")
                                  .Attr<bool>("biased")
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_route, Route,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("score")
                                  .Attr<int64_t>("groups")
                                  .Attr<int64_t>("top_groups")
                                  .Attr<bool>("two_of_group")
                                  .Attr<bool>("normalize")
                                  .Attr<float>("epsilon")
                                  .Attr<float>("scale"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_experts, Experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("hidden")
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("transposed")
                                  .Attr<float>("bias_scale")
                                  .Attr<float>("alpha")
                                  .Attr<float>("limit"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_embed, Embed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_norm, Norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_rotate, Rotate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_sample, Sample,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_log_normalizer, LogNormalizer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_zeros, Zeros, ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_write_kv, WriteKv,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(slipway_attention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("soft_cap"));
