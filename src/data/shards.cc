#include "src/data/shards.h"

#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace stretto::internal {
namespace {

// Shards beyond these are opened for each read, so that no set exhausts the process's descriptors.
constexpr size_t kMostOpen = 256;

}  // namespace

absl::StatusOr<Shards> Shards::Open(const std::string& pattern, int64_t vocabulary,
                                    int64_t end_of_text) {
  if (vocabulary < 0 || end_of_text < -1 || (vocabulary > 0 && end_of_text >= vocabulary)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the end-of-text id ", end_of_text, " of dataset '", pattern,
                     "' does not lie in its vocabulary of ", vocabulary,
                     "; give the tokenizer's own, or -1 for none"));
  }
  Shards shards;
  shards.vocabulary_ = vocabulary;
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> paths, ExpandFiles(pattern));
  shards.files_.reserve(paths.size());
  shards.starts_.assign(1, 0);
  for (const std::string& path : paths) {
    STRETTO_ASSIGN_OR_RETURN(TokenFile file,
                             TokenFile::Open(path, shards.files_.size() < kMostOpen));
    if (!shards.files_.empty() && file.token_bytes() != shards.files_[0].token_bytes()) {
      return absl::InvalidArgumentError(
          absl::StrCat("token files '", shards.files_[0].path(), "' and '", path, "' hold ids of ",
                       shards.files_[0].token_bytes(), " and ", file.token_bytes(),
                       " bytes, so they come from different tokenizers; name only files of one"));
    }
    shards.starts_.push_back(shards.starts_.back() + file.tokens());
    shards.files_.push_back(std::move(file));
  }
  return shards;
}

size_t Shards::FileOf(int64_t place) const {
  return static_cast<size_t>(std::upper_bound(starts_.begin(), starts_.end(), place) -
                             starts_.begin()) -
         1;
}

absl::Status Shards::Read(int64_t place, int64_t count, int32_t* ids) const {
  return Read(place, count, vocabulary_, ids);
}

absl::Status Shards::Read(int64_t place, int64_t count, int64_t vocabulary, int32_t* ids) const {
  for (size_t f = FileOf(place); count > 0; ++f) {
    const int64_t n = std::min(count, starts_[f + 1] - place);
    STRETTO_RETURN_IF_ERROR(files_[f].Read(place - starts_[f], n, vocabulary, ids));
    place += n;
    ids += n;
    count -= n;
  }
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> Shards::Fingerprint() const {
  constexpr int64_t kStretches = 64, kTokens = 1024;
  const int64_t total = tokens();
  std::vector<int32_t> ids(kTokens);
  uint64_t hash = static_cast<uint64_t>(total);
  for (int64_t s = 0; s < kStretches; ++s) {
    const int64_t count = std::min(kTokens, total);
    const int64_t place = (total - count) * s / (kStretches - 1);
    // Whoever uses them says which ids are wrong.
    STRETTO_RETURN_IF_ERROR(Read(place, count, /*vocabulary=*/0, ids.data()));
    hash = XXH64(ids.data(), static_cast<size_t>(count) * sizeof(ids[0]), hash);
  }
  return hash;
}

}  // namespace stretto::internal
