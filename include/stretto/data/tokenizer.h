// Text to token ids and back.
#ifndef STRETTO_DATA_TOKENIZER_H_
#define STRETTO_DATA_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stretto/core/status.h"

namespace stretto {

// Stateless after loading; safe to use from several threads.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual const char* name() const = 0;
  virtual int64_t vocabulary() const = 0;
  virtual int64_t end_of_text() const = 0;
  // Any bytes, valid UTF-8 or not; appends to `ids`. Special tokens in the text are ordinary text.
  virtual absl::Status Encode(const std::string& text, std::vector<int32_t>* ids) const = 0;
  // INVALID_ARGUMENT names an id outside the vocabulary and its place. The end-of-text token
  // decodes to nothing.
  virtual absl::StatusOr<std::string> Decode(const std::vector<int32_t>& ids) const = 0;
};

// Ids 0..255 are bytes, 256 ends a text.
std::unique_ptr<Tokenizer> MakeByteTokenizer();
// GPT-2's byte-level BPE. Text is cut into pieces by GPT-2's pattern, and each piece's bytes are
// merged pair by pair, lowest rank first, leftmost first among equals (Sennrich et al., "Neural
// machine translation of rare words with subword units", ACL 2016; over bytes as in GPT-2). The
// pattern needs text: where the input is no valid UTF-8 it is cut into longest runs of valid text
// and of bytes that belong to no valid character. A run of text is encoded as if it were alone; a
// run of stray bytes is one piece. So decoding gives back exactly the bytes encoded, always, and
// valid text gets the ids that tiktoken gives it.
//
// From a .tiktoken file: lines of base64 token and rank; ranks 0 to n - 1 without a gap, among them
// all 256 single bytes. Id n ends a text. The split pattern is GPT-2's whatever the file.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTiktoken(const std::string& path);
// From Hugging Face's vocab.json and merges.txt. "<|endoftext|>" ends a text; where vocab.json
// lacks it the id after the last one does.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadGpt2Bpe(const std::string& vocab_json,
                                                       const std::string& merges_txt);
// "bytes", a path that ends in .tiktoken, or a directory that holds vocab.json and merges.txt.
absl::StatusOr<std::unique_ptr<Tokenizer>> OpenTokenizer(const std::string& spec);

}  // namespace stretto

#endif  // STRETTO_DATA_TOKENIZER_H_
