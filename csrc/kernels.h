// Interface of the CPU kernels: parameters of each op, thread team, table of functions.
//
// Not here: bodies of the kernels (the header of each op), choice of an instruction set
// (dispatch.cc), conversion of XLA's buffers into these structs (ffi.cc), threads (pool_team.cc).
//
// All arrays are row-major. Names of dimensions: docs/dimensions.md.

#pragma once

#include <atomic>
#include <cstdint>

namespace slipway {

// Type of the numbers of an array.
enum class Type : int32_t { kFloat, kBFloat16 };

// Return the bytes of one number.
constexpr int64_t size_of(Type type) { return type == Type::kFloat ? 4 : 2; }

// Threads that share the work of one kernel call.
class Team {
 public:
  // Return a buffer of at least `bytes` bytes, 64-byte aligned, for all threads of the call. It
  // does not overlap with the scratch memory of the calling thread. The next call of `shared` may
  // return it again.
  virtual void* shared(int64_t bytes) = 0;

  // Return a second such buffer, for an op that calls kernels which use `shared`.
  virtual void* workspace(int64_t bytes) = 0;

  // Call body(context, item, scratch) for each item in [0, items), and return when all have ended.
  // Items run in any order and on any thread. A thread takes at most `together` neighbouring items
  // at once. `scratch` is memory of the thread, 64-byte aligned, of at least `scratch_bytes` bytes.
  virtual void run(int64_t items, int64_t together, int64_t scratch_bytes,
                   void (*body)(const void*, int64_t, void*), const void* context) = 0;

  virtual ~Team() = default;
};

// Linear layer: out[t][o] = sum over k of x[t][k] * weight[o][k], + bias[o].
//
// If `up` is given, the layer is gated: out = silu(gate) * up. Here `gate` is the sum above, and
// `up` the same sum with the weights `up` and the bias `up_bias`.
struct Linear {
  Type type;       // of x, scales, biases, and weights that are not packed
  Type out_type;   // of out
  int64_t tokens;  // rows of x and out that are read and written; rows of padding are not touched
  int64_t in, out_size;
  const void *x, *weight, *bias, *up, *up_bias;  // bias, up and up_bias may be null
  void* out;
  // Packed weights only. A 32-bit word holds 32 / bits numbers, the first in the lowest bits, each
  // stored without a sign. The value of a number is (stored - 2^(bits - 1)) * scale.
  int32_t bits;   // 4 or 8; 0 for weights that are not packed
  int64_t group;  // neighbours along `in` with one scale, a power of two; 0: all of a row
  const void *scale, *up_scale;  // [out_size][in / group]
};

// Score of an expert, from the logits of a router. kSoftmaxOfChosen: the logits themselves choose,
// and the weights are the softmax of the chosen ones.
enum class Score : int32_t { kSoftmax, kSigmoid, kSoftmaxOfChosen };

// Choice of experts for each row of logits. `bias` is added to the scores for the choice only. With
// several groups of neighbouring experts, only those of the `top_groups` best groups are chosen.
struct Route {
  int64_t tokens, experts, chosen;  // rows that are read; logits of a row; experts of each row
  const float *logits, *bias;       // [tokens][experts]; null, or [experts]
  Score score;
  int64_t groups, top_groups;
  bool two_of_group;     // the score of a group is the sum of its two largest, or its largest
  bool normalize;        // divide the weights of a row by (their sum + epsilon)
  float epsilon, scale;  // scale: factor of all weights
  int32_t* choice;       // [tokens][chosen]
  float* weights;        // [tokens][chosen]
};

// Experts of a mixture-of-experts layer: out[t] = sum over n of weights[t][n] * expert(x[t]), with
// the expert of number choice[t][n]. An expert is down * (silu(gate * x) * (up * x)). A number
// outside [0, experts) is an expert of another device, and adds nothing.
struct Experts {
  Type type;               // of x, scales, and matrices that are not packed
  int64_t tokens, chosen;  // rows of x that are read; experts of each token
  int64_t experts, size, hidden;
  const void* x;          // [tokens][size]
  const int32_t* choice;  // [tokens][chosen]
  const float* weights;   // [tokens][chosen]
  // Addresses of the matrices of each expert: [hidden][size], [hidden][size] and [size][hidden].
  const void *const *gate, *const *up, *const *down;
  int32_t bits;  // as in Linear
  int64_t group;
  const void *const *gate_scale, *const *up_scale, *const *down_scale;  // packed matrices only
  // If `up` is null, the matrices lie transposed: `gate` is [size][2 hidden], with the columns of
  // gate and up in turn, and `down` [hidden][size]. They have biases, [2 hidden] and [size]; that
  // of `down` is multiplied by `bias_scale`. The activation is clamped (transposed.h).
  const void *const *gate_bias, *const *down_bias;
  float bias_scale, alpha, limit;
  float* out;  // [tokens][size]
};

// Embedding: out[t] = table[ids[t]], zeros for an id outside [0, rows).
struct Embed {
  Type type;
  int64_t tokens, rows, size;  // ids; rows of the table; numbers of a row
  const int32_t* ids;
  const void* table;  // [rows][size]; with `scale`, bytes as packed weights of Linear
  const void* scale;  // null, or [rows] of `type`
  void* out;
};

// RMS norm: out[t] = round(x[t] / sqrt(mean(x[t]^2) + eps)) * weight, rounding to `type`.
struct Norm {
  Type type;
  int64_t tokens, size;
  const void *x, *weight;  // [tokens][size]; [size]
  float eps;
  void* out;
};

// Rotary embedding of each head of each token. With a weight, heads are normalized before, as Norm
// does.
struct Rotate {
  Type type;
  int64_t tokens, heads, head_dim;
  int64_t rotated;         // dimensions of a head that are rotated, an even number
  const void *x, *weight;  // [tokens][heads][head_dim]; null, or [head_dim]
  const float *cos, *sin;  // [tokens][rotated / 2]
  float eps;
  void* out;
};

// Choice of one token for each row of logits.
//
// Temperature 0 takes the first of the largest logits. Any other temperature draws from the tokens
// that remain after min_p, then top_k, then top_p.
struct Sample {
  int64_t rows, vocab;
  const float *logits, *temperature;     // [rows][vocab]; [rows]
  const int32_t* top_k;                  // [rows]; 0 keeps all tokens
  const float *top_p, *min_p, *uniform;  // [rows]; `uniform` in [0, 1) decides the draw
  int32_t* token;                        // [rows]
};

// Numbers that turn each row of logits into log probabilities: the largest logit, and log_sum, the
// natural logarithm of the sum of exp(logit - largest). NaN in a row makes its log_sum NaN.
struct LogNormalizer {
  int64_t rows, vocab;
  const float* logits;
  float *largest, *log_sum;  // [rows]
};

// KV cache of one layer: [pages][kv_heads][2][page_size * head_dim], a block of keys and a block of
// values for each page and head.
//
// A unit is 32 bits and holds u numbers: one float, or two bfloat16. A block of keys is
// [head_dim / u][page_size] units; the numbers of a unit are neighbours along the head. A block of
// values is [page_size / u][head_dim] units; the numbers of a unit are neighbours along the page.
// In this order the matrix kernel reads its second operand (simd.h).
struct Cache {
  Type type;
  int64_t pages, kv_heads, page_size, head_dim;
  void* data;
};

// Tokens of several sequences in one flat batch; each row of the batch is one sequence.
struct Ragged {
  int64_t tokens, rows, table_width;
  const int32_t* positions;        // [tokens]: position of each token in its sequence
  const int32_t* slots;            // [tokens]: page * page_size + place in the page
  const int32_t *starts, *counts;  // [rows]: first token of each row, and number of its tokens
  const int32_t* page_table;       // [rows][table_width]: pages of each row, in order
};

// Write of keys and values into the cache. Slots outside the cache are skipped.
struct WriteKv {
  Cache cache;
  Ragged ragged;
  const void *keys, *values;  // [tokens][kv_heads][head_dim]
};

// Attention of the tokens of a step to the keys of their sequences in the cache.
struct Attention {
  Cache cache;
  Ragged ragged;
  int64_t heads;
  float scale, soft_cap;  // factor of the scores; cap of the scores, 0 for none
  int64_t window;         // number of last positions that a token sees; 0 for all
  const float* sinks;     // null, or [heads]: scores that have no key and no value
  const void* q;          // [tokens][heads][head_dim]
  void* out;
};

// Kernels of one instruction set.
struct Kernels {
  const char* name;
  // The two linear kernels multiply by `count` matrices of one kind; each has an x of its own, or
  // that of the matrix before it.
  void (*linear)(const Linear*, int64_t count, Team&);
  void (*quantized_linear)(const Linear*, int64_t count, Team&);
  void (*route)(const Route&, Team&);
  void (*experts)(const Experts&, Team&);
  void (*embed)(const Embed&, Team&);
  void (*norm)(const Norm&, Team&);
  void (*rotate)(const Rotate&, Team&);
  void (*write_kv)(const WriteKv&, Team&);
  void (*attention)(const Attention&, Team&);
  void (*sample)(const Sample&, Team&);
  void (*log_normalizer)(const LogNormalizer&, Team&);
};

// Number of kernel calls of this process so far. populate.cc pauses while it changes.
extern std::atomic<int64_t> kernel_calls;

// Return the kernels to use: those of the best instruction set of this processor, or of the set
// that the environment variable SLIPWAY_ISA names. Null if this processor has no set of that name.
// An empty variable counts as unset.
const Kernels* kernels();

}  // namespace slipway
