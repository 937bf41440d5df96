// Trainer::Create: token files, and who reads what of them.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "src/train/trainer_impl.h"
#include "stretto/core/rng.h"
#include "stretto/plan/cost.h"
#include "stretto/train/sequence_planner.h"

namespace stretto {
namespace {

// Refuses ranks whose documents have other lengths, or cost something else: each would plan
// differently.
absl::Status SamePlansEverywhere(World& world, const DocumentDataset& documents,
                                 const std::string& cost_model) {
  std::string costs;
  absl::Status mine;
  if (!cost_model.empty()) {
    absl::StatusOr<CostModel> read = ReadCostModel(cost_model);
    mine = read.status();
    if (read.ok()) costs = ToJson(*read);
  }
  STRETTO_RETURN_IF_ERROR(world.Agree("reading the cost model", mine));
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> of_costs,
                           world.AllGather("costs", absl::StrCat(StableHash(costs))));
  for (int r = 1; r < world.size(); ++r) {
    if (of_costs[static_cast<size_t>(r)] == of_costs[0]) continue;
    return absl::FailedPreconditionError(
        absl::StrCat("rank ", r, " finds other costs than rank 0 in '", cost_model,
                     "' (parallel.cost_model); give all machines the same file"));
  }
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                           world.AllGather("documents", absl::StrCat(documents.Fingerprint())));
  for (int r = 1; r < world.size(); ++r) {
    if (all[static_cast<size_t>(r)] == all[0]) continue;
    return absl::FailedPreconditionError(
        absl::StrCat("rank ", r,
                     " finds documents of other lengths than rank 0 in data.train; "
                     "give all machines the same token files"));
  }
  return absl::OkStatus();
}

// Neighbours along the data axis that are on one machine.
int PlacesPerMachine(const Mesh& mesh, const std::vector<int>& machines) {
  // The same on all ranks: seen from the first pipeline.
  const int places = mesh.Size("dp"), tp = mesh.Size("tp");
  const auto machine = [&](int place) { return machines[static_cast<size_t>(place * tp)]; };
  int same = 1;
  while (same < places && machine(same) == machine(0)) ++same;
  return same;
}

}  // namespace

absl::Status Trainer::Impl::SetUpData() {
  STRETTO_RETURN_IF_ERROR(config.RequireData());
  STRETTO_ASSIGN_OR_RETURN(tokenizer, OpenTokenizer(config.data.tokenizer));
  if (tokenizer->vocabulary() > config.model.vocabulary) {
    return absl::InvalidArgumentError(absl::StrCat(
        "model.vocabulary is ", config.model.vocabulary, " but tokenizer '", config.data.tokenizer,
        "' has ", tokenizer->vocabulary(), " tokens; raise model.vocabulary to at least that"));
  }
  DatasetOptions options = {.sequence_length = config.data.sequence_length,
                            .vocabulary = config.model.vocabulary,
                            .end_of_text = tokenizer->end_of_text(),
                            .mask_across_documents = config.data.document_attention};
  if (config.data.documents) {
    STRETTO_ASSIGN_OR_RETURN(documents, DocumentDataset::Open(config.data.train, options));
    // Evaluation goes over samples, each on a rank of its own.
    options.sequence_length = std::min(config.data.sequence_length, config.batch.capacity);
  } else {
    STRETTO_ASSIGN_OR_RETURN(train_data, TokenDataset::Open(config.data.train, options));
  }
  if (!config.data.validation.empty()) {
    STRETTO_ASSIGN_OR_RETURN(validation_data, TokenDataset::Open(config.data.validation, options));
  }
  if (config.data.documents) {
    STRETTO_RETURN_IF_ERROR(SamePlansEverywhere(world, *documents, config.parallel.cost_model));
    STRETTO_ASSIGN_OR_RETURN(DocumentPlanner planner,
                             DocumentPlannerOf(config, PlacesPerMachine(*mesh, machines)));
    const auto prepare = [this](int64_t step, const PlannedStep& planned) {
      if (plan.step.stages == 1) return;
      planned_programs[step % 2] = std::make_unique<RankProgram>(
          PipelineOf(planned.program, dp_group.index), pp_group.index);
    };
    STRETTO_ASSIGN_OR_RETURN(plan_loader,
                             PlanLoader::Create(*documents, std::move(planner),
                                                {.seed = static_cast<uint64_t>(config.seed),
                                                 .shuffle = config.data.shuffle,
                                                 .step_tokens = config.batch.tokens,
                                                 .place = dp_group.index,
                                                 .prefetch = config.data.prefetch,
                                                 .prepare = prepare}));
    return absl::OkStatus();
  }
  STRETTO_ASSIGN_OR_RETURN(loader,
                           Loader::Create(*train_data, {.seed = static_cast<uint64_t>(config.seed),
                                                        .shuffle = config.data.shuffle,
                                                        .global_batch = config.batch.global,
                                                        .micro_batch = config.batch.micro,
                                                        .rank = dp_group.index,
                                                        .ranks = dp_group.size(),
                                                        .prefetch = config.data.prefetch}));
  return absl::OkStatus();
}

}  // namespace stretto
