// Trainer::Create: what documents cost, and who plans the steps.
#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "src/train/trainer_impl.h"
#include "stretto/core/device_name.h"
#include "stretto/core/log.h"
#include "stretto/plan/cost.h"
#include "stretto/train/sequence_planner.h"

namespace stretto {
namespace {

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

absl::Status Trainer::Impl::ChooseCosts(std::string* source) {
  const std::string& file = config.parallel.cost_model;
  const bool restored = !state.costs.empty();
  *source = restored ? absl::StrCat("the checkpoint (from '", state.costs_file, "')")
                     : absl::StrCat("'", file, "'");
  if (file.empty()) {
    if (restored) {
      LogInfo(absl::StrCat("documents are planned with the costs that ", *source,
                           " holds, although parallel.cost_model is empty; to plan by FLOPs, "
                           "begin a new run"));
    }
    return absl::OkStatus();
  }
  const absl::StatusOr<CostModel> read = ReadCostModel(file);
  if (restored && file == state.costs_file) {
    // The file may have changed since, or be gone: steps are planned as they were.
    if (!read.ok() || ToJson(*read) != state.costs) {
      LogInfo(absl::StrCat("documents are planned with the costs that the checkpoint holds; '",
                           file, "' ", read.ok() ? "has others" : "cannot be read any more",
                           " (parallel.cost_model takes the name of another file)"));
    }
    return absl::OkStatus();
  }
  STRETTO_RETURN_IF_ERROR(read.status());
  if (const std::string text = ToJson(*read); text != state.costs) {
    if (state.step > 0) {
      LogInfo(absl::StrCat("from step ", state.step + 1,
                           " on documents are planned with the costs in '", file,
                           "', no longer with those ",
                           restored ? absl::StrCat("that ", *source, " holds") : "of FLOPs"));
    }
    state.costs = text;
  }
  state.costs_file = file;
  *source = absl::StrCat("'", file, "'");
  return absl::OkStatus();
}

absl::Status Trainer::Impl::SetUpPlans() {
  if (documents == nullptr) return absl::OkStatus();
  // Rank 0's costs are everybody's.
  std::string source;
  absl::Status chosen;
  if (world.rank() == 0) chosen = ChooseCosts(&source);
  STRETTO_RETURN_IF_ERROR(world.Agree("reading the cost model", chosen));
  const bool first = world.rank() == 0;
  for (std::string* text : {&state.costs, &state.costs_file, &source}) {
    STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                             world.AllGather("costs", first ? *text : ""));
    *text = all[0];
  }
  std::optional<CostModel> costs;
  if (!state.costs.empty()) {
    STRETTO_ASSIGN_OR_RETURN(costs, ParseCostModel(state.costs, source));
    STRETTO_RETURN_IF_ERROR(
        world.Agree("checking the cost model",
                    CheckCosts(*costs, source, config, DeviceName(stream->device()))));
  }
  DocumentPlanner planner = options.planner;
  if (planner == nullptr) {
    STRETTO_ASSIGN_OR_RETURN(planner, DocumentPlannerOf(config, PlacesPerMachine(*mesh, machines),
                                                        costs ? &*costs : nullptr));
  }
  const auto prepare = [this](int64_t step, const PlannedStep& planned) {
    if (plan.step.stages == 1) return;
    planned_programs[step % 2] =
        std::make_unique<RankProgram>(PipelineOf(planned.program, dp_group.index), pp_group.index);
  };
  STRETTO_ASSIGN_OR_RETURN(plan_loader,
                           PlanLoader::Create(*documents, std::move(planner),
                                              {.seed = static_cast<uint64_t>(config.seed),
                                               .shuffle = config.data.shuffle,
                                               .step_tokens = config.batch.tokens,
                                               .place = dp_group.index,
                                               .prefetch = config.data.prefetch,
                                               .prepare = prepare}));
  if (state.step >= config.steps) return absl::OkStatus();
  const auto ahead = plan_loader->Ahead(state.step);
  STRETTO_RETURN_IF_ERROR(world.Agree("planning the first step", ahead.status()));
  return ComparePlans((*ahead)->hash);
}

absl::Status Trainer::Impl::ComparePlans(uint64_t hash) {
  STRETTO_ASSIGN_OR_RETURN(
      const std::vector<std::string> all,
      world.AllGather("plans", absl::StrCat(absl::Hex(hash, absl::kZeroPad16))));
  // What most have, of equally many what the lowest rank has, is right.
  std::map<std::string, int> counts;
  for (const std::string& theirs : all) ++counts[theirs];
  const std::string* common = &all[0];
  for (const std::string& theirs : all) {
    if (counts[theirs] > counts[*common]) common = &theirs;
  }
  if (counts[*common] == world.size()) return absl::OkStatus();
  std::string odd;
  int count = 0;
  for (int r = 0; r < world.size(); ++r) {
    const std::string& theirs = all[static_cast<size_t>(r)];
    if (theirs == *common) continue;
    if (++count <= 8) absl::StrAppend(&odd, count > 1 ? ", " : "", r, " (plan ", theirs, ")");
  }
  if (count > 8) absl::StrAppend(&odd, " and ", count - 8, " more");
  absl::Status differ = absl::InternalError(absl::StrCat(
      "step ", state.step + 1, ": rank", count > 1 ? "s " : " ", odd, count > 1 ? " have" : " has",
      " planned the documents in another way than the others (plan ", *common,
      "); check that all run the same program on the same token files"));
  return world.Agree("comparing plans", differ);
}

}  // namespace stretto
