#include "stretto/data/plan_loader.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/data/prefetcher.h"
#include "stretto/data/ring_share.h"

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
  planned->ends_together = EndsTogether(planned->program, options.place);
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
  if (options.prepare) options.prepare(step, *planned);
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
  }
  for (size_t d = 0; d < item.documents.size(); ++d) {
    const int64_t document = planned.documents[static_cast<size_t>(item.documents[d])];
    const auto read = [&](Range range, int64_t at) {
      return dataset.Read(document, range, batch->ids.data() + at, batch->targets.data() + at);
    };
    STRETTO_RETURN_IF_ERROR(AppendRingShare(item.lengths[d], read, batch));
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
absl::StatusOr<const PlannedStep*> PlanLoader::Ahead(int64_t step) {
  return impl_->steps.Ahead(step);
}

}  // namespace stretto
