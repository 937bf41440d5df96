#include "stretto/data/plan_loader.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/data/prefetcher.h"
#include "stretto/plan/context_cut.h"

namespace stretto {

struct PlanLoader::Impl {
  Impl(const DocumentDataset& d, DocumentPlanner p, const PlanLoaderOptions& o)
      : dataset(d), planner(std::move(p)), options(o), order(d, o.seed, o.shuffle, o.step_tokens) {}

  const DocumentDataset& dataset;
  const DocumentPlanner planner;
  const PlanLoaderOptions options;
  DocumentOrder order;  // whoever makes a step has it for himself
  internal::Prefetcher<PlannedStep> steps{
      [this](int64_t step, PlannedStep* planned) { return Make(step, planned); }};

  absl::Status Make(int64_t step, PlannedStep* planned);
  absl::Status Read(const PlannedStep& planned, const PlanItem& item, PackedBatch* batch) const;
};

absl::Status PlanLoader::Impl::Make(int64_t step, PlannedStep* planned) {
  STRETTO_RETURN_IF_ERROR(order.Step(step, &planned->documents));
  planned->lengths.clear();
  for (const int64_t document : planned->documents) {
    planned->lengths.push_back(dataset.length(document));
  }
  STRETTO_ASSIGN_OR_RETURN(planned->program, planner(planned->lengths));
  planned->hash = planned->program.Hash();
  planned->own.clear();
  const std::vector<PlanItem>& items = planned->program.items;
  for (size_t i = 0; i < items.size(); ++i) {
    const std::vector<int>& places = items[i].pipelines;
    if (std::find(places.begin(), places.end(), options.place) != places.end()) {
      planned->own.push_back(i);
    }
  }
  // Those behind them keep their memory for a later step.
  if (planned->batches.size() < planned->own.size()) planned->batches.resize(planned->own.size());
  for (size_t k = 0; k < planned->own.size(); ++k) {
    STRETTO_RETURN_IF_ERROR(Read(*planned, items[planned->own[k]], &planned->batches[k]));
  }
  return absl::OkStatus();
}

absl::Status PlanLoader::Impl::Read(const PlannedStep& planned, const PlanItem& item,
                                    PackedBatch* batch) const {
  const int ranks = static_cast<int>(item.pipelines.size());
  const int index =
      static_cast<int>(std::find(item.pipelines.begin(), item.pipelines.end(), options.place) -
                       item.pipelines.begin());
  batch->Clear();
  if (ranks > 1) {
    batch->ring.ranks = item.pipelines;
    batch->ring.index = index;
    batch->ring.lengths = item.lengths;
  }
  const auto tokens = static_cast<size_t>(ContextTokens(item.lengths, ranks, index));
  batch->ids.resize(tokens);
  batch->targets.resize(tokens);
  batch->weights.assign(tokens, 1.0f);
  batch->positions.resize(tokens);
  size_t begin = 0;
  for (size_t d = 0; d < item.documents.size(); ++d) {
    const int64_t document = planned.documents[static_cast<size_t>(item.documents[d])];
    const ContextPart part = ContextPartOf(item.lengths[d], ranks, index);
    const size_t first = begin;
    for (const Range& range : {part.front, part.back}) {
      STRETTO_RETURN_IF_ERROR(
          dataset.Read(document, range, batch->ids.data() + begin, batch->targets.data() + begin));
      const auto positions = batch->positions.begin() + static_cast<std::ptrdiff_t>(begin);
      std::iota(positions, positions + range.count, static_cast<int32_t>(range.first));
      begin += static_cast<size_t>(range.count);
    }
    batch->cu_seqlens.push_back(static_cast<int32_t>(begin));
    batch->max_length = std::max(batch->max_length, static_cast<int64_t>(begin - first));
  }
  return absl::OkStatus();
}

PlanLoader::PlanLoader() = default;
PlanLoader::~PlanLoader() = default;

absl::StatusOr<std::unique_ptr<PlanLoader>> PlanLoader::Create(const DocumentDataset& dataset,
                                                               DocumentPlanner planner,
                                                               const PlanLoaderOptions& options) {
  if (options.step_tokens < 1) {
    return absl::InvalidArgumentError(absl::StrCat("a loader of documents was given ",
                                                   options.step_tokens,
                                                   " tokens a step; it needs at least 1"));
  }
  std::unique_ptr<PlanLoader> loader(new PlanLoader);
  loader->impl_ = std::make_unique<Impl>(dataset, std::move(planner), options);
  if (options.prefetch) STRETTO_RETURN_IF_ERROR(loader->impl_->steps.Start());
  return loader;
}

absl::StatusOr<const PlannedStep*> PlanLoader::Step(int64_t step) {
  return impl_->steps.Step(step);
}

}  // namespace stretto
