// The part of each step's documents that a plan gives to this rank.
#ifndef STRETTO_DATA_PLAN_LOADER_H_
#define STRETTO_DATA_PLAN_LOADER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "stretto/core/status.h"
#include "stretto/data/batch.h"
#include "stretto/data/documents.h"
#include "stretto/plan/program.h"

namespace stretto {

// Which places along the data axis (pipelines of the program) work on which documents, and in which
// order: items have `documents`, places in `lengths`, and `lengths`. The same everywhere for the
// same lengths.
using DocumentPlanner = std::function<absl::StatusOr<Program>(const std::vector<int64_t>& lengths)>;

// A step, planned and read.
struct PlannedStep {
  std::vector<int64_t> documents;  // of the dataset
  std::vector<int64_t> lengths;    // theirs
  Program program;
  uint64_t hash = 0;                 // of `program`: the same on all ranks
  bool ends_together = true;         // EndsTogether, of this rank's place
  std::vector<size_t> own;           // items that this rank takes part in, ascending
  std::vector<PackedBatch> batches;  // of these, and more behind them that are nobody's
  // This rank's share of each of its items.
  std::span<const PackedBatch> shares() const { return {batches.data(), own.size()}; }
};

struct PlanLoaderOptions {
  uint64_t seed = 0;
  bool shuffle = true;
  int64_t step_tokens = 0;  // at most, see DocumentOrder
  int place = 0;            // of this rank along the data axis
  bool prefetch = true;     // plan and read the next step from a background thread
  // What else a step needs, made where and when the step is: while another one runs. Called once
  // for each step that is made. Two steps live at a time, that of the last call of Step and the
  // next one; any other has ended.
  std::function<void(int64_t step, const PlannedStep& planned)> prepare;
};

// A rank reads what it works on and nothing else.
class PlanLoader {
 public:
  // The dataset outlives the loader. `planner` may be called from another thread.
  static absl::StatusOr<std::unique_ptr<PlanLoader>> Create(const DocumentDataset& dataset,
                                                            DocumentPlanner planner,
                                                            const PlanLoaderOptions& options);
  ~PlanLoader();
  // Step `step` (0-based), valid until the next call. Any step may follow any other; consecutive
  // ones are there already. An error of the planner or of reading fails the step that it is in.
  // One caller at a time.
  absl::StatusOr<const PlannedStep*> Step(int64_t step);
  // The step that Step is asked for next, while the one that it returned last stays valid; waits
  // for it.
  absl::StatusOr<const PlannedStep*> Ahead(int64_t step);

 private:
  PlanLoader();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace stretto

#endif  // STRETTO_DATA_PLAN_LOADER_H_
