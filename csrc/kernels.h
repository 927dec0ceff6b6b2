// What the kernels are asked: shapes, pointers and a team to share the work with. Knows no
// instruction set and no XLA.

#pragma once

#include <atomic>
#include <cstdint>

namespace slipway {

enum class Type : int32_t { kFloat, kBFloat16 };
constexpr int64_t size_of(Type type) { return type == Type::kFloat ? 4 : 2; }

// The threads that share one call. `run` calls body(context, item, scratch) for every item below
// `items`, in any order and on any thread, and returns when all are done; a thread takes up to
// `together` neighbours at once. scratch is at least `scratch_bytes` of the thread's own memory,
// 64-aligned.
class Team {
 public:
  virtual void* shared(int64_t bytes) = 0;  // one buffer for the whole call, 64-aligned; the
                                            // caller's scratch is another
  virtual void run(int64_t items, int64_t together, int64_t scratch_bytes,
                   void (*body)(const void*, int64_t, void*), const void* context) = 0;
  virtual ~Team() = default;
};

// out[t][o] = sum over k of x[t][k] * weight[o][k], + bias[o]; with `up`: silu(that) * (the same of
// `up`). Row-major.
struct Linear {
  Type type, out_type;           // of x, weights and biases; of out
  int64_t tokens, in, out_size;  // `tokens`: live rows, the only ones read and written
  const void *x, *weight, *bias, *up, *up_bias;  // biases and up may be null
  void* out;
  // Packed weights alone: their bits, 4 or 8, eight or four in a 32-bit word, the first lowest,
  // stored without a sign; the value is (stored - 2^(bits - 1)) * scale, and `group` of them along
  // `in`, a power of two, or all (0) share a scale.
  int32_t bits;
  int64_t group;
  const void *scale, *up_scale;  // [out][in / group], of x's type
};

// out[t] = table[ids[t]], zeros for an id outside. With `scale` [rows], of `type`, the table holds
// bytes as Linear's do.
struct Embed {
  Type type;
  int64_t tokens, rows, size;
  const int32_t* ids;
  const void *table, *scale;
  void* out;
};

// out[t] = x[t] / sqrt(mean(x[t]^2) + eps), rounded to its type, times weight[size].
struct Norm {
  Type type;
  int64_t tokens, size;
  const void *x, *weight;
  float eps;
  void* out;
};

// Each head of each token: with a weight [head_dim] normalized as above, then rotated by cos and
// sin [tokens][head_dim / 2].
struct Rotate {
  Type type;
  int64_t tokens, heads, head_dim;
  const void *x, *weight;
  const float *cos, *sin;
  float eps;
  void* out;
};

// A token of each row of logits [rows][vocab]. Temperature 0: the first of the largest; else a draw
// by `uniform` in [0, 1) from the tokens that min_p, then top_k (0: all), then top_p keep.
struct Sample {
  int64_t rows, vocab;
  const float *logits, *temperature;
  const int32_t* top_k;
  const float *top_p, *min_p, *uniform;
  int32_t* token;
};

// What turns a row of logits into log probabilities: its largest, and the natural logarithm of the
// sum over the row of exp(logit - largest). NaN anywhere in a row makes its log_sum NaN.
struct LogNormalizer {
  int64_t rows, vocab;
  const float* logits;
  float *largest, *log_sum;  // [rows]
};

// The cache of one layer, [pages][kv_heads][2][page_size * head_dim]. With u = 1 float or 2
// bfloat16 per unit, a key block is [head_dim / u][page_size] units, each of u neighbours in the
// head; a value block is [page_size / u][head_dim] units, each of u neighbours in the page: the
// order in which the matrix kernel reads its second operand.
struct Cache {
  Type type;
  int64_t pages, kv_heads, page_size, head_dim;
  void* data;
};

struct Ragged {
  int64_t tokens, rows, table_width;
  const int32_t *positions, *slots, *starts, *counts, *page_table;
};

struct WriteKv {
  Cache cache;
  Ragged ragged;
  const void *keys, *values;  // [tokens][kv_heads][head_dim]
};

struct Attention {
  Cache cache;
  Ragged ragged;
  int64_t heads;
  float scale, soft_cap;  // soft_cap: 0 for none
  int64_t window;         // 0 for none
  const float* sinks;     // null, or [heads]
  const void* q;          // [tokens][heads][head_dim]
  void* out;
};

struct Kernels {
  const char* name;
  // `count` matrices of one kind times the same x.
  void (*linear)(const Linear*, int64_t count, Team&);
  void (*quantized_linear)(const Linear*, int64_t count, Team&);
  void (*embed)(const Embed&, Team&);
  void (*norm)(const Norm&, Team&);
  void (*rotate)(const Rotate&, Team&);
  void (*write_kv)(const WriteKv&, Team&);
  void (*attention)(const Attention&, Team&);
  void (*sample)(const Sample&, Team&);
  void (*log_normalizer)(const LogNormalizer&, Team&);
};

extern std::atomic<int64_t> kernel_calls;  // so far: while it moves, populate.cc rests

// The best set that this processor runs, or the one that the environment variable SLIPWAY_ISA
// names; null if it runs none of that name. An empty variable counts as unset.
const Kernels* kernels();

}  // namespace slipway
