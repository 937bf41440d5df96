// Cuts text into the pieces that byte-pair encoding works on.
#ifndef STRETTO_SRC_DATA_SPLIT_H_
#define STRETTO_SRC_DATA_SPLIT_H_

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "stretto/core/status.h"

namespace stretto {

// Bytes at the start of `text` that are valid UTF-8 (Unicode 15, table 3-7: no surrogates, nothing
// overlong, nothing above U+10FFFF).
size_t ValidUtf8Prefix(std::string_view text);

// GPT-2's pattern, compiled once; safe to use from several threads.
class Gpt2Splitter {
 public:
  static absl::StatusOr<std::unique_ptr<Gpt2Splitter>> Create();
  ~Gpt2Splitter();

  // The pieces of one text in order. Text that is no valid UTF-8 is cut first, as tokenizer.h says.
  class Pieces {
   public:
    Pieces(const Gpt2Splitter& splitter, std::string_view text);
    ~Pieces();
    Pieces(const Pieces&) = delete;
    Pieces& operator=(const Pieces&) = delete;
    // The next piece, never empty; false at the end or after an error.
    bool Next(std::string_view* piece);
    const absl::Status& status() const { return status_; }

   private:
    const Gpt2Splitter& splitter_;
    std::string_view rest_;  // not yet looked at
    std::string_view run_;   // valid text being matched
    size_t at_ = 0;          // in run_
    void* match_ = nullptr;
    absl::Status status_;
  };

 private:
  Gpt2Splitter() = default;
  void* code_ = nullptr;
  bool jit_ = false;
};

}  // namespace stretto

#endif  // STRETTO_SRC_DATA_SPLIT_H_
