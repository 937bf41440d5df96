#include "stretto/data/documents.h"

#include <xxhash.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/data/shards.h"

namespace stretto {

struct DocumentDataset::Impl {
  DatasetOptions options;
  internal::Shards shards;
  std::vector<int64_t> begins;  // place of each document's first input
  std::vector<int32_t> lengths;
  int64_t tokens = 0;
  bool unseparated = false;

  // Inputs [begin, end), whose targets are [begin + 1, end + 1).
  void Add(int64_t begin, int64_t end) {
    for (; begin < end; begin += options.sequence_length) {
      begins.push_back(begin);
      lengths.push_back(static_cast<int32_t>(std::min(options.sequence_length, end - begin)));
      tokens += lengths.back();
    }
  }
  absl::Status AddBetweenSeparators();
};

absl::Status DocumentDataset::Impl::AddBetweenSeparators() {
  constexpr int64_t kPiece = 1 << 20;  // tokens read at a time
  const int64_t total = shards.tokens();
  std::vector<int32_t> ids(static_cast<size_t>(std::min(kPiece, total)));
  int64_t begin = 0;
  bool at_separator = false;  // `begin` is one
  unseparated = true;
  for (int64_t place = 0; place < total; place += kPiece) {
    const int64_t count = std::min(kPiece, total - place);
    STRETTO_RETURN_IF_ERROR(shards.Read(place, count, ids.data()));
    for (int64_t i = 0; i < count; ++i) {
      if (ids[static_cast<size_t>(i)] != options.end_of_text) continue;
      const int64_t separator = place + i;
      const bool nothing = at_separator && separator == begin + 1;
      if (!nothing) Add(begin, separator);
      begin = separator;
      at_separator = true;
      unseparated = false;
    }
  }
  Add(begin, total - 1);
  return absl::OkStatus();
}

DocumentDataset::DocumentDataset() : impl_(std::make_unique<Impl>()) {}
DocumentDataset::~DocumentDataset() = default;

absl::StatusOr<std::unique_ptr<DocumentDataset>> DocumentDataset::Open(
    const std::string& pattern, const DatasetOptions& options) {
  if (options.sequence_length < 1 ||
      options.sequence_length > std::numeric_limits<int32_t>::max()) {
    return absl::InvalidArgumentError(absl::StrCat("the longest document of a dataset is given ",
                                                   options.sequence_length,
                                                   " tokens; it must be in [1, 2^31 - 1]"));
  }
  std::unique_ptr<DocumentDataset> dataset(new DocumentDataset);
  Impl& impl = *dataset->impl_;
  impl.options = options;
  STRETTO_ASSIGN_OR_RETURN(
      impl.shards, internal::Shards::Open(pattern, options.vocabulary, options.end_of_text));
  if (!options.mask_across_documents) {
    impl.Add(0, impl.shards.tokens() - 1);
  } else if (options.end_of_text >= 0) {
    STRETTO_RETURN_IF_ERROR(impl.AddBetweenSeparators());
  } else {
    const std::vector<int64_t>& starts = impl.shards.starts();
    for (size_t f = 0; f + 1 < starts.size(); ++f) impl.Add(starts[f], starts[f + 1] - 1);
  }
  if (impl.begins.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", pattern, "' holds ", impl.shards.tokens(),
                     " tokens and no document among them; give text, and the tokenizer that the "
                     "files were made with"));
  }
  return dataset;
}

int64_t DocumentDataset::documents() const { return static_cast<int64_t>(impl_->begins.size()); }
int64_t DocumentDataset::tokens() const { return impl_->tokens; }
int64_t DocumentDataset::length(int64_t document) const {
  return impl_->lengths[static_cast<size_t>(document)];
}
uint64_t DocumentDataset::Fingerprint() const {
  return XXH64(impl_->lengths.data(), impl_->lengths.size() * sizeof(impl_->lengths[0]), 0);
}
absl::StatusOr<uint64_t> DocumentDataset::TokenFingerprint() const {
  return impl_->shards.Fingerprint();
}
bool DocumentDataset::unseparated() const { return impl_->unseparated; }
const DatasetOptions& DocumentDataset::options() const { return impl_->options; }

absl::Status DocumentDataset::Read(int64_t document, Range range, int32_t* ids,
                                   int32_t* targets) const {
  const Impl& impl = *impl_;
  if (document < 0 || document >= documents() || range.first < 0 || range.count < 0 ||
      range.first > length(document) - range.count) {
    return absl::OutOfRangeError(absl::StrCat(
        "tokens [", range.first, ", ", range.first + range.count, ") of document ", document,
        " were asked of '", impl.shards.first_path(), "' and the like, which hold ", documents(),
        document >= 0 && document < documents()
            ? absl::StrCat(" documents, this one of ", length(document), " tokens")
            : " documents"));
  }
  if (range.count == 0) return absl::OkStatus();
  const int64_t place = impl.begins[static_cast<size_t>(document)] + range.first;
  STRETTO_RETURN_IF_ERROR(impl.shards.Read(place, range.count, ids));
  std::copy(ids + 1, ids + range.count, targets);
  return impl.shards.Read(place + range.count, 1, targets + range.count - 1);
}

DocumentOrder::DocumentOrder(const DocumentDataset& dataset, uint64_t seed, bool shuffle,
                             int64_t step_tokens)
    : dataset_(dataset), seed_(seed), shuffle_(shuffle), step_tokens_(step_tokens) {}

int64_t DocumentOrder::At(int64_t number) {
  const int64_t documents = dataset_.documents();
  const int64_t epoch = number / documents, place = number % documents;
  if (!shuffle_) return place;
  if (epoch != epoch_) {
    permutation_.emplace(documents, seed_, epoch);
    epoch_ = epoch;
  }
  return static_cast<int64_t>((*permutation_)(static_cast<uint64_t>(place)));
}

int64_t DocumentOrder::EndOf(int64_t number) {
  int64_t tokens = 0;
  const int64_t begin = number;
  for (;; ++number) {
    tokens += dataset_.length(At(number));
    if (tokens > step_tokens_ && number > begin) return number;
  }
}

absl::Status DocumentOrder::Step(int64_t step, std::vector<int64_t>* documents) {
  if (step < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("the documents of step ", step, " were asked for; steps begin with 0"));
  }
  if (step < step_) step_ = first_ = 0;
  for (; step_ < step; ++step_) first_ = EndOf(first_);
  const int64_t end = EndOf(first_);
  documents->clear();
  for (int64_t number = first_; number < end; ++number) documents->push_back(At(number));
  return absl::OkStatus();
}

}  // namespace stretto
