#include "stretto/data/dataset.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/data/shards.h"

namespace stretto {
namespace {

constexpr int64_t kMaxBatchTokens = std::numeric_limits<int32_t>::max();  // cu_seqlens are int32

}  // namespace

struct TokenDataset::Impl {
  DatasetOptions options;
  internal::Shards shards;
  int64_t samples = 0;
};

TokenDataset::TokenDataset() : impl_(std::make_unique<Impl>()) {}
TokenDataset::~TokenDataset() = default;

absl::StatusOr<std::unique_ptr<TokenDataset>> TokenDataset::Open(const std::string& pattern,
                                                                 const DatasetOptions& options) {
  if (options.sequence_length < 1 || options.sequence_length > kMaxBatchTokens) {
    return absl::InvalidArgumentError(absl::StrCat("the sequence length of a dataset is ",
                                                   options.sequence_length,
                                                   "; it must be in [1, 2^31 - 1]"));
  }
  std::unique_ptr<TokenDataset> dataset(new TokenDataset);
  Impl& impl = *dataset->impl_;
  impl.options = options;
  STRETTO_ASSIGN_OR_RETURN(
      impl.shards, internal::Shards::Open(pattern, options.vocabulary, options.end_of_text));
  const int64_t total = impl.shards.tokens();
  impl.samples = (total - 1) / options.sequence_length;
  if (impl.samples == 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "'", pattern, "' holds ", total, " tokens, fewer than the ", options.sequence_length + 1,
        " of one sample; give more text or a shorter sequence length"));
  }
  return dataset;
}

int64_t TokenDataset::samples() const { return impl_->samples; }
int64_t TokenDataset::tokens() const { return impl_->shards.tokens(); }
absl::StatusOr<uint64_t> TokenDataset::TokenFingerprint() const {
  return impl_->shards.Fingerprint();
}
const DatasetOptions& TokenDataset::options() const { return impl_->options; }

absl::Status TokenDataset::Append(int64_t index, PackedBatch* batch) const {
  const Impl& impl = *impl_;
  const int64_t length = impl.options.sequence_length;
  if (index < 0 || index >= impl.samples) {
    return absl::OutOfRangeError(absl::StrCat("sample ", index, " was asked of '",
                                              impl.shards.first_path(),
                                              "' and the like, which hold ", impl.samples));
  }
  const int64_t base = batch->tokens();
  if (base > kMaxBatchTokens - length) {
    return absl::InvalidArgumentError(
        absl::StrCat("a batch of ", base, " tokens cannot take ", length,
                     " more; use a smaller micro-batch or sequence length"));
  }
  const int64_t place = index * length;
  batch->ids.resize(base + length);
  batch->targets.resize(base + length);
  int32_t* ids = batch->ids.data() + base;
  int32_t* targets = batch->targets.data() + base;
  absl::Status status = impl.shards.Read(place, length, ids);
  if (status.ok()) status = impl.shards.Read(place + length, 1, targets + length - 1);
  if (!status.ok()) {
    batch->ids.resize(base);
    batch->targets.resize(base);
    return status;
  }
  std::copy(ids + 1, ids + length, targets);

  const bool split = impl.options.mask_across_documents;
  const int64_t separator = split ? impl.options.end_of_text : -1;
  // Place in the sample where the next file starts; only a boundary where there is no separator.
  const bool split_files = split && impl.options.end_of_text < 0;
  const std::vector<int64_t>& starts = impl.shards.starts();
  size_t shard = impl.shards.FileOf(place) + 1;
  const auto next_file = [&] {
    return split_files && shard + 1 < starts.size() ? starts[shard] - place
                                                    : std::numeric_limits<int64_t>::max();
  };
  int64_t boundary = next_file();

  batch->weights.resize(base + length, 1.0f);
  batch->positions.resize(base + length);
  float* weights = batch->weights.data() + base;
  int32_t* positions = batch->positions.data() + base;
  if (batch->cu_seqlens.empty()) batch->cu_seqlens.push_back(0);
  int64_t start = 0;  // of the sequence at hand
  const auto end_sequence = [&](int64_t end) {
    batch->cu_seqlens.push_back(static_cast<int32_t>(base + end));
    batch->max_length = std::max(batch->max_length, end - start);
    start = end;
  };
  for (int64_t i = 0; i < length; ++i) {
    if (i == boundary) {
      ++shard;
      boundary = next_file();
      end_sequence(i);
    } else if (i > 0 && ids[i] == separator) {
      end_sequence(i);
    }
    positions[i] = static_cast<int32_t>(i - start);
    const bool empty_document = separator >= 0 && ids[i] == separator && targets[i] == separator;
    if (empty_document || i + 1 == boundary) weights[i] = 0.0f;
  }
  end_sequence(length);
  return absl::OkStatus();
}

}  // namespace stretto
