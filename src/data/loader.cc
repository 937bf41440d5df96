#include "stretto/data/loader.h"

#include <algorithm>
#include <limits>
#include <optional>

#include "absl/strings/str_cat.h"
#include "src/data/prefetcher.h"

namespace stretto {

struct Loader::Impl {
  using Batches = std::vector<PackedBatch>;

  const TokenDataset* dataset = nullptr;
  LoaderOptions options;
  internal::Prefetcher<Batches> steps{
      [this](int64_t step, Batches* batches) { return Read(step, batches); }};

  std::pair<int64_t, int64_t> Range(int64_t step) const {
    const int64_t base = step * options.global_batch;
    const int64_t share = options.global_batch / options.ranks;
    const int64_t extra = options.global_batch % options.ranks;  // the first ranks take one more
    const int64_t first = base + options.rank * share + std::min<int64_t>(options.rank, extra);
    return {first, first + share + (options.rank < extra ? 1 : 0)};
  }

  absl::Status Read(int64_t step, Batches* batches) const {
    const auto [first, last] = Range(step);
    const int64_t samples = dataset->samples();
    std::optional<Permutation> permutation;
    int64_t permuted_epoch = -1;
    for (PackedBatch& batch : *batches) batch.Clear();
    for (int64_t number = first; number < last; ++number) {
      const int64_t epoch = number / samples;
      int64_t index = number % samples;
      if (options.shuffle) {
        if (epoch != permuted_epoch) {
          permutation.emplace(samples, options.seed, epoch);
          permuted_epoch = epoch;
        }
        index = static_cast<int64_t>((*permutation)(static_cast<uint64_t>(index)));
      }
      PackedBatch& batch = (*batches)[(number - first) / options.micro_batch];
      STRETTO_RETURN_IF_ERROR(dataset->Append(index, &batch));
    }
    return absl::OkStatus();
  }
};

Loader::Loader() : impl_(std::make_unique<Impl>()) {}

Loader::~Loader() = default;

absl::StatusOr<std::unique_ptr<Loader>> Loader::Create(const TokenDataset& dataset,
                                                       const LoaderOptions& options) {
  if (options.global_batch < 1 || options.micro_batch < 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a loader was asked for a global batch of ", options.global_batch, " and micro-batches of ",
        options.micro_batch, " samples; both must be at least 1"));
  }
  if (options.ranks < 1 || options.rank < 0 || options.rank >= options.ranks) {
    return absl::InvalidArgumentError(absl::StrCat("a loader was given rank ", options.rank, " of ",
                                                   options.ranks,
                                                   " ranks; it must be in [0, ranks)"));
  }
  std::unique_ptr<Loader> loader(new Loader);
  Impl& impl = *loader->impl_;
  impl.dataset = &dataset;
  impl.options = options;

  const auto [first, last] = impl.Range(0);  // every step has as many samples
  const int64_t length = dataset.options().sequence_length;
  const int64_t largest = std::min(options.micro_batch, last - first);
  if (largest > std::numeric_limits<int32_t>::max() / length) {
    return absl::InvalidArgumentError(
        absl::StrCat("a micro-batch of ", largest, " samples of ", length,
                     " tokens is larger than 2^31 - 1 tokens; use a smaller micro-batch"));
  }
  // A step's batches are held in memory; this also keeps the arithmetic below far from overflow.
  constexpr int64_t kMaxStepTokens = int64_t{1} << 33;
  if (last - first > kMaxStepTokens / length) {
    return absl::InvalidArgumentError(
        absl::StrCat("a global batch of ", options.global_batch, " samples of ", length,
                     " tokens gives this rank more than ", kMaxStepTokens,
                     " tokens a step; use a smaller global batch or more ranks"));
  }
  const int64_t batches = (last - first - 1) / options.micro_batch + 1;
  if (options.prefetch) STRETTO_RETURN_IF_ERROR(impl.steps.Start());
  impl.steps.ForEach([&](Impl::Batches* step) {
    step->resize(static_cast<size_t>(batches));
    for (int64_t b = 0; b < batches; ++b) {
      // Everything that a step may need, now, so that no step allocates.
      const int64_t samples = std::min(options.micro_batch, last - first - b * options.micro_batch);
      (*step)[static_cast<size_t>(b)].Reserve(samples * length);
    }
  });
  return loader;
}

absl::StatusOr<const std::vector<PackedBatch>*> Loader::Step(int64_t step) {
  Impl& impl = *impl_;
  if (step < 0 || step >= std::numeric_limits<int64_t>::max() / impl.options.global_batch - 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("step ", step, " was asked of the loader; it must be in [0, 2^63 / ",
                     impl.options.global_batch, ")"));
  }
  return impl.steps.Step(step);
}

std::pair<int64_t, int64_t> Loader::Range(int64_t step) const { return impl_->Range(step); }

int64_t Loader::micro_batch_capacity() const {
  const int64_t most =
      (impl_->options.global_batch + impl_->options.ranks - 1) / impl_->options.ranks;
  return std::min(impl_->options.micro_batch, most) * impl_->dataset->options().sequence_length;
}

}  // namespace stretto
