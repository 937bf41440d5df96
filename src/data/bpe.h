// Byte-pair encoding of one piece of text over a table of tokens.
#ifndef STRETTO_SRC_DATA_BPE_H_
#define STRETTO_SRC_DATA_BPE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "stretto/core/status.h"
#include "stretto/data/tokenizer.h"

namespace stretto {

// Tokens and the pairs of them that merge. Immutable once made.
class BpeTable {
 public:
  struct Merge {
    int32_t left, right, result;  // ids
  };
  static constexpr size_t kMaxTokenBytes = 512;

  // Two tokens merge when their bytes laid together are a token, and its id is the rank. A piece
  // that is a token is that token, as in tiktoken. `tokens` [vocabulary], by id, all different; the
  // 256 single bytes must be among them. `source` names the file in messages.
  static absl::StatusOr<BpeTable> FromRanks(std::vector<std::string> tokens,
                                            const std::string& source);
  // Only the pairs in `merges` merge, earlier ones first.
  static absl::StatusOr<BpeTable> FromMerges(std::vector<std::string> tokens,
                                             const std::vector<Merge>& merges,
                                             const std::string& source);

  int32_t size() const { return static_cast<int32_t>(tokens_.size()); }
  const std::string& token(int32_t id) const { return tokens_[id]; }
  // The id of these bytes, or -1.
  int32_t Find(std::string_view bytes) const;

  // Memory that Encode uses again for each piece.
  struct Scratch {
    struct Part {
      int32_t id;
      uint32_t previous, next;  // places of the neighbouring parts
    };
    struct Candidate {
      uint32_t rank, place;
      int32_t left, right, result;
    };
    std::vector<Part> parts;
    std::vector<Candidate> heap;
  };
  // Appends the tokens of `piece`, which is not empty. O(n log n) in its length.
  void Encode(std::string_view piece, Scratch* scratch, std::vector<int32_t>* ids) const;

 private:
  struct Pair {
    uint64_t key = ~uint64_t{0};  // left << 32 | right
    uint32_t rank = 0;
    int32_t result = 0;
  };
  static constexpr uint32_t kNoRank = ~uint32_t{0};

  absl::Status Index(const std::string& source);
  void ReservePairs(size_t count);
  void AddPair(int32_t left, int32_t right, uint32_t rank, int32_t result);
  const Pair* FindPair(int32_t left, int32_t right) const;
  void MergeShort(std::string_view piece, std::vector<int32_t>* ids) const;
  void MergeLong(std::string_view piece, Scratch* scratch, std::vector<int32_t>* ids) const;

  std::vector<std::string> tokens_;
  std::vector<int32_t> slots_;  // open addressing over tokens_; -1: free
  std::vector<bool> whole_;     // the token's own bytes encode to it
  std::vector<Pair> pairs_;     // open addressing
  int32_t bytes_[256];          // ids of the single bytes
};

// The tokenizers from the text of their files; `source` names them in messages.
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTiktoken(std::string_view text,
                                                         const std::string& source);
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseGpt2Bpe(const std::string& vocab_json,
                                                        std::string_view merges_txt,
                                                        const std::string& vocab_source,
                                                        const std::string& merges_source);

}  // namespace stretto

#endif  // STRETTO_SRC_DATA_BPE_H_
