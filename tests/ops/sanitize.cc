// Run of all kernels on ragged shapes, for sanitizers (test_sanitizers.py builds and starts it).
//
// Not here: comparison with reference results (test_ops.py).
//
// Buffers have exactly the necessary size, so that a sanitizer finds accesses outside. The program
// also checks that products of a row do not depend on other rows. It prints the number of calls.

#include <array>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "isa.cc"

namespace {

using namespace slipway;

// Team of the calling thread only.
struct OneThread final : Team {
  std::vector<char> memory, common, work;
  void* shared(int64_t bytes) override { return aligned(common, bytes); }
  void* workspace(int64_t bytes) override { return aligned(work, bytes); }
  void run(int64_t items, int64_t, int64_t bytes, void (*body)(const void*, int64_t, void*),
           const void* context) override {
    void* scratch = aligned(memory, bytes);
    for (int64_t i = 0; i < items; ++i) body(context, i, scratch);
  }
  // Return a 64-byte aligned part of a new buffer. A buffer of an earlier call could be larger, and
  // hide an access after the end.
  static void* aligned(std::vector<char>& held, int64_t bytes) {
    std::vector<char>(bytes + 64).swap(held);
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(held.data()) + 63) / 64 * 64);
  }
};

std::mt19937 random_bits(7);
OneThread team;
int calls = 0;

// Return `count` random numbers of a type.
std::vector<char> numbers(int64_t count, Type type) {
  std::vector<char> held(count * size_of(type));
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) {
    const float x = normal(random_bits);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits >>= type == Type::kFloat ? 0 : 16;
    std::memcpy(held.data() + i * size_of(type), &bits, size_of(type));
  }
  return held;
}

void linears(Type type) {
  for (int64_t tokens : {0, 1, 3, 4, 7, 16, 17, 30, 49, 100, 200})
    for (int64_t in : {2, 8, 34, 64, 514})
      for (int64_t out_size : {1, 15, 16, 33, 70}) {
        auto x = numbers(tokens * in, type), w = numbers(out_size * in, type);
        auto up = numbers(out_size * in, type), bias = numbers(out_size, type);
        std::vector<char> out(tokens * out_size * 4);
        Linear op{type,     Type::kFloat, tokens,  in,      out_size,  x.data(),
                  w.data(), bias.data(),  nullptr, nullptr, out.data()};
        SLIPWAY_ISA::table.linear(&op, 1, team);
        out.resize(tokens * out_size * size_of(type));
        out.shrink_to_fit();
        op.out_type = type;
        op.up = up.data();
        op.out = out.data();
        SLIPWAY_ISA::table.linear(&op, 1, team);
        calls += 2;
      }
}

void quantized_linears(Type type) {
  for (int64_t tokens : {0, 1, 2, 3, 40, 530})
    for (int64_t in : {32, 160, 384})
      for (auto [bits, group] : {std::pair<int, int64_t>{8, 0}, {4, 32}, {4, 0}, {8, 32}, {4, 128}})
        for (int64_t out_size : {1, 15, 33}) {
          if (group && in % group) continue;
          auto x = numbers(tokens * in, type);
          auto w = numbers(out_size * in * bits / 32, Type::kFloat), up = w;
          auto scale = numbers(out_size * (group ? in / group : 1), type), up_scale = scale;
          std::vector<char> out(tokens * out_size * 4), other = out;
          Linear op{type,     Type::kFloat, tokens,  in,      out_size,  x.data(),
                    w.data(), nullptr,      nullptr, nullptr, out.data()};
          op.bits = bits;
          op.group = group;
          op.scale = scale.data();
          Linear both[] = {op, op};
          both[1].out = other.data();
          SLIPWAY_ISA::table.quantized_linear(both, 2, team);
          op.up = up.data();
          op.up_scale = up_scale.data();
          SLIPWAY_ISA::table.quantized_linear(&op, 1, team);
          calls += 2;
        }
}

void routes() {
  for (int64_t experts : {4, 16, 60, 129})
    for (int64_t groups : {1, 4})
      for (Score score : {Score::kSoftmax, Score::kSigmoid, Score::kSoftmaxOfChosen})
        for (bool has_bias : {false, true}) {
          if (experts % groups) continue;
          const int64_t tokens = 3, chosen = 2;
          auto logits = numbers(tokens * experts, Type::kFloat);
          auto bias = numbers(experts, Type::kFloat);
          std::vector<int32_t> choice(tokens * chosen);
          std::vector<float> weights(tokens * chosen);
          Route op{};
          op.tokens = tokens;
          op.experts = experts;
          op.chosen = chosen;
          op.logits = reinterpret_cast<float*>(logits.data());
          op.bias = has_bias ? reinterpret_cast<float*>(bias.data()) : nullptr;
          op.score = score;
          op.groups = groups;
          op.top_groups = groups > 1 ? 2 : 1;
          op.two_of_group = has_bias && experts / groups > 1;
          op.normalize = true;
          op.scale = 1.0f;
          op.choice = choice.data();
          op.weights = weights.data();
          SLIPWAY_ISA::table.route(op, team);
          ++calls;
        }
}

// Arrays of a call of experts, beside the matrices. Experts of other devices have numbers outside
// [0, count).
struct RoutedTokens {
  std::vector<char> x, weights, out;
  std::vector<int32_t> choice;
  Experts op{};

  RoutedTokens(Type type, int64_t tokens, int64_t count, int64_t size, int64_t hidden) {
    const int64_t chosen = 3;
    for (int64_t i = 0; i < tokens * chosen; ++i)
      choice.push_back(static_cast<int32_t>(i * 7 / 3 % (count + 2)) - 1);
    x = numbers(tokens * size, type);
    weights = numbers(tokens * chosen, Type::kFloat);
    out.resize(tokens * size * 4);
    op.type = type;
    op.tokens = tokens;
    op.chosen = chosen;
    op.experts = count;
    op.size = size;
    op.hidden = hidden;
    op.x = x.data();
    op.choice = choice.data();
    op.weights = reinterpret_cast<float*>(weights.data());
    op.out = reinterpret_cast<float*>(out.data());
  }
};

void experts(Type type) {
  for (int64_t tokens : {0, 1, 2, 9, 40})
    for (auto [bits, group] : {std::pair<int, int64_t>{0, 0}, {8, 0}, {4, 32}})
      for (int64_t hidden : {32, 96}) {
        const int64_t count = 5, size = 64;
        std::vector<std::vector<char>> held;
        std::vector<const void*> tables[6];
        for (int64_t e = 0; e < count; ++e)
          for (int m = 0; m < 3; ++m) {
            const int64_t in = m == 2 ? hidden : size, rows = m == 2 ? size : hidden;
            held.push_back(bits ? numbers(rows * in * bits / 32, Type::kFloat)
                                : numbers(rows * in, type));
            tables[m].push_back(held.back().data());
            held.push_back(numbers(rows * (group ? in / group : 1), type));
            tables[3 + m].push_back(held.back().data());
          }
        RoutedTokens routed(type, tokens, count, size, hidden);
        Experts& op = routed.op;
        op.gate = tables[0].data();
        op.up = tables[1].data();
        op.down = tables[2].data();
        op.bits = bits;
        op.group = group;
        op.gate_scale = tables[3].data();
        op.up_scale = tables[4].data();
        op.down_scale = tables[5].data();
        SLIPWAY_ISA::table.experts(op, team);
        ++calls;
      }
}

// Experts with matrices that lie transposed, and biases.
void transposed_experts(Type type) {
  for (int64_t tokens : {1, 2, 9})
    for (int64_t hidden : {3, 150}) {
      const int64_t count = 5, size = 68;
      std::vector<std::vector<char>> held;
      std::vector<const void*> tables[4];
      for (int64_t e = 0; e < count; ++e)
        for (int m = 0; m < 4; ++m) {
          held.push_back(
              numbers(std::array{size * 2 * hidden, hidden * size, 2 * hidden, size}[m], type));
          tables[m].push_back(held.back().data());
        }
      RoutedTokens routed(type, tokens, count, size, hidden);
      Experts& op = routed.op;
      op.gate = tables[0].data();
      op.down = tables[1].data();
      op.gate_bias = tables[2].data();
      op.down_bias = tables[3].data();
      op.bias_scale = 0.5f;
      op.alpha = 1.702f;
      op.limit = 7.0f;
      SLIPWAY_ISA::table.experts(op, team);
      ++calls;
    }
}

void embeds(Type type) {
  for (int64_t size : {4, 16, 20, 128}) {
    const std::vector<int32_t> ids{0, 4, -1, 5};
    auto table = numbers(5 * size, type), bytes = numbers(5 * size / 4, Type::kFloat);
    auto scale = numbers(5, type), out = numbers(4 * size, type);
    SLIPWAY_ISA::table.embed({type, 4, 5, size, ids.data(), table.data(), nullptr, out.data()},
                             team);
    SLIPWAY_ISA::table.embed({type, 4, 5, size, ids.data(), bytes.data(), scale.data(), out.data()},
                             team);
    calls += 2;
  }
}

void norms(Type type) {
  for (auto [head_dim, rotated] :
       {std::pair<int64_t, int64_t>{8, 8}, {24, 24}, {40, 40}, {40, 12}, {128, 128}, {128, 64}})
    for (bool normed : {false, true}) {
      const int64_t tokens = 3, heads = 2, all = tokens * heads * head_dim;
      auto x = numbers(all, type), weight = numbers(head_dim, type), out = numbers(all, type);
      auto cos = numbers(tokens * rotated / 2, Type::kFloat), sin = cos;
      SLIPWAY_ISA::table.norm(
          {type, tokens * heads, head_dim, x.data(), weight.data(), 1e-6f, out.data()}, team);
      SLIPWAY_ISA::table.rotate(
          {type, tokens, heads, head_dim, rotated, x.data(), normed ? weight.data() : nullptr,
           reinterpret_cast<float*>(cos.data()), reinterpret_cast<float*>(sin.data()), 1e-6f,
           out.data()},
          team);
      calls += 2;
    }
}

void attentions(Type type, int64_t page_size, int64_t head_dim, int64_t heads, int64_t kv_heads,
                int64_t window) {
  // tokens in the cache, and new tokens
  const std::vector<std::pair<int32_t, int32_t>> rows{{0, 5}, {70, 1}, {0, 0}, {100, 61}, {15, 1}};
  const int64_t width = (161 + page_size - 1) / page_size, pages = width * 5;
  std::vector<int32_t> positions, slots, starts, counts, lengths, table;
  for (size_t r = 0; r < rows.size(); ++r) {
    starts.push_back(positions.size());
    counts.push_back(rows[r].second);
    lengths.push_back(rows[r].first + rows[r].second);
    for (int64_t p = 0; p < width; ++p) table.push_back((r * width + p) * 3 % pages);
    for (int32_t i = rows[r].first; i < lengths.back(); ++i) {
      positions.push_back(i);
      slots.push_back(table[r * width + i / page_size] * page_size + i % page_size);
    }
  }
  slots.back() = pages * page_size;  // as the slot of a token of padding
  const int64_t tokens = positions.size();
  auto data = numbers(pages * kv_heads * 2 * page_size * head_dim, type);
  auto q = numbers(tokens * heads * head_dim, type);
  auto k = numbers(tokens * kv_heads * head_dim, type), v = k, out = q;
  auto sinks = numbers(heads, Type::kFloat);
  const Cache cache{type, pages, kv_heads, page_size, head_dim, data.data()};
  const Ragged ragged{
      tokens,        static_cast<int64_t>(rows.size()),
      width,         positions.data(),
      slots.data(),  starts.data(),
      counts.data(), table.data(),
  };
  SLIPWAY_ISA::table.write_kv({cache, ragged, k.data(), v.data()}, team);
  for (float soft_cap : {0.0f, 30.0f})
    for (bool sinking : {false, true})
      SLIPWAY_ISA::table.attention(
          {cache, ragged, heads, 0.2f, soft_cap, window,
           sinking ? reinterpret_cast<float*>(sinks.data()) : nullptr, q.data(), out.data()},
          team);
  calls += 5;
}

void samples() {
  for (int64_t vocab : {1, 15, 37, 4096, 5001}) {
    auto logits = numbers(2 * vocab, Type::kFloat);
    const float temperature[] = {0, 0.8f}, top_p[] = {1, 0.9f}, min_p[] = {0, 0.01f};
    const float uniform[] = {0.5f, 0.9999999f};
    const int32_t top_k[] = {0, 5};
    int32_t token[2];
    SLIPWAY_ISA::table.sample({2, vocab, reinterpret_cast<float*>(logits.data()), temperature,
                               top_k, top_p, min_p, uniform, token},
                              team);
    float largest[2], log_sum[2];
    SLIPWAY_ISA::table.log_normalizer(
        {2, vocab, reinterpret_cast<float*>(logits.data()), largest, log_sum}, team);
    if (token[0] < 0 || token[0] >= vocab || token[1] < 0 || token[1] >= vocab) std::abort();
    ++calls;
  }
}

// Check that the products of a row have the same bits, with and without other rows.
template <class T, int kTogether>
void products_of_rows(Type type) {
  constexpr int64_t kUnits = 32, kRows = 64, kCols = 4;
  auto a = numbers(kRows * kUnits * T::kPerUnit, type);
  auto b = numbers(kUnits * kCols * SLIPWAY_ISA::kLanes * T::kPerUnit, type);
  const uint32_t* at[4 * kCols];
  for (int s = 0; s < kUnits / kTogether; ++s)
    for (int j = 0; j < kCols; ++j)
      at[s * kCols + j] =
          reinterpret_cast<uint32_t*>(b.data()) + (s * kTogether * kCols + j) * SLIPWAY_ISA::kLanes;
  const SLIPWAY_ISA::Operand second{at, at, kUnits, kTogether, kCols * SLIPWAY_ISA::kLanes};
  const auto* first = reinterpret_cast<uint32_t*>(a.data());
  constexpr int64_t width = kCols * SLIPWAY_ISA::kLanes;
  std::vector<float> sums(kRows * width), single(kRows * width);
  for (int64_t rows : {1, 2, 3, 4, 5, 16, 17, 40, 64}) {
    for (bool fresh : {true, false}) {
      {
        const SLIPWAY_ISA::Tiles held(rows, SLIPWAY_ISA::kUnitsAtOnce);
        SLIPWAY_ISA::products<T, kTogether>(kCols, rows, first, kUnits, second, sums.data(), width,
                                            fresh);
      }
      const SLIPWAY_ISA::Tiles held(1, SLIPWAY_ISA::kUnitsAtOnce);
      for (int64_t r = 0; r < rows; ++r)
        SLIPWAY_ISA::products<T, kTogether>(kCols, 1, first + r * kUnits, kUnits, second,
                                            single.data() + r * width, width, fresh);
    }
    if (std::memcmp(sums.data(), single.data(), 4 * rows * width)) {
      std::fprintf(stderr, "%d rows differ\n", int(rows));
      std::exit(1);
    }
    ++calls;
  }
}

}  // namespace

int main() {
#if defined(__AMX_BF16__)
  // Request tiles as csrc/dispatch.cc does. 77: the system does not allow them.
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return 77;
#endif
  for (Type type : {Type::kFloat, Type::kBFloat16}) {
    linears(type);
    quantized_linears(type);
    experts(type);
    transposed_experts(type);
    embeds(type);
    norms(type);
    for (int64_t page_size : {16, 48, 64, 128})
      for (int64_t head_dim : {8, 24, 64, 80})
        attentions(type, page_size, head_dim, 6, 3, page_size == 48 ? 20 : 0);
    attentions(type, 16, 16, 40, 1, 0);
  }
  samples();
  routes();
  products_of_rows<SLIPWAY_ISA::Float, 8>(Type::kFloat);
  products_of_rows<SLIPWAY_ISA::BFloat16, 8>(Type::kBFloat16);
  products_of_rows<SLIPWAY_ISA::BFloat16, 16>(Type::kBFloat16);
  std::printf("%d\n", calls);
}
