#include "stretto/data/loader.h"

#include <algorithm>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>

#include "absl/strings/str_cat.h"

namespace stretto {

struct Loader::Impl {
  // One step's data. Two of them: the caller holds one while the thread fills the other.
  struct Slot {
    int64_t step = -1;  // -1: holds nothing
    absl::Status status;
    std::vector<PackedBatch> batches;
  };

  const TokenDataset* dataset = nullptr;
  LoaderOptions options;
  Slot slots[2];
  int front = 0;  // the slot handed out; touched by the caller only

  std::mutex mutex;
  std::condition_variable changed;
  int64_t wanted = -1;  // step that the thread is to read into the back slot; -1: idle
  bool stop = false;
  std::thread thread;

  std::pair<int64_t, int64_t> Range(int64_t step) const {
    const int64_t base = step * options.global_batch;
    const int64_t share = options.global_batch / options.ranks;
    const int64_t extra = options.global_batch % options.ranks;  // the first ranks take one more
    const int64_t first = base + options.rank * share + std::min<int64_t>(options.rank, extra);
    return {first, first + share + (options.rank < extra ? 1 : 0)};
  }

  absl::Status Read(int64_t step, std::vector<PackedBatch>* batches) const {
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

  void Fill(int64_t step, Slot* slot) const {
    slot->step = step;
    slot->status = Read(step, &slot->batches);
  }

  void Work() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      changed.wait(lock, [this] { return stop || wanted >= 0; });
      if (stop) return;
      const int64_t step = wanted;
      Slot* back = &slots[1 - front];  // `front` does not move while `wanted` is set
      lock.unlock();
      Fill(step, back);
      lock.lock();
      wanted = -1;
      changed.notify_all();
    }
  }
};

Loader::Loader() : impl_(std::make_unique<Impl>()) {}

Loader::~Loader() {
  if (!impl_->thread.joinable()) return;
  {
    std::lock_guard<std::mutex> lock(impl_->mutex);
    impl_->stop = true;
  }
  impl_->changed.notify_all();
  impl_->thread.join();
}

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
  for (Impl::Slot& slot : impl.slots) {
    slot.batches.resize(batches);
    for (int64_t b = 0; b < batches; ++b) {
      // Everything that a step may need, now, so that no step allocates.
      const int64_t samples = std::min(options.micro_batch, last - first - b * options.micro_batch);
      PackedBatch& batch = slot.batches[b];
      batch.ids.reserve(samples * length);
      batch.targets.reserve(samples * length);
      batch.weights.reserve(samples * length);
      batch.positions.reserve(samples * length);
      batch.cu_seqlens.reserve(samples * length + 1);
    }
    if (!options.prefetch) break;
  }
  if (options.prefetch) {
    try {
      impl.thread = std::thread([&impl] { impl.Work(); });
    } catch (const std::system_error& error) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the loader cannot start its thread: ", error.what(),
                       "; raise the limit (ulimit -u) or set prefetch to false"));
    }
  }
  return loader;
}

absl::StatusOr<const std::vector<PackedBatch>*> Loader::Step(int64_t step) {
  Impl& impl = *impl_;
  if (step < 0 || step >= std::numeric_limits<int64_t>::max() / impl.options.global_batch - 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("step ", step, " was asked of the loader; it must be in [0, 2^63 / ",
                     impl.options.global_batch, ")"));
  }
  if (!impl.options.prefetch) {
    impl.Fill(step, &impl.slots[0]);
    if (!impl.slots[0].status.ok()) return impl.slots[0].status;
    return &impl.slots[0].batches;
  }
  {
    std::unique_lock<std::mutex> lock(impl.mutex);
    impl.changed.wait(lock, [&impl] { return impl.wanted < 0; });
    impl.front = 1 - impl.front;
  }
  Impl::Slot& slot = impl.slots[impl.front];
  if (slot.step != step) impl.Fill(step, &slot);
  if (!slot.status.ok()) {
    const absl::Status status = slot.status;
    slot.step = -1;
    return status;
  }
  {
    std::lock_guard<std::mutex> lock(impl.mutex);
    impl.wanted = step + 1;
  }
  impl.changed.notify_all();
  return &slot.batches;
}

std::pair<int64_t, int64_t> Loader::Range(int64_t step) const { return impl_->Range(step); }

int64_t Loader::micro_batch_capacity() const {
  const int64_t most =
      (impl_->options.global_batch + impl_->options.ranks - 1) / impl_->options.ranks;
  return std::min(impl_->options.micro_batch, most) * impl_->dataset->options().sequence_length;
}

}  // namespace stretto
