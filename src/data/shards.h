// Token files laid end to end.
#ifndef STRETTO_SRC_DATA_SHARDS_H_
#define STRETTO_SRC_DATA_SHARDS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "stretto/core/status.h"
#include "stretto/data/token_file.h"

namespace stretto::internal {

class Shards {
 public:
  // As TokenDataset::Open says of its files. `end_of_text` must lie in a vocabulary that is not 0.
  static absl::StatusOr<Shards> Open(const std::string& pattern, int64_t vocabulary,
                                     int64_t end_of_text);

  int64_t tokens() const { return starts_.back(); }
  const std::string& first_path() const { return files_.front().path(); }
  // Places of the files' first tokens, ascending, and behind them the number of all tokens.
  const std::vector<int64_t>& starts() const { return starts_; }
  // The file that holds token `place`, which is below tokens().
  size_t FileOf(int64_t place) const;
  // Tokens [place, place + count), all of which exist. Thread-safe.
  absl::Status Read(int64_t place, int64_t count, int32_t* ids) const;
  // Of how many tokens there are and of a sample: 64 stretches of 1,024, evenly spread from the
  // first token to the last. However they are cut into files.
  absl::StatusOr<uint64_t> Fingerprint() const;

 private:
  absl::Status Read(int64_t place, int64_t count, int64_t vocabulary, int32_t* ids) const;
  int64_t vocabulary_ = 0;
  std::vector<TokenFile> files_;
  std::vector<int64_t> starts_;
};

}  // namespace stretto::internal

#endif  // STRETTO_SRC_DATA_SHARDS_H_
