// Drafts from repeated text: the tokens that followed the last occurrence of a sequence's ending.
//
// Not here: Python's side of these functions (slipway/engine/drafts/ngram.py).
//
// An index keeps, for each run of 3, 2 and 1 tokens, its positions from the newest to the oldest,
// as the chains of LZ77 compressors do. The draft follows the longest match among the newest
// positions (prompt lookup: Saxena, 2023; Yang et al., Inference with Reference, 2023).

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

// Positions of a chain that are compared, so that a search takes bounded time.
constexpr int kCandidates = 32;
// Tokens of the longest runs that have chains, unless every match must be longer.
constexpr int64_t kLongestRun = 3;
constexpr int64_t kNone = -1;

// Match of an ending: its length, and the position of its last token.
struct Match {
  int64_t length = 0, end = kNone;
};

// Positions of every run of `run` tokens, the newest first.
class Chains {
 public:
  explicit Chains(int64_t run) : run_(run), heads_(64) {}

  int64_t run() const { return run_; }

  // Add the position of the last of `tokens`.
  void add(const std::vector<int32_t>& tokens) {
    previous_.push_back(kNone);
    const int64_t size = static_cast<int64_t>(tokens.size());
    if (size < run_) return;
    const uint64_t key = hash(tokens.data() + size);
    Head& head = find_head(key);
    if (head.end == kNone) ++used_;
    previous_.back() = head.end;
    head = {key, size - 1};
    if (2 * used_ > heads_.size()) grow();
  }

  // Return the newest position of the run before `end`, and the one before a position.
  int64_t newest(const int32_t* end) { return find_head(hash(end)).end; }
  int64_t before(int64_t position) const { return previous_[position]; }

 private:
  struct Head {
    uint64_t key = 0;
    int64_t end = kNone;  // position of the run's last token
  };

  // Hash of the `run_` tokens before `end` (FNV-1a, by tokens).
  uint64_t hash(const int32_t* end) const {
    uint64_t value = 0xcbf29ce484222325u;
    for (int64_t i = -run_; i < 0; ++i)
      value = (value ^ static_cast<uint32_t>(end[i])) * 0x100000001b3u;
    return value ^ value >> 32;
  }

  Head& find_head(uint64_t key) {
    size_t slot = key & (heads_.size() - 1);
    while (heads_[slot].end != kNone && heads_[slot].key != key)
      slot = (slot + 1) & (heads_.size() - 1);
    return heads_[slot];
  }

  void grow() {
    std::vector<Head> before(2 * heads_.size());
    before.swap(heads_);
    for (const Head& head : before)
      if (head.end != kNone) find_head(head.key) = head;
  }

  int64_t run_;
  std::vector<int64_t> previous_;  // of each position: the one before it in its chain
  std::vector<Head> heads_;        // open addressing; the size is a power of two
  size_t used_ = 0;
};

// Tokens of one sequence, or of several with a separator between them, and the chains over them.
class Index {
 public:
  Index(int64_t shortest, int64_t longest) : longest_(longest) {
    for (int64_t run = std::max(shortest, std::min(kLongestRun, longest)); run >= shortest; --run)
      chains_.emplace_back(run);
  }

  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }
  int32_t at(int64_t position) const { return tokens_[position]; }

  void add(const int32_t* tokens, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      tokens_.push_back(tokens[i]);
      for (Chains& chains : chains_) chains.add(tokens_);
    }
  }

  // Return the longest match of the `count` tokens before `end`, and of equal ones the newest.
  // `own`: these are the last tokens of this index, which do not match themselves.
  Match match(const int32_t* end, int64_t count, bool own) {
    for (Chains& chains : chains_) {
      const Match found = match(chains, end, count, own);
      if (found.length) return found;
    }
    return {};
  }

 private:
  Match match(Chains& chains, const int32_t* end, int64_t count, bool own) {
    Match best;
    if (count < chains.run()) return best;
    int64_t at = chains.newest(end);
    if (own && at != kNone) at = chains.before(at);
    for (int tries = 0; at != kNone && tries < kCandidates; ++tries, at = chains.before(at)) {
      const int64_t most = std::min({longest_, count, at + 1});
      int64_t length = 0;
      while (length < most && tokens_[at - length] == end[-1 - length]) ++length;
      if (length >= chains.run() && length > best.length) best = {length, at};
      if (best.length == longest_) break;
    }
    return best;
  }

  int64_t longest_;
  std::vector<int32_t> tokens_;
  std::vector<Chains> chains_;  // of the longest runs first
};

}  // namespace

// Return an empty index of runs of `shortest` tokens; matches have at most `longest` tokens.
extern "C" void* slipway_ngram_new(int64_t shortest, int64_t longest) {
  return new Index(shortest, longest);
}

extern "C" void slipway_ngram_free(void* index) { delete static_cast<Index*>(index); }

extern "C" void slipway_ngram_add(void* index, const int32_t* tokens, int64_t count) {
  static_cast<Index*>(index)->add(tokens, count);
}

// Draft at most `most` tokens for each row; store their number in `lengths`, and that of the tokens
// of the match in `matches`. `counts`: of the `tokens` of each row's sequence, of which its index
// may hold fewer: the rest is added. `shared`: indexes of other texts, where negative tokens
// separate one text from the next.
extern "C" void slipway_ngram_draft(int64_t rows, int64_t num_shared, int64_t most,
                                    void* const* indexes, const int32_t* const* tokens,
                                    const int64_t* counts, int32_t* drafts, int32_t* lengths,
                                    int32_t* matches, void* const* shared) {
  for (int64_t row = 0; row < rows; ++row) {
    Index* const own = static_cast<Index*>(indexes[row]);
    const int64_t count = counts[row];
    own->add(tokens[row] + own->size(), count - own->size());
    Match best = own->match(tokens[row] + count, count, true);
    const Index* from = own;
    for (int64_t i = 0; i < num_shared; ++i) {
      Index* const other = static_cast<Index*>(shared[i]);
      const Match found = other->match(tokens[row] + count, count, false);
      if (found.length > best.length) best = found, from = other;
    }
    int32_t* const out = drafts + row * most;
    int64_t length = 0;
    for (; best.length && length < most; ++length) {
      const int64_t at = best.end + 1 + length;
      // Behind the end of its own text a draft continues with itself, as a period does.
      if (at < from->size())
        out[length] = from->at(at);
      else if (from == own)
        out[length] = out[at - from->size()];
      else
        break;
      if (out[length] < 0) break;
    }
    lengths[row] = static_cast<int32_t>(length);
    matches[row] = static_cast<int32_t>(best.length);
  }
}
